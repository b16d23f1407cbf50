"""TODO."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)


def why_unreadable(problem: Exception) -> str:
    """The reason in one line, the same in every run (Pillow's text may hold a memory address)."""
    if isinstance(problem, IsADirectoryError):
        return "a folder, not an image"
    text = (
        "not an image of a known format"
        if isinstance(problem, UnidentifiedImageError)
        else " ".join(str(problem).split())
    )
    return f"{type(problem).__name__}: {text}"[:200]


def decode(image: Image.Image) -> Image.Image:
    """Any readable image as 8-bit RGB: grey is repeated, alpha is dropped, palettes resolved, 16 bits scaled
    to 8."""
    with _by_pillow():
        image.load()
    if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(wide // 257, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no stated range; save the image with 8 or 16 bits")
    return image.convert("RGB")


def open_image(path: str | Path) -> Image.Image:
    """Open one file; the bytes are read at once so that no handle stays open."""
    if not os.path.isfile(path) and os.path.exists(path) and not os.path.isdir(path):  # /dev/zero has no end
        raise OSError("not a regular file")
    return _from_bytes(Path(path).read_bytes())


def _from_bytes(data: bytes) -> Image.Image:
    if not data:
        raise OSError("the file is empty")
    with _by_pillow():
        return Image.open(io.BytesIO(data))


@contextmanager
def _by_pillow() -> Iterator[None]:
    """Damaged bytes make Pillow stumble in any way (TypeError, struct.error ...); each is an image that
    cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except UNREADABLE:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
