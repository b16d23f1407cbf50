"""From a file to 8-bit RGB, always in the same way; what cannot be read is an error with a reason.

Images that a certificate counts must not depend on what else Pillow has been asked to do, and none may drop
out in silence: see :data:`UNREADABLE`.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import brief

# What opening and decoding an image raise for one that cannot be read; other errors are ours.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)


def why_unreadable(problem: Exception) -> str:
    """The reason in one line of at most 200 characters, the same in every run.

    Pillow's own text for an unknown format holds a memory address, so it is not used.
    """
    if isinstance(problem, IsADirectoryError):
        return "a folder, not an image"
    text = brief(problem, 200)
    if isinstance(problem, UnidentifiedImageError):
        text = "not an image of a known format"
    return f"{type(problem).__name__}: {text}"[:200]


def decode(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB: grey is repeated, alpha dropped, a palette resolved, 16 bits are scaled to 8.

    Raises one of UNREADABLE for damaged bytes, and for floating-point pixels.
    """
    with _damage_as_oserror():
        image.load()
    if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(wide // 257, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no stated range; save the image with 8 or 16 bits")
    return image.convert("RGB")


def open_image(path: str | Path) -> Image.Image:
    """Open one image file; its bytes are read at once, so that no handle stays open.

    Raises one of UNREADABLE for a path that is no image file.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OSError("not a regular file")  # /dev/zero would be read without end
    return open_bytes(Path(path).read_bytes())


def open_bytes(data: bytes) -> Image.Image:
    """Open an image from the bytes of its file; raises one of UNREADABLE for what is no image."""
    if not data:
        raise OSError("the file is empty")
    with _damage_as_oserror():
        return Image.open(io.BytesIO(data))


@contextmanager
def _damage_as_oserror() -> Iterator[None]:
    """A block of Pillow's work, in which damaged bytes may raise anything (TypeError, struct.error ...).

    All of that is an image that cannot be read, and becomes an OSError unless it is one of UNREADABLE.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except UNREADABLE:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
