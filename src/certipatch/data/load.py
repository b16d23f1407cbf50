"""TODO."""

from __future__ import annotations

import os

from ..errors import ConfigError, DataError
from .folders import _folder_or_tar
from .named import TIMM_PREFIXES, _digits, _timm_named
from .source import Source


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
        split: ``train``, ``test`` ...; for a folder the sub-folder of that name, if there is one.
        class_map: text file with one class folder a line; the line number is the label.
        classes: class names of a model; folders are matched by name, so that labels mean the same as in
            training.

    Raises:
        ConfigError: unknown data set or split. DataError: no images, or folders of classes the model lacks.
    """
    if data == "digits":
        source = _digits(split or "train")
    elif data.startswith(TIMM_PREFIXES):
        source = _timm_named(data, split or "train")
    elif os.path.exists(data):
        source = _folder_or_tar(data, split, class_map, classes)
    elif os.sep in data:
        raise ConfigError(f"data {data}: there is no such file or folder")
    else:
        raise ConfigError(
            f"unknown data set {data!r}: expected 'digits', a folder or .tar of class folders, or a timm "
            "name like torch/cifar10"
        )
    if not len(source):
        raise DataError(f"data {data}: expected images, found none")
    if len(source.classes) < 2:
        raise DataError(
            f"data {data}: expected at least 2 classes, found {len(source.classes)} "
            f"({', '.join(source.classes)})"
        )
    return source
