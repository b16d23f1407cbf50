"""TODO."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image
from torch.utils.data import IterableDataset
from torchvision.datasets import SVHN  # type: ignore[import-untyped]

from ..errors import ConfigError, DataError
from .decode import _from_bytes
from .source import Source

TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")


DOWNLOADS = Path(os.environ.get("CERTIPATCH_DATA", "~/.cache/certipatch")).expanduser()


NOT_TRAIN = ("test", "val", "valid", "validation", "eval", "evaluation")  # the other half of CIFAR and MNIST


STREAM_LIMIT = 100_000  # images of a stream that are held in memory


def _digits(split: str) -> Source:
    """scikit-learn's 1,797 handwritten digits (8x8, from UCI): a fixed 1,297 to train on and 500 to test
    on."""
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
        lambda i: Image.fromarray(grey[chosen[i]]),
    )


def _timm_named(data: str, split: str) -> Source:
    """A data set that timm knows by name; it is downloaded where its library does that."""
    # wds/PATH: the shards (and their _info.json) are in the folder PATH; other libraries know where data is.
    root = data.removeprefix("wds/") if data.startswith("wds/") else str(DOWNLOADS)
    try:
        if data.lower() == "torch/svhn":
            found: Any = _svhn(root, split)
        else:
            found = timm.data.create_dataset(data, root=root, split=split, download=True)
    except (AssertionError, ValueError, RuntimeError, OSError, ImportError, TypeError, LookupError) as error:
        raise ConfigError(
            f"data {data}, split {split!r}: cannot be had ({' '.join(str(error).split())[:160]})"
        ) from error
    if getattr(found, "train", None) is False and split not in NOT_TRAIN:
        raise ConfigError(
            f"data {data}, split {split!r}: expected train or test"
        )  # timm takes any other word for test
    if isinstance(found, IterableDataset):
        return _held_in_memory(data, split, found)
    reader = getattr(found, "reader", None)
    if reader is not None:  # hfds: the reader gives undecoded files
        classes = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
        labels = [int(label) for label in reader.iter_targets()]

        def read(i: int) -> Image.Image:
            with reader[i][0] as file:
                return _from_bytes(file.read())
    else:
        classes, labels = list(getattr(found, "classes", [])), [int(label) for label in found.targets]

        def read(i: int) -> Image.Image:
            return found[i][0]

    names = tuple(map(str, classes)) if classes else tuple(str(c) for c in range(max(labels) + 1))
    return Source(names, [f"{data}/{split}/{i}" for i in range(len(labels))], labels, read)


def _svhn(root: str, split: str) -> Any:
    """Street View House Numbers, which timm's torch/ lacks, with the attributes of its neighbours there."""
    found = SVHN(root, split=split, download=True)
    found.targets, found.classes = found.labels, list("0123456789")
    return found


def _held_in_memory(data: str, split: str, stream: Any) -> Source:
    """A stream (wds, tfds, hfids) has no index: its decoded images are held, in the order in which they came.

    timm's readers of streams drop what they cannot read and only log it; here that is an error.
    """
    images, labels, dropped = [], [], _Warnings()
    logger = logging.getLogger("timm.data.readers")
    logger.addHandler(dropped)
    try:
        for image, label in stream:
            images.append(image)
            labels.append(int(label))
            if len(images) > STREAM_LIMIT:
                raise DataError(
                    f"data {data}: a stream of more than {STREAM_LIMIT} images cannot be indexed; use hfds/ "
                    "or a folder"
                )
    finally:
        logger.removeHandler(dropped)
    if dropped.messages:
        raise DataError(f"data {data}: a sample cannot be read ({dropped.messages[0]}); remove or replace it")
    classes = tuple(str(c) for c in range(max(labels, default=-1) + 1))
    return Source(classes, [f"{data}/{split}/{i}" for i in range(len(labels))], labels, images.__getitem__)


class _Warnings(logging.Handler):
    """Keeps what a library logs as a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(" ".join(record.getMessage().split())[:160])
