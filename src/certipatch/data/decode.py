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
from PIL import ExifTags, Image, UnidentifiedImageError

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
    if isinstance(problem, Image.DecompressionBombError | Image.DecompressionBombWarning):
        text = text.partition(", could be")[0] + "; save the image with fewer pixels"
    return f"{type(problem).__name__}: {text}"[:200]


def decode(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, upright as browsers show it.

    Grey is repeated, alpha dropped, a palette resolved; 16 bits are scaled to 8 if the values use them.

    Raises one of UNREADABLE for damaged bytes, and for pixels whose range cannot be known.
    """
    with _damage_as_oserror():
        of_16_bits = any(";16" in str(tile[-1]) for tile in getattr(image, "tile", ()))
        image.load()
        coloured = _eight_bits(image).convert("RGB")
        if of_16_bits and not image.mode.startswith("I"):  # Pillow has kept the upper 8
            _refuse_unfilled(int(np.asarray(coloured).max()), 1 << 8)
        turn = UPRIGHT.get(_orientation(image))
        return coloured if turn is None else coloured.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits, of one of more; raises ValueError where the range of its values is not known."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no stated range; save the image with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these two have at most 16 bits
        raise ValueError("32-bit whole numbers have no stated range; save the image with 8 or 16 bits")
    wide = np.asarray(image).astype(np.int64)  # convert("RGB") would clip at 255
    if image.format != "PPM":  # which states the largest value, and Pillow scales by it
        _refuse_unfilled(int(wide.max()), 1 << 16)
    return Image.fromarray(np.clip(wide // 257, 0, 255).astype(np.uint8))


def _refuse_unfilled(largest: int, values: int) -> None:
    """Raise ValueError for values that may be of fewer bits (10, 12, 14) than they are stored in (16).

    A black image is black in any range.
    """
    if 0 < largest < values // 4:
        raise ValueError(
            "pixels are stored in 16 bits but use at most 14, so their range is not known (12 bits of a "
            "camera?); scale them, or save the image with 8 bits"
        )


# What turns a picture upright, by its EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image: 1 (upright) to 8, or 1 where a browser sees none.

    Browsers do not look for it in XMP, as Pillow does, and ignore damaged EXIF. Pillow has turned a TIFF.
    """
    if not (stated := image.info.get("exif")):
        return 1
    notes = Image.Exif()
    try:
        with _damage_as_oserror():
            notes.load(stated)
            found = notes.get(ExifTags.Base.Orientation)
    except UNREADABLE:
        return 1
    return found if isinstance(found, int) else 1


def open_image(path: str | Path) -> Image.Image:
    """Open one image file; its bytes are read at once, so that no handle stays open.

    Raises one of UNREADABLE for a path that is no image file.
    """
    return open_bytes(read_image(path))


def read_image(path: str | Path) -> bytes:
    """The bytes of one image file; raises OSError for what is no file."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OSError("not a regular file")  # /dev/zero would be read without end
    return Path(path).read_bytes()


def open_bytes(data: bytes) -> Image.Image:
    """Open an image from the bytes of its file; raises one of UNREADABLE for what is no image."""
    if not data:
        raise OSError("the file is empty")
    with _damage_as_oserror():
        image = Image.open(io.BytesIO(data))
    # Another thread may have switched the warning off that is an error above.
    most, pixels = Image.MAX_IMAGE_PIXELS, image.width * image.height
    if most is not None and pixels > most:
        raise Image.DecompressionBombError(f"Image size ({pixels} pixels) exceeds limit of {most} pixels")
    return image


@contextmanager
def _damage_as_oserror() -> Iterator[None]:
    """A block of Pillow's work, in which damaged bytes may raise anything (TypeError, struct.error ...).

    All of that is an image that cannot be read, and becomes an OSError unless it is one of UNREADABLE.
    Pillow's warnings stay inside; that of too many pixels is an error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except UNREADABLE:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
