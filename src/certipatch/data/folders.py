"""TODO."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.readers import create_reader

from ..errors import ConfigError, DataError
from .decode import _from_bytes, open_image
from .source import Source


def _folder_or_tar(
    root: str, split: str | None, class_map: str | None, classes: tuple[str, ...] | None
) -> Source:
    if split and os.path.isdir(root):
        if not os.path.isdir(os.path.join(root, split)):
            raise ConfigError(f"split {split!r}: expected a folder {os.path.join(root, split)}, found none")
        root = os.path.join(root, split)
    if class_map:
        classes = _read_class_map(class_map)
    try:
        # timm keeps the list of a large tar beside it as a pickle, and reads the one that it finds there: no.
        reader: Any = create_reader(
            "", root=root, **({"cache_tarinfo": False} if os.path.isfile(root) else {})
        )
    except (RuntimeError, ValueError, tarfile.TarError, OSError) as error:
        raise DataError(
            f"data {root}: expected a folder or .tar with one folder of images a class, found no images "
            f"({' '.join(str(error).split())[:100]})"
        ) from error
    in_tar = hasattr(reader, "root_is_tar")
    if in_tar and not reader.root_is_tar:
        raise DataError(
            f"data {root}: expected one folder a class inside the tar, found tars inside it; unpack it"
        )
    folders = reader.class_name_to_idx if in_tar else reader.class_to_idx
    if in_tar and any(member.issparse() for member, _, _ in reader.samples):
        raise DataError(
            f"data {root}: expected whole files in the tar, found sparse ones; pack it again without --sparse"
        )
    if "" in folders:
        raise DataError(f"data {root}: expected images in one folder a class, found some outside any folder")
    labels = [
        int(sample_label)
        for sample_label in (reader.targets if in_tar else [label for _, label in reader.samples])
    ]
    listed = classes is None
    if classes is None:
        classes = tuple(sorted(folders, key=folders.__getitem__))
    else:
        position = {name: label for label, name in enumerate(classes)}
        unknown = sorted(set(folders) - set(position))
        if unknown:
            raise DataError(
                f"data {root}: folders of classes the model does not know: {', '.join(unknown[:5])}; "
                f"expected some of {', '.join(classes[:5])} ... (or give --class-map)"
            )
        by_folder = {label: position[name] for name, label in folders.items()}
        labels = [by_folder[label] for label in labels]
    names = [reader.filename(i) for i in range(len(labels))]
    parents = {os.path.dirname(os.path.dirname(name)) for name in names}
    if len(parents) > 1:
        raise DataError(
            f"data {root}: expected all class folders side by side, found them in "
            f"{', '.join(sorted(parents)[:3])}; name one of these folders (or --split)"
        )
    if listed and not in_tar:  # timm does not see a folder without images: the classes after it would move up
        there = os.scandir(os.path.join(root, *parents))
        empty = sorted(
            entry.name
            for entry in there
            if entry.is_dir() and entry.name not in folders and not entry.name.startswith(".")
        )
        if empty:
            raise DataError(
                f"data {root}: expected images in every class folder, found none in {', '.join(empty[:5])}; "
                "fill or remove it"
            )

    def read(i: int) -> Image.Image:
        if not in_tar:
            return open_image(reader.samples[i][0])
        # Positioned reads share no file offset, so worker processes cannot disturb each other.
        member = reader.samples[i][0]
        with open(root, "rb") as file:
            file.seek(member.offset_data)
            return _from_bytes(file.read(member.size))

    return Source(classes, names, labels, read)


def _read_class_map(path: str) -> tuple[str, ...]:
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"class map {path}: expected a text file with one class folder a line ({error})"
        ) from error
    for number, name in enumerate(names, start=1):
        if not name or name in names[: number - 1]:
            raise ConfigError(
                f"class map {path}, line {number}: expected one new class folder a line, found {name!r} "
                f"{'again' if name else ''}"
            )
    return tuple(names)
