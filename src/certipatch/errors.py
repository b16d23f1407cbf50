"""What can go wrong, in words a user can act on.

The message of each error is one line: what was expected, what was found, what to do. The command line prints
that line and exits with code 2; no traceback reaches a user.
"""

from __future__ import annotations


def one_line(text: str) -> str:
    """Text of unknown origin as one line that is safe to print on a terminal.

    Each character that cannot be printed (a line break, a control sequence) is replaced by its escape.

    >>> one_line("cat\\x1b[31m\\n")
    'cat\\\\x1b[31m\\\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def brief(error: object, most: int = 120) -> str:
    """What an error of a library says, in one line of at most so many characters."""
    return " ".join(str(error).split())[:most]


class CertiPatchError(Exception):
    """The base of all errors that CertiPatch raises on purpose."""


class ConfigError(CertiPatchError):
    """An option or argument makes no sense: an unknown name, a wrong type, an impossible size."""


class DataError(CertiPatchError):
    """A data set cannot be used: it has no images, lacks classes, or has an unreadable image in training."""


class ModelError(CertiPatchError):
    """A model or checkpoint cannot be used: an unknown name, another architecture, a truncated file."""


class RecordsError(CertiPatchError):
    """A folder of records or a training run is damaged, in use, or of another experiment."""


class SoundnessError(CertiPatchError):
    """A premise of the certificate does not hold. No option turns this error off."""


class ProcessError(CertiPatchError):
    """A run of several processes cannot start, or has lost one of them."""
