"""Images and labels, and the uint8 tensors that the model sees of them, with every image accounted for.

timm's reader replaces an unreadable image by its neighbour. A certificate must name the image it is about, so
images are decoded here, and an unreadable one becomes an :class:`Item` without pixels that says why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..config import ModelSpec
from ..errors import ConfigError, DataError
from .decode import UNREADABLE, decode, why_unreadable
from .pillow import middle

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Images before any transform: the name and label of each, and a way to open it.

    ``open(i)`` returns a PIL image, or raises one of ``decode.UNREADABLE`` for an image that cannot be read.
    It is no lambda: where processes that load images are spawned and not forked, it is sent to them.
    ``remarks`` are lines for the user: what lies among the images and was left out, or is there twice.
    ``encoded(i)`` are the bytes of the file that ``open(i)`` opens, where it is one; it raises the same.
    """

    classes: tuple[str, ...]
    names: Sequence[str]
    labels: Sequence[int]
    open: Callable[[int], Image.Image]
    remarks: tuple[str, ...] = ()
    encoded: Callable[[int], bytes] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """sha256 over the names and labels of all images in their order.

        Each is written as name, NUL, label and newline; or as a line of JSON, if a name of any of them could
        be taken for another way to cut the same text.
        """
        write = _plain_line if all(map(_is_plain, self.names)) else _json_line
        digest = hashlib.sha256()
        for name, label in zip(self.names, self.labels, strict=True):
            digest.update(write(name, label))
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a manifest says about the data.

        It is enough to refuse another data set, and the same one at another resolution.
        """
        return {
            "images": len(self),
            "classes": list(self.classes),
            "fingerprint": self.fingerprint(),
            "sample": self.sample(),
        }

    def sample(self) -> str:
        """sha256 over the pixels of eight images, spread evenly over the set."""
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
        """Only ``limit`` images, spread evenly over the whole set so that no class is left out.

        All of them where ``limit`` is None or more than there are. Raises ConfigError for one below 1.
        """
        if limit is None or limit >= len(self):
            return self
        if limit < 1:
            raise ConfigError(f"limit {limit}: expected at least 1 image")
        return self.take([i * len(self) // limit for i in range(limit)])

    def take(self, chosen: Sequence[int]) -> Source:
        """Only the images at these positions, in this order."""
        return Source(
            self.classes,
            [self.names[i] for i in chosen],
            [self.labels[i] for i in chosen],
            partial(_chosen, self.open, chosen),
            self.remarks,
            None if self.encoded is None else partial(_chosen, self.encoded, chosen),
        )

    def refuse_missing_classes(self, what: str) -> None:
        """Raise DataError if a class has no image; ``what`` is how the data is called there."""
        present = set(self.labels)
        empty = [name for label, name in enumerate(self.classes) if label not in present]
        if empty:
            raise DataError(
                f"{what}: expected images of every class, found none of {', '.join(empty[:5])}"
                f"{' ...' if len(empty) > 5 else ''}"
            )


def _chosen(of: Callable[[int], T], chosen: Sequence[int], i: int) -> T:
    return of(chosen[i])


def _is_plain(name: str) -> bool:
    """Whether a name has no separator, and its bytes are those of no other name."""
    data = name.encode(errors="surrogateescape")
    return not {0, ord("\n")} & set(data) and data.decode(errors="surrogateescape") == name


def _plain_line(name: str, label: int) -> bytes:
    return f"{name}\0{label}\n".encode(errors="surrogateescape")


def _json_line(name: str, label: int) -> bytes:
    return json.dumps([name, label]).encode() + b"\n"


@dataclass(frozen=True)
class Item:
    """One image as the model sees it: ``pixels`` (3, H, W) uint8, or None and the reason in ``error``."""

    index: int
    name: str
    label: int
    pixels: Tensor | None
    error: str | None

    def readable(self) -> Tensor:
        """The pixels; raises DataError for an image that could not be read."""
        if self.pixels is None:
            raise DataError(f"image {self.name} cannot be read ({self.error}); remove or replace it")
        return self.pixels


class Images(Dataset[Item]):
    """A source as a model sees it: a map-style data set of :class:`Item`, in the source's order."""

    def __init__(self, source: Source, spec: ModelSpec) -> None:
        self.source, self.spec, self.transform = source, spec, evaluation_transform(spec)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Item:
        return self.read(index, self.transform)

    def read(self, index: int, transform: Callable[[Image.Image], Tensor]) -> Item:
        """The image as ``transform`` makes (3, H, W) uint8 pixels of it."""
        name, label = self.source.names[index], self.source.labels[index]
        try:
            pixels, error = transform(decode(self.source.open(index))), None
        except UNREADABLE as problem:
            pixels, error = None, why_unreadable(problem)
        return Item(index, name, label, pixels, error)


def as_float(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0, 1]; nothing else turns pixels into the numbers that a model takes."""
    return pixels.float() / 255


def pixels_sha256(pixels: Tensor) -> str:
    """The hash of the pixels (3, H, W) uint8 of an image as the model sees it."""
    return hashlib.sha256(pixels.cpu().numpy().tobytes()).hexdigest()


def evaluation_transform(spec: ModelSpec) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform to (3, H, W) uint8: it resizes and crops.

    It does not normalise; that is the first layer of the model. Of a picture that is much longer than wide
    only the middle is resized, around what the crop takes.
    """
    transform = timm.data.create_transform(
        (3, *spec.image_size),
        is_training=False,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        interpolation=spec.interpolation,
        normalize=False,
    )
    if spec.crop_mode != "center":  # the others do not resize the short side alone
        return cast(Callable[[Image.Image], Tensor], transform)
    return partial(_middle_transformed, transform, spec.image_size)


def _middle_transformed(
    transform: Callable[[Image.Image], Tensor], size: tuple[int, int], image: Image.Image
) -> Tensor:
    return transform(middle(image, size))


def check_training_classes(train: Source, validation: Source) -> None:
    """Raise DataError for data that cannot be trained on or judged by.

    Validation must have the classes of training, and each class an image in both.
    """
    if validation.classes != train.classes:
        raise DataError(
            f"validation data: expected the classes {', '.join(train.classes[:5])}, found "
            f"{', '.join(validation.classes[:5])}"
        )
    train.refuse_missing_classes("training data")
    validation.refuse_missing_classes("validation data")


class Loaded(NamedTuple):
    """A batch of images: one tensor, so that it needs one open file on its way from a process that loads it.

    Attributes:
        indices, labels: of each image in the data set.
        pixels: (N, 3, H, W) uint8; None if one of them could not be read.
        error: of the first that could not be read, the line for the user.
    """

    indices: list[int]
    labels: list[int]
    pixels: Tensor | None
    error: str | None

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) float images in [0, 1] and (N,) int64 labels; nothing waits for the device.

        Raises DataError naming the first image that could not be read.
        """
        if self.pixels is None:
            raise DataError(str(self.error))
        pixels = self.pixels.to(device, non_blocking=True)
        return as_float(pixels), torch.tensor(self.labels).to(device, non_blocking=True)


def stack(items: list[Item]) -> Loaded:
    """One batch of the images, put together where they were loaded."""
    indices, labels = [item.index for item in items], [item.label for item in items]
    try:
        return Loaded(indices, labels, torch.stack([item.readable() for item in items]), None)
    except DataError as error:  # said by the process that trains, in one line
        return Loaded(indices, labels, None, str(error))
