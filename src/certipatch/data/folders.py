"""Images of one's own: a folder, or a tar, with one folder of images for each class.

Every image is counted, in one order on every machine, or named: as left out, or in a refusal. What would be
read in another sense than the user's is refused: class folders that do not lie side by side, or are empty,
folders that come twice through a link, classes that the model does not know.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from PIL import Image

from ..errors import ConfigError, DataError, brief
from .decode import open_bytes, read_image
from .names import (
    in_order,
    is_image,
    is_system_folder,
    readable_name,
    what_is_empty,
    what_is_twice,
    what_was_left_out,
)
from .source import Source
from .tars import EXPECTED, contents_of


@dataclass(frozen=True)
class Listing:
    """The images in a folder or tar.

    Attributes:
        root: the folder or tar.
        names: of each image its path below ``root``, in order.
        encoded: the bytes of the file at a position, or OSError.
        folders: the paths of all folders below ``root``, also of those without images.
        remarks: lines that say what was left out, and what is there twice.
    """

    root: str
    names: Sequence[str]
    encoded: Callable[[int], bytes]
    folders: frozenset[str]
    remarks: tuple[str, ...]

    @cached_property
    def class_of(self) -> list[str]:
        """Of each image the name of the folder in which it lies."""
        return [os.path.basename(os.path.dirname(name)) for name in self.names]

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The class folders in order."""
        return tuple(sorted(set(self.class_of), key=in_order))


def folder_or_tar(
    root: str, *, split: str | None, class_map: str | None, classes: tuple[str, ...] | None
) -> Source:
    """The images in a folder or tar of class folders; the arguments are those of ``load_source``.

    Raises ConfigError for a split or class map that cannot be read, DataError for folders that give an image
    no class, or one that the model does not know.
    """
    root = _split_folder(root, split)
    if class_map:
        classes = read_class_map(class_map)
    known = frozenset(classes or ())
    listing = _list_folder(root, known) if os.path.isdir(root) else _list_tar(root, known)
    if not listing.names:
        raise DataError(f"data {root}: {EXPECTED}, found no images{_briefly(listing.remarks)}")
    if "" in listing.class_of:
        raise DataError(f"data {root}: expected images in one folder a class, found some outside any folder")
    labels = _labels_by_name(listing, classes)
    empty = _empty_folders(listing, _parent_of_classes(listing))
    if empty and classes is None:  # the classes after it would get smaller labels
        raise DataError(
            f"data {root}: expected images in every class folder, found none in "
            f"{', '.join(empty[:5])}; fill or remove it"
        )
    remarks = listing.remarks + what_is_empty(root, empty)
    opened = partial(_open, listing.encoded)
    return Source(classes or listing.classes, listing.names, labels, opened, remarks, listing.encoded)


