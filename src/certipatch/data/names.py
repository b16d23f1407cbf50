"""What the name of a file says: whether it is an image, what a system has left beside it, and its order.

None of this depends on the machine: not on its locale, on the build of Pillow, or on the order in which a
file system lists names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from decimal import Decimal
from pathlib import PurePath
from typing import Any

from ..errors import DataError

# The endings of images: all that Pillow can read, and some that it cannot, which are named as unreadable.
# Endings of data, documents and films (.h5, .pdf, .mpg) are not among them, though Pillow knows some.
_ENDINGS = """
apng avif avifs blp bmp bw cur dcx dds dib emf eps fit fits flc fli ftc ftu gbr gif icb icns ico im j2c
j2k jfif jp2 jpc jpe jpeg jpf jpg jpx mpo msp pbm pcd pcx pfm pgm png pnm ppm ps psd pxr qoi ras rgb rgba
sgi tga tif tiff vda vst webp wmf xbm xpm
arw cr2 cr3 dng exr hdr heic heif hif jfi jif jxl jxr nef orf raf rw2 svg wdp
"""
IMAGE_ENDINGS = frozenset(f".{ending}" for ending in _ENDINGS.split())

# Folders that systems and programs make beside one's own; those whose name begins with a dot are others.
SYSTEM_FOLDERS = frozenset(
    ("__MACOSX", "@eaDir", "@tmp", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)


def in_order(name: str) -> tuple[list[Any], str]:
    """The key by which names are sorted: numbers by value and letters without case, as timm sorts them.

    What this takes for equal (``1`` and ``01``, ``A`` and ``a``) is sorted by the name itself, by code point,
    so that there is one order of any set of names.
    """
    parts: list[Any] = re.split(r"(\d+)", name.lower())
    parts[1::2] = map(Decimal, parts[1::2])
    return parts, name


def is_image(name: str) -> bool:
    """Whether a file is an image by its name; the ``._`` files of macOS are none."""
    base = os.path.basename(name)
    return os.path.splitext(base)[1].lower() in IMAGE_ENDINGS and not base.startswith("._")


def is_system_folder(name: str) -> bool:
    """Whether a folder of this name is no class of images, but something that a system or a program keeps."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def readable_name(name: bytes | str, root: str) -> str:
    """A name as text. Raises DataError for one that is not UTF-8, which no record could hold."""
    try:
        return name.decode() if isinstance(name, bytes) else name.encode().decode()
    except UnicodeError:
        raise DataError(
            f"data {root}: expected names in UTF-8, found {os.fsdecode(name)!r}; rename it (convmv does that)"
        ) from None


def what_was_left_out(root: str, names: Iterable[str]) -> tuple[str, ...]:
    """A line that counts, by kind, the files and folders that are no images by their name; none if empty.

    The name of a folder ends with a slash.
    """
    kinds: dict[str, list[str]] = {}
    for name in sorted(names, key=in_order):
        kinds.setdefault(_kind(name), []).append(name)
    if not kinds:
        return ()
    counted = [f"{len(found)} {kind} ({_some(found)})" for kind, found in kinds.items()]
    return (f"data {root}: left out: {'; '.join(counted)}",)


def what_is_empty(root: str, folders: Iterable[str]) -> tuple[str, ...]:
    """A line that names class folders without images; none if there are no such."""
    empty = sorted(folders, key=in_order)
    return (f"data {root}: no images in the class folders {_some(empty)}",) if empty else ()


def what_is_twice(root: str, names: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """A line that counts the images that are files of the data once more, each with its other name."""
    pairs = [f"{name} is {other}" for name, other in names]
    if not pairs:
        return ()
    return (f"data {root}: {len(pairs)} images are taken twice, through links: {_some(pairs)}",)


def _kind(name: str) -> str:
    if name.endswith("/"):
        return "folders of a system or a program"
    base = PurePath(name).name
    if base.startswith("._"):
        return "whose names begin with ._"
    ending = PurePath(base).suffix
    return f"of {ending}" if ending else f"of {base}" if base.startswith(".") else "without an ending"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
