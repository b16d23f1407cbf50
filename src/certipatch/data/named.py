"""Data sets that have a name: scikit-learn's digits, and those that timm knows (``torch/cifar10``).

timm reads some by index and some as a stream. A certificate speaks of images by their number, so a stream is
read to its end and held in memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from torch.utils.data import IterableDataset
from torchvision.datasets import SVHN  # type: ignore[import-untyped]

from ..errors import ConfigError, DataError, MachineError, brief
from .decode import open_bytes
from .source import Source

TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")

# It still begins with "~" where there is no home folder; only what is downloaded needs one.
DOWNLOADS = Path(os.path.expanduser(os.environ.get("CERTIPATCH_DATA", "~/.cache/certipatch")))

NOT_TRAIN = ("test", "val", "valid", "validation", "eval", "evaluation")  # the other half of CIFAR and MNIST

STREAM_LIMIT = 100_000  # images of a stream that are held in memory

# What timm, torchvision and the hub's libraries raise for a data set that they cannot give.
CANNOT_BE_HAD = (AssertionError, ValueError, RuntimeError, OSError, ImportError, TypeError, LookupError)


def digits(split: str) -> Source:
    """scikit-learn's 1,797 handwritten digits (8x8 pixels, from UCI).

    The parts are fixed: ``train`` has 1,297 images, ``test`` the other 500.
    """
    from sklearn.datasets import load_digits

    if split not in ("train", "test"):
        raise ConfigError(f"split {split!r}: digits has train and test")
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = order[:-500] if split == "train" else order[-500:]
    grey = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    return Source(
        tuple("0123456789"),
        [f"digits/{i}" for i in chosen],
        [int(labels[i]) for i in chosen],
        partial(_drawn, grey[chosen]),
    )


def _drawn(grey: Any, i: int) -> Image.Image:
    return Image.fromarray(grey[i])


def timm_named(data: str, split: str) -> Source:
    """A data set that timm knows by name; it is downloaded where its library does that.

    Raises ConfigError for a name or split that cannot be had, DataError for a sample that cannot be read.
    """
    found = _created(data, split)
    if getattr(found, "train", None) is False and split not in NOT_TRAIN:
        # timm takes any word but train for test
        raise ConfigError(f"data {data}, split {split!r}: expected train or test")
    if isinstance(found, IterableDataset):
        return _held_in_memory(data, split, found)
    if getattr(found, "reader", None) is not None:
        return _by_reader(data, split, found.reader)
    labels = [int(label) for label in found.targets]
    classes = _numbered_classes(labels)
    if getattr(found, "classes", None):
        classes = tuple(map(str, found.classes))
    return Source(classes, _names(data, split, labels), labels, partial(_image_of, found))


def _created(data: str, split: str) -> Any:
    # wds/PATH: the shards (and their _info.json) are in the folder PATH; other libraries know where data is.
    root = data.removeprefix("wds/") if data.startswith("wds/") else str(DOWNLOADS)
    if root.startswith("~"):
        raise MachineError(
            f"data {data}: expected a folder for downloads, found no home folder; set CERTIPATCH_DATA"
        )
    create = _svhn if data.lower() == "torch/svhn" else timm.data.create_dataset
    try:
        return create(data, root=root, split=split, download=True)
    except CANNOT_BE_HAD as error:
        raise ConfigError(f"data {data}, split {split!r}: cannot be had ({brief(error, 160)})") from error


def _svhn(_: str, root: str, split: str, download: bool) -> Any:
    """Street View House Numbers, which timm's torch/ lacks, with the attributes of its neighbours there."""
    found = SVHN(root, split=split, download=download)
    found.targets, found.classes = found.labels, list("0123456789")
    return found


def _by_reader(data: str, split: str, reader: Any) -> Source:
    """A data set of the Hugging Face Hub (hfds), whose reader in timm gives undecoded files."""
    labels = [int(label) for label in reader.iter_targets()]
    classes = tuple(map(str, sorted(reader.class_to_idx, key=reader.class_to_idx.get)))

    names = _names(data, split, labels)
    return Source(classes or _numbered_classes(labels), names, labels, partial(_read_by, reader))


def _image_of(found: Any, i: int) -> Image.Image:
    image: Image.Image = found[i][0]
    return image


def _read_by(reader: Any, i: int) -> Image.Image:
    with reader[i][0] as file:
        return open_bytes(file.read())


def _held_in_memory(data: str, split: str, stream: Any) -> Source:
    """A stream (wds, tfds, hfids) has no index: its decoded images are held, in the order in which they came.

    timm's readers of streams drop what they cannot read and only log it; here that is an error.
    """
    images, labels = [], []
    with _warnings_of("timm.data.readers") as dropped:
        for image, label in stream:
            images.append(image)
            labels.append(int(label))
            if len(images) > STREAM_LIMIT:
                raise DataError(
                    f"data {data}: a stream of more than {STREAM_LIMIT} images cannot be indexed; use hfds/ "
                    "or a folder"
                )
    if dropped:
        raise DataError(f"data {data}: a sample cannot be read ({dropped[0]}); remove or replace it")
    return Source(_numbered_classes(labels), _names(data, split, labels), labels, images.__getitem__)


def _names(data: str, split: str, labels: list[int]) -> list[str]:
    return [f"{data}/{split}/{i}" for i in range(len(labels))]


def _numbered_classes(labels: list[int]) -> tuple[str, ...]:
    """Names for the classes of a data set that has none: ``0``, ``1`` ... up to the largest label."""
    return tuple(str(c) for c in range(max(labels, default=-1) + 1))


@contextmanager
def _warnings_of(name: str) -> Iterator[list[str]]:
    """The warnings that a logger and those below it give during the block, each as one line."""
    messages: list[str] = []
    handler = _Warnings(messages)
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


class _Warnings(logging.Handler):
    """Appends what a library logs as a warning to ``messages``."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(" ".join(record.getMessage().split())[:160])
