"""Images of one's own: a folder, or a tar, with one folder of images for each class.

timm finds the images. What it would read in another sense than the user's is refused here: class folders that
do not lie side by side, or are empty, tars inside a tar, classes that the model does not know.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.readers import create_reader

from ..errors import ConfigError, DataError, brief
from .decode import open_bytes, open_image
from .source import Source


@dataclass(frozen=True)
class Listing:
    """The images that timm has found in a folder or tar.

    Attributes:
        root: the folder or tar.
        names: of each image its path below ``root``.
        labels: of each image the number of its class folder, as in ``folders``.
        folders: for each class folder its number, in timm's order.
        open: the image at a position, or OSError, ValueError and the like.
    """

    root: str
    names: Sequence[str]
    labels: Sequence[int]
    folders: dict[str, int]
    open: Callable[[int], Image.Image]

    @property
    def classes(self) -> tuple[str, ...]:
        """The class folders in the order of their numbers."""
        return tuple(sorted(self.folders, key=self.folders.__getitem__))


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
    in_tar = os.path.isfile(root) and Path(root).suffix == ".tar"
    listing = _list_tar(root) if in_tar else _list_folder(root)
    if "" in listing.folders:
        raise DataError(f"data {root}: expected images in one folder a class, found some outside any folder")
    labels = listing.labels if classes is None else _labels_by_name(listing, classes)
    parent = _parent_of_classes(listing)
    if classes is None and not in_tar:
        _refuse_empty_folders(listing, parent)
    return Source(classes or listing.classes, listing.names, labels, listing.open)


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


def _list_folder(root: str) -> Listing:
    reader = _reader(root)
    paths, labels = zip(*reader.samples, strict=True)
    names = [os.path.relpath(path, root) for path in paths]
    return Listing(root, names, list(labels), reader.class_to_idx, lambda i: open_image(paths[i]))


def _list_tar(root: str) -> Listing:
    # timm keeps the list of a large tar beside it as a pickle, and would read any that it finds there.
    reader = _reader(root, cache_tarinfo=False)
    if not reader.root_is_tar:
        raise DataError(
            f"data {root}: expected one folder a class inside the tar, found tars inside it; unpack it"
        )
    members: list[tarfile.TarInfo] = [member for member, _, _ in reader.samples]
    if any(member.issparse() for member in members):
        raise DataError(
            f"data {root}: expected whole files in the tar, found sparse ones; pack it again without --sparse"
        )

    def read(i: int) -> Image.Image:
        # Each read opens the tar anew: worker processes that shared a file offset would disturb each other.
        with open(root, "rb") as file:
            file.seek(members[i].offset_data)
            return open_bytes(file.read(members[i].size))

    names = [member.path for member in members]
    return Listing(root, names, [int(label) for label in reader.targets], reader.class_name_to_idx, read)


def _reader(root: str, **options: bool) -> Any:
    try:
        return create_reader("", root=root, **options)
    except (RuntimeError, ValueError, tarfile.TarError, OSError) as error:
        raise DataError(
            f"data {root}: expected a folder or .tar with one folder of images a class, found no images "
            f"({brief(error, 100)})"
        ) from error


def _labels_by_name(listing: Listing, classes: tuple[str, ...]) -> list[int]:
    """The label of each image: the position of its folder's name among these classes."""
    position = {name: label for label, name in enumerate(classes)}
    unknown = sorted(set(listing.folders) - set(position))
    if unknown:
        raise DataError(
            f"data {listing.root}: folders of classes the model does not know: {', '.join(unknown[:5])}; "
            f"expected some of {', '.join(classes[:5])} ... (or give --class-map)"
        )
    by_folder = {number: position[name] for name, number in listing.folders.items()}
    return [by_folder[number] for number in listing.labels]


def _parent_of_classes(listing: Listing) -> str:
    """The folder, below the root, in which the class folders lie."""
    parents = {os.path.dirname(os.path.dirname(name)) for name in listing.names}
    if len(parents) > 1:
        raise DataError(
            f"data {listing.root}: expected all class folders side by side, found them in "
            f"{', '.join(sorted(parents)[:3])}; name one of these folders (or --split)"
        )
    return parents.pop()


def _refuse_empty_folders(listing: Listing, parent: str) -> None:
    """timm does not see a folder without images, so the classes after it would get smaller labels."""
    with os.scandir(os.path.join(listing.root, parent)) as entries:
        there = {entry.name for entry in entries if entry.is_dir()}
    empty = sorted(name for name in there - set(listing.folders) if not name.startswith("."))
    if empty:
        raise DataError(
            f"data {listing.root}: expected images in every class folder, found none in "
            f"{', '.join(empty[:5])}; fill or remove it"
        )
