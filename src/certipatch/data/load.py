"""What ``--data`` means: digits, a data set that timm knows by name, or a folder or tar of images."""

from __future__ import annotations

import os

from ..config import is_path
from ..errors import ConfigError, DataError
from .folders import folder_or_tar
from .named import TIMM_PREFIXES, digits, timm_named
from .source import Source


def judged_split(data: str, split: str | None) -> str | None:
    """The split that a model is judged on: the one asked for, or of digits the test part.

    None leaves the choice to :func:`load_source`.
    """
    return split or ("test" if data == "digits" else None)


def load_source(
    data: str,
    *,
    split: str | None = None,
    class_map: str | None = None,
    classes: tuple[str, ...] | None = None,
) -> Source:
    """Find the images behind ``--data``.

    Args:
        data: ``digits``; a folder or tar of class folders; or a timm data-set name such as ``torch/cifar10``.
        split: ``train``, ``test`` ...; for a folder the sub-folder of that name, if there is one. Without it,
            digits and timm's data sets give their ``train``.
        class_map: text file with one class folder a line; the line number is the label.
        classes: class names of a model; folders are matched by name, so that labels mean the same as in
            training.

    Raises:
        ConfigError: unknown data set or split. DataError: no images, or folders of classes the model lacks.
    """
    source = _find(data, split, class_map, classes)
    if not len(source):
        raise DataError(f"data {data}: expected images, found none")
    if len(source.classes) < 2:
        raise DataError(
            f"data {data}: expected at least 2 classes, found {len(source.classes)} "
            f"({', '.join(source.classes)})"
        )
    return source


def has_name(data: str) -> bool:
    """Whether ``--data`` is a data set with a name, whose classes have one order, and no folder or tar."""
    return data == "digits" or data.startswith(TIMM_PREFIXES)


def _find(data: str, split: str | None, class_map: str | None, classes: tuple[str, ...] | None) -> Source:
    if data == "digits":
        return digits(split or "train")
    if data.startswith(TIMM_PREFIXES):
        return timm_named(data, split or "train")
    if os.path.exists(data):
        return folder_or_tar(data, split=split, class_map=class_map, classes=classes)
    if is_path(data):
        raise ConfigError(f"data {data}: there is no such file or folder")
    raise ConfigError(
        f"unknown data set {data!r}: expected 'digits', a folder or .tar of class folders, or a timm "
        "name like torch/cifar10"
    )
