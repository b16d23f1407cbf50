"""Data sets: from a name or a path to uint8 tensors that the model sees, with every image accounted for.

timm's reader replaces an unreadable image by its neighbour. A certificate must name the image it is about, so
images are decoded here and an unreadable one surfaces as what it is.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image, UnidentifiedImageError
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import SVHN  # type: ignore[import-untyped]

from .config import ModelSpec
from .errors import ConfigError, DataError

TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
DOWNLOADS = Path(os.environ.get("CERTIPATCH_DATA", "~/.cache/certipatch")).expanduser()
NOT_TRAIN = ("test", "val", "valid", "validation", "eval", "evaluation")  # the other half of CIFAR and MNIST
STREAM_LIMIT = 100_000  # images of a stream that are held in memory


@dataclass(frozen=True)
class Source:
    """Images before any transform: a name, a label and a way to open each.

    ``open(i)`` returns a PIL image or raises OSError, ValueError and the like for an unreadable one.
    """

    classes: tuple[str, ...]
    names: Sequence[str]
    labels: Sequence[int]
    open: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """sha256 over the names and labels in order."""
        digest = hashlib.sha256()
        for name, label in zip(self.names, self.labels, strict=True):
            digest.update(f"{name}\0{label}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a manifest says about the data: enough to refuse another, or the same at another resolution."""
        return {"images": len(self), "classes": list(self.classes), "fingerprint": self.fingerprint(), "sample": self.sample()}

    def sample(self) -> str:
        """sha256 over the pixels of eight images, spread over the set."""
        digest = hashlib.sha256()
        some = self.first(8)
        for i in range(len(some)):
            try:
                image = decode(some.open(i))
                digest.update(f"{image.size}".encode() + image.tobytes())
            except UNREADABLE as problem:
                digest.update(why_unreadable(problem).encode())
        return digest.hexdigest()

    def first(self, limit: int | None) -> Source:
        """Only the first ``limit`` images, spread evenly over the whole set so that no class is left out."""
        if limit is None or limit >= len(self):
            return self
        if limit < 1:
            raise ConfigError(f"limit {limit}: expected at least 1 image")
        return self.take([i * len(self) // limit for i in range(limit)])

    def take(self, chosen: Sequence[int]) -> Source:
        """Only the images at these positions, in this order."""
        return Source(self.classes, [self.names[i] for i in chosen], [self.labels[i] for i in chosen], lambda i: self.open(chosen[i]))


@dataclass(frozen=True)
class Item:
    """One image as the model sees it: ``pixels`` (3, H, W) uint8, or None and the reason in ``error``."""

    index: int
    name: str
    label: int
    pixels: Tensor | None
    error: str | None


class Images(Dataset[Item]):
    """A source with the evaluation transform of a model; a map-style data set of :class:`Item`."""

    def __init__(self, source: Source, spec: ModelSpec) -> None:
        self.source, self.transform = source, evaluation_transform(spec)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        name, label = self.source.names[index], self.source.labels[index]
        try:
            pixels, error = self.transform(decode(self.source.open(index))), None
        except UNREADABLE as problem:
            pixels, error = None, why_unreadable(problem)
        return Item(index, name, label, pixels, error)


UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)


def why_unreadable(problem: Exception) -> str:
    """The reason in one line, the same in every run (Pillow's text may hold a memory address)."""
    if isinstance(problem, IsADirectoryError):
        return "a folder, not an image"
    text = "not an image of a known format" if isinstance(problem, UnidentifiedImageError) else " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text}"[:200]


def as_float(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0, 1], the only place where this happens."""
    return pixels.float() / 255


def decode(image: Image.Image) -> Image.Image:
    """Any readable image as 8-bit RGB: grey is repeated, alpha is dropped, palettes resolved, 16 bits scaled to 8."""
    with _by_pillow():
        image.load()
    if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray(np.clip(wide // 257, 0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no stated range; save the image with 8 or 16 bits")
    return image.convert("RGB")


def open_image(path: str | Path) -> Image.Image:
    """Open one file; the bytes are read at once so that no handle stays open."""
    if not os.path.isfile(path) and os.path.exists(path) and not os.path.isdir(path):  # /dev/zero has no end
        raise OSError("not a regular file")
    return _from_bytes(Path(path).read_bytes())


def _from_bytes(data: bytes) -> Image.Image:
    if not data:
        raise OSError("the file is empty")
    with _by_pillow():
        return Image.open(io.BytesIO(data))


@contextmanager
def _by_pillow() -> Iterator[None]:
    """Damaged bytes make Pillow stumble in any way (TypeError, struct.error ...); each is an image that cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except UNREADABLE:
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error


def evaluation_transform(spec: ModelSpec) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform to (3, H, W) uint8: resize, crop, no normalisation (that is in the model)."""
    return timm.data.create_transform(
        (3, *spec.image_size),
        is_training=False,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        interpolation=spec.interpolation,
        normalize=False,
    )


def load_source(data: str, *, split: str | None = None, class_map: str | None = None, classes: tuple[str, ...] | None = None) -> Source:
    """Find the images behind ``--data``.

    Args:
        data: ``digits``; a folder or tar of class folders; or a timm data-set name such as ``torch/cifar10``.
        split: ``train``, ``test`` ...; for a folder the sub-folder of that name, if there is one.
        class_map: text file with one class folder a line; the line number is the label.
        classes: class names of a model; folders are matched by name, so that labels mean the same as in training.

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
            f"unknown data set {data!r}: expected 'digits', a folder or .tar of class folders, or a timm name like torch/cifar10"
        )
    if not len(source):
        raise DataError(f"data {data}: expected images, found none")
    if len(source.classes) < 2:
        raise DataError(f"data {data}: expected at least 2 classes, found {len(source.classes)} ({', '.join(source.classes)})")
    return source


