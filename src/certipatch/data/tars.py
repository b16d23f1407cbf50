"""What is in a tar: each member is an image, a folder, or counted as left out, and a damaged tar is refused.

A tar is read where it lies. Nothing is unpacked, so no name in it leads anywhere.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass, field

from ..errors import DataError, brief
from .names import is_image, is_system_folder, readable_name

EXPECTED = "expected a folder or .tar with one folder of images a class"


@dataclass
class Contents:
    """What a tar holds: images by their names, names of all folders, and what was left out."""

    images: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    left_out: list[str] = field(default_factory=list)


def contents_of(root: str, known: frozenset[str]) -> Contents:
    """What a tar holds. ``known`` are names of classes, which are never taken for folders of a system.

    Raises DataError for a file that is no tar, is compressed or damaged, or holds what would be lost.
    """
    found = Contents()
    paths: set[str] = set()
    try:
        with _opened(root) as tar:
            for member in tar:
                _add(root, member, known, found, paths)
            _refuse_more(root, tar.offset)
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        raise DataError(
            f"data {root}: expected a whole tar, found a damaged one ({brief(error, 100)})"
        ) from error
    return found


def _opened(root: str) -> tarfile.TarFile:
    if not os.path.isfile(root):
        raise DataError(f"data {root}: {EXPECTED}, found neither a folder nor a regular file")
    try:
        return tarfile.open(root, mode="r:", encoding="utf-8", errors="surrogateescape")
    except tarfile.ReadError as error:
        if tarfile.is_tarfile(root):
            raise DataError(
                f"data {root}: expected a tar that is not compressed, for its images are read in any order; "
                "uncompress it (gunzip, xz -d ...), or unpack it and name the folder"
            ) from None
        what = "one image; name the folder in which the class folders lie" if is_image(root) else "neither"
        raise DataError(f"data {root}: {EXPECTED}, found {what} ({brief(error, 100)})") from error


def _add(root: str, member: tarfile.TarInfo, known: frozenset[str], found: Contents, paths: set[str]) -> None:
    """Take in one member of a tar. Raises DataError for one that would be lost."""
    name = readable_name(member.name, root)
    parts = name.split("/")
    folders = parts if member.isdir() else parts[:-1]
    for depth, part in enumerate(folders, start=1):
        if part not in ("", ".", "..") and part not in known and is_system_folder(part):
            found.left_out.append("/".join(parts[:depth]) + "/")
            return
    if member.isdir():
        found.folders.add(name)
        return
    if parts[-1].startswith("._"):
        found.left_out.append(name)
        return
    _refuse_lost(root, name, member)
    if not is_image(name):
        found.left_out.append(name)
        return
    path = os.path.normpath(name)
    if path in paths:
        raise DataError(f"data {root}: expected each name once in the tar, found {name} twice; pack it again")
    paths.add(path)
    found.images[name] = member


def _refuse_lost(root: str, name: str, member: tarfile.TarInfo) -> None:
    """Raise DataError for a member that is no plain file, or is a tar: images in it would not be counted."""
    if member.issym() or member.islnk():
        raise DataError(
            f"data {root}: expected plain files in the tar, found the link {name}; pack it again with "
            "--dereference --hard-dereference"
        )
    if member.issparse():
        raise DataError(
            f"data {root}: expected whole files in the tar, found a sparse one, {name}; pack it again "
            "without --sparse"
        )
    if not member.isreg():
        raise DataError(f"data {root}: expected plain files in the tar, found {name}, which is none")
    if name.lower().endswith(".tar"):
        raise DataError(
            f"data {root}: expected one folder a class inside the tar, found tars inside it ({name}); "
            "unpack it"
        )


def _refuse_more(root: str, end: int) -> None:
    """Raise DataError unless the tar ends where its last member does: with zeros, and nothing behind them.

    Python takes a damaged member for the end, and does not miss what was cut off there.
    """
    with open(root, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(
                f"data {root}: expected the end of the tar at byte {end}, found none; it is cut off or "
                "damaged there: copy or pack it again"
            )
        while more := file.read(1 << 20):
            if more.strip(b"\0"):
                raise DataError(
                    f"data {root}: expected nothing behind the end of the tar at byte {end}, found more; was "
                    "another tar appended? pack it again"
                )