def read_class_map(path: str) -> tuple[str, ...]:
    """The class folders that a text file names, one a line; the line number, from 0, is the label.

    Raises ConfigError for a file that cannot be read, an empty line, or a name that comes twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"class map {path}: expected a text file with one class folder a line ({error})"
        ) from error
    names = [line.strip() for line in text.rstrip().split("\n")]
    before: set[str] = set()
    for number, name in enumerate(names, start=1):
        if not name or name in before:
            raise ConfigError(
                f"class map {path}, line {number}: expected one new class folder a line, found {name!r} "
                f"{'again' if name else ''}"
            )
        before.add(name)
    return tuple(names)


def _split_folder(root: str, split: str | None) -> str:
    if not split or not os.path.isdir(root):
        return root
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        raise ConfigError(f"split {split!r}: expected a folder {folder}, found none")
    return folder


def _briefly(remarks: tuple[str, ...]) -> str:
    return f" ({remarks[0].partition(': ')[2]})" if remarks else ""


@dataclass
class _Walk:
    """A walk through a folder, links followed.

    Attributes:
        known: names of classes, which are never taken for folders of a system.
        images: by name below the root, the path and the number of the file.
        walked: by real path, the name below the root of each folder.
        left_out: names of files, and of folders with a slash behind.
    """

    root: str
    known: frozenset[str]
    images: dict[str, tuple[str, int]] = field(default_factory=dict)
    walked: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def walk(self, path: str, below: str) -> None:
        """Take in all that lies in one folder. Raises DataError for a folder that comes twice."""
        real = os.path.realpath(path)
        if real in self.walked:
            raise DataError(
                f"data {self.root}: expected each folder once, found {self.walked[real] or 'it'} again as "
                f"{below}, through a link; remove the link"
            )
        self.walked[real] = below
        device = os.stat(path).st_dev
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: os.fsencode(entry.name)):
                base = readable_name(os.fsencode(entry.name), self.root)
                name = f"{below}/{base}" if below else base  # on every system
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    if is_system_folder(base) and base not in self.known:
                        self.left_out.append(f"{name}/")
                    else:
                        self.walk(entry.path, name)
                elif is_image(name):
                    self.images[name] = entry.path, _number(entry, device)
                else:
                    self.left_out.append(name)

    def twice(self) -> list[tuple[str, str]]:
        """Images that are the file of an earlier one, each with the name of that."""
        first: dict[int, str] = {}
        found = []
        for name in sorted(self.images, key=in_order):
            other = first.setdefault(self.images[name][1], name)
            if other != name:
                found.append((name, other))
        return found


def _number(entry: os.DirEntry[str], device: int) -> int:
    """A number that names with the same file share; links are followed, and one that leads nowhere is its
    own file."""
    inode = entry.inode()
    if entry.is_symlink() and os.path.exists(entry.path):
        there = os.stat(entry.path)
        device, inode = there.st_dev, there.st_ino
    return (device << 64) + inode


def _list_folder(root: str, known: frozenset[str]) -> Listing:
    found = _Walk(root, known)
    try:
        found.walk(root, "")
    except OSError as error:
        raise DataError(f"data {root}: expected folders that can be read ({brief(error, 100)})") from error
    names = sorted(found.images, key=in_order)
    paths = [found.images[name][0] for name in names]
    remarks = what_was_left_out(root, found.left_out) + what_is_twice(root, found.twice())
    folders = frozenset(found.walked.values())
    return Listing(root, names, partial(_read_path, paths), folders, remarks)


def _list_tar(root: str, known: frozenset[str]) -> Listing:
    found = contents_of(root, known)
    names = sorted(found.images, key=in_order)
    places = [(found.images[name].offset_data, found.images[name].size) for name in names]

    remarks = what_was_left_out(root, dict.fromkeys(found.left_out))
    return Listing(root, names, partial(_read_in_tar, root, places), frozenset(found.folders), remarks)


def _open(encoded: Callable[[int], bytes], i: int) -> Image.Image:
    return open_bytes(encoded(i))


def _read_path(paths: list[str], i: int) -> bytes:
    return read_image(paths[i])


def _read_in_tar(root: str, places: list[tuple[int, int]], i: int) -> bytes:
    """Each read opens the tar anew: worker processes that shared a file offset would disturb each other."""
    with open(root, "rb") as file:
        file.seek(places[i][0])
        return file.read(places[i][1])


def _labels_by_name(listing: Listing, classes: tuple[str, ...] | None) -> list[int]:
    """The label of each image: the position of its folder's name among the classes of the model, or else
    among the folders."""
    position = {name: label for label, name in enumerate(classes or listing.classes)}
    if unknown := sorted(set(listing.classes) - set(position)):
        raise DataError(
            f"data {listing.root}: folders of classes the model does not know: {', '.join(unknown[:5])}; "
            f"expected some of {', '.join(list(position)[:5])} ... (or give --class-map)"
        )
    return [position[name] for name in listing.class_of]


def _parent_of_classes(listing: Listing) -> str:
    """The folder, below the root, in which the class folders lie; "" for the root itself."""
    parents = {os.path.dirname(os.path.dirname(name)) for name in listing.names}
    if len(parents) > 1:
        raise DataError(
            f"data {listing.root}: expected all class folders side by side, found them in "
            f"{', '.join(sorted(parents)[:3])}; name one of these folders (or --split)"
        )
    parent = os.path.normpath(parents.pop())
    return "" if parent == "." else parent


def _empty_folders(listing: Listing, parent: str) -> list[str]:
    """The folders without images that lie beside the class folders."""
    there = map(os.path.normpath, listing.folders - {"", "."})
    beside = {os.path.basename(path) for path in there if os.path.dirname(path) == parent}
    return sorted(beside - set(listing.classes), key=in_order)