def _digits(split: str) -> Source:
    """scikit-learn's 1,797 handwritten digits (8x8, from UCI): a fixed 1,297 to train on and 500 to test on."""
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


def _folder_or_tar(root: str, split: str | None, class_map: str | None, classes: tuple[str, ...] | None) -> Source:
    if split and os.path.isdir(root):
        if not os.path.isdir(os.path.join(root, split)):
            raise ConfigError(f"split {split!r}: expected a folder {os.path.join(root, split)}, found none")
        root = os.path.join(root, split)
    if class_map:
        classes = _read_class_map(class_map)
    try:
        # timm keeps the list of a large tar beside it as a pickle, and reads the one that it finds there: no.
        reader: Any = create_reader("", root=root, **({"cache_tarinfo": False} if os.path.isfile(root) else {}))
    except (RuntimeError, ValueError, tarfile.TarError, OSError) as error:
        raise DataError(
            f"data {root}: expected a folder or .tar with one folder of images a class, found no images ({' '.join(str(error).split())[:100]})"
        ) from error
    in_tar = hasattr(reader, "root_is_tar")
    if in_tar and not reader.root_is_tar:
        raise DataError(f"data {root}: expected one folder a class inside the tar, found tars inside it; unpack it")
    folders = reader.class_name_to_idx if in_tar else reader.class_to_idx
    if in_tar and any(member.issparse() for member, _, _ in reader.samples):
        raise DataError(f"data {root}: expected whole files in the tar, found sparse ones; pack it again without --sparse")
    if "" in folders:
        raise DataError(f"data {root}: expected images in one folder a class, found some outside any folder")
    labels = [int(sample_label) for sample_label in (reader.targets if in_tar else [label for _, label in reader.samples])]
    listed = classes is None
    if classes is None:
        classes = tuple(sorted(folders, key=folders.__getitem__))
    else:
        position = {name: label for label, name in enumerate(classes)}
        unknown = sorted(set(folders) - set(position))
        if unknown:
            raise DataError(
                f"data {root}: folders of classes the model does not know: {', '.join(unknown[:5])}; expected some of {', '.join(classes[:5])} ... (or give --class-map)"
            )
        by_folder = {label: position[name] for name, label in folders.items()}
        labels = [by_folder[label] for label in labels]
    names = [reader.filename(i) for i in range(len(labels))]
    parents = {os.path.dirname(os.path.dirname(name)) for name in names}
    if len(parents) > 1:
        raise DataError(
            f"data {root}: expected all class folders side by side, found them in {', '.join(sorted(parents)[:3])}; name one of these folders (or --split)"
        )
    if listed and not in_tar:  # timm does not see a folder without images: the classes after it would move up
        there = os.scandir(os.path.join(root, *parents))
        empty = sorted(entry.name for entry in there if entry.is_dir() and entry.name not in folders and not entry.name.startswith("."))
        if empty:
            raise DataError(f"data {root}: expected images in every class folder, found none in {', '.join(empty[:5])}; fill or remove it")

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
        raise ConfigError(f"class map {path}: expected a text file with one class folder a line ({error})") from error
    for number, name in enumerate(names, start=1):
        if not name or name in names[: number - 1]:
            raise ConfigError(
                f"class map {path}, line {number}: expected one new class folder a line, found {name!r} {'again' if name else ''}"
            )
    return tuple(names)


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
        raise ConfigError(f"data {data}, split {split!r}: cannot be had ({' '.join(str(error).split())[:160]})") from error
    if getattr(found, "train", None) is False and split not in NOT_TRAIN:
        raise ConfigError(f"data {data}, split {split!r}: expected train or test")  # timm takes any other word for test
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
                raise DataError(f"data {data}: a stream of more than {STREAM_LIMIT} images cannot be indexed; use hfds/ or a folder")
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


def check_training_classes(train: Source, validation: Source) -> None:
    """Refuse what cannot be trained or judged: other classes in validation, or classes without an image on either side."""
    if validation.classes != train.classes:
        raise DataError(f"validation data: expected the classes {', '.join(train.classes[:5])}, found {', '.join(validation.classes[:5])}")
    for what, source in (("training", train), ("validation", validation)):
        empty = [name for label, name in enumerate(train.classes) if label not in set(source.labels)]
        if empty:
            raise DataError(f"{what} data: expected images of every class, found none of {', '.join(empty[:5])}")


def collate(items: list[Item]) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W) uint8 and (N,) labels for training, which refuses an unreadable image.

    Raises DataError naming the first one.
    """
    for item in items:
        if item.pixels is None:
            raise DataError(f"image {item.name} cannot be read ({item.error}); remove or replace it")
    return torch.stack([item.pixels for item in items if item.pixels is not None]), torch.tensor([item.label for item in items])
