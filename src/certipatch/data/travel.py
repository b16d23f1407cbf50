"""Images on another machine: read there by path where that finds the same ones, else sent as files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..config import ModelSpec
from .decode import UNREADABLE, decode, open_bytes, why_unreadable
from .source import Images, Item, Source


@dataclass(frozen=True)
class Block:
    """Some images by their index in a source, and what is sent of them.

    ``sent`` is None where the worker shall read them by itself; else of each image the bytes of its file, or
    the reason for which it cannot be read.
    """

    indices: Sequence[int]
    sent: tuple[bytes | str, ...] | None = None


class Seen:
    """The images of a source as a worker has them.

    Args:
        sample: ``source.sample()`` of the driver; where the worker's is another, it does not see the images.
    """

    def __init__(self, source: Source, spec: ModelSpec, sample: str) -> None:
        self.images = Images(source, spec)
        self.sees = source.sample() == sample

    def items(self, block: Block) -> list[Item] | None:
        """The images of a block; None if they have to be sent, since one cannot be read here."""
        if block.sent is not None:
            return [self._unpacked(*one) for one in zip(block.indices, block.sent, strict=True)]
        if not self.sees:
            return None
        items = [self.images[index] for index in block.indices]
        return None if any(item.error for item in items) else items

    def _unpacked(self, index: int, sent: bytes | str) -> Item:
        source = self.images.source
        if isinstance(sent, str):
            return Item(index, source.names[index], source.labels[index], None, sent)
        opened = Images(replace(source, open=lambda _: open_bytes(sent)), self.images.spec)
        return opened[index]


def packed(source: Source, block: Block) -> Block:
    """The block with its images as encoded bytes."""
    return Block(block.indices, tuple(_packed(source, index) for index in block.indices))


def _packed(source: Source, index: int) -> bytes | str:
    try:
        if source.encoded is not None:
            return source.encoded(index)
        data = io.BytesIO()
        decode(source.open(index)).save(data, "PNG")  # of these very pixels, 8-bit RGB and upright
        return data.getvalue()
    except UNREADABLE as problem:
        return why_unreadable(problem)
