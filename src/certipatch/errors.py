"""What can go wrong, in words a user can act on.

The message of each error is one line: what was expected, what was found, what to do. The command line prints
that line and exits with the error's code; no traceback reaches a user.
"""

from __future__ import annotations

import errno


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
    """The base of all errors that CertiPatch raises on purpose.

    Attributes:
        exit_code: what the command line ends with: 1 something was checked and failed, 2 usage or input,
            3 the machine.
    """

    exit_code = 2


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


class BrokenCertificateError(SoundnessError):
    """An attack has found a patch that a certificate excludes: the worst that can be found."""

    exit_code = 1


class MachineError(CertiPatchError):
    """This machine lacks what was asked for: a device, a package, a place to write."""

    exit_code = 3


class ProcessError(MachineError):
    """A run of several processes cannot start, or has lost one of them."""


MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}


LIBRARIES = "operator torchvision::"  # torch says so of a torchvision that is of another torch


def exit_code(error: Exception) -> int | None:
    """What the command line ends with after an error; None for one that is a mistake of ours.

    Of the system's errors those of a full or failing machine are 3; a file that is not there is input.
    """
    if isinstance(error, CertiPatchError):
        return error.exit_code
    if isinstance(error, ImportError):
        return None if str(error.name).startswith("certipatch") else 3
    if isinstance(error, RuntimeError) and LIBRARIES in str(error):
        return 3
    if isinstance(error, OSError):
        return 3 if error.errno in MACHINE else 2
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    return 3 if out_of_memory else None
