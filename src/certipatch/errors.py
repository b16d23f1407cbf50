"""What can go wrong, in words a user can act on.

Each message is one line: what was expected, what was found, what to do. The command line prints it and exits
with code 2; no traceback reaches a user.
"""

from __future__ import annotations


def one_line(text: str) -> str:
    """Text of unknown origin as one line that a terminal shows and does not obey: what cannot be printed
    becomes its escape.

    >>> one_line("cat\\x1b[31m\\n")
    'cat\\\\x1b[31m\\\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class CertiPatchError(Exception):
    """Base of all errors that CertiPatch raises on purpose."""


class ConfigError(CertiPatchError):
    """An option or argument that cannot be meant: unknown name, wrong type, impossible size."""


class DataError(CertiPatchError):
    """A data set that cannot be used: no images, missing classes, an unreadable image in training."""


class ModelError(CertiPatchError):
    """A model or checkpoint that cannot be used: unknown name, other architecture, truncated file."""


class RecordsError(CertiPatchError):
    """A folder of records or a training run that is damaged, busy, or of another experiment."""


class SoundnessError(CertiPatchError):
    """A premise of the certificate does not hold. Nothing turns this off."""


class ProcessError(CertiPatchError):
    """A run of several processes that cannot start, or has lost one of them."""
