"""Certify a data set, or detection on it: one record an image, resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from ..data.source import Images, Item, as_float
from ..defenses.contract import Verdict
from ..defenses.minority_reports.detector import Detection
from ..errors import ConfigError
from ..records.read import read_images
from ..records.schema import R
from ..records.store import Store
from ..runtime.progress import Progress, percent

BLOCK = 32


V = TypeVar("V", Verdict, Detection)


def blocks_of(images: int, shard: tuple[int, int]) -> list[range]:
    """The blocks of consecutive images that a shard certifies: every n-th."""
    number, shards = shard
    if not 1 <= number <= shards:
        raise ConfigError(f"shard {number}/{shards}: expected i/n with 1 <= i <= n")
    return [range(start, min(start + BLOCK, images)) for start in range(0, images, BLOCK)][
        number - 1 :: shards
    ]


def _examine_blocks(
    examine: Callable[[list[Item]], list[R]],
    kind: type[R],
    images: Images,
    blocks: list[range],
    store: Store,
    progress: Progress,
    good: str,
    is_good: Callable[[R], bool],
) -> None:
    """Append a record for each image of ``blocks`` that has none yet, and show the share of good ones so far.

    Images are examined in blocks of 32 consecutive ones. A block shares its forward passes, so it is always
    computed as a whole: an interrupted run that is resumed, or a shard, computes the very same numbers.
    """
    mine = {index for block in blocks for index in block}
    before = [record for record in read_images(store.folder, kind) if record.index in mine]
    done = {record.index for record in before}
    count = sum(map(is_good, before))
    progress.resume(len(before))
    left = [block for block in blocks if not done.issuperset(block)]

    for items in _read_ahead(images, left):
        new = [record for record in examine(items) if record.index not in done]
        store.append(record.model_dump(mode="json") for record in new)
        count += sum(map(is_good, new))
        looked = progress.done + len(new)
        progress.advance(len(new), f"{good} {percent(count, looked)}")


def _read_ahead(images: Images, blocks: list[range]) -> Iterator[list[Item]]:
    """The images of each block, read while the block before is examined."""

    def read(block: range) -> list[Item]:
        return [images[index] for index in block]

    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = [reader.submit(read, block) for block in blocks[:1]]
        for following in [*([block] for block in blocks[1:]), []]:
            coming += [reader.submit(read, block) for block in following]
            if coming:
                yield coming.pop(0).result()


def _look(
    certify: Callable[[Tensor, Tensor], list[V]],
    record: Callable[[Item, V | None], R],
    device: torch.device,
    items: list[Item],
) -> list[R]:
    """The records of some images, of which those that can be read are certified together."""
    readable = [item for item in items if item.pixels is not None]
    found: dict[int, V] = {}
    if readable:
        pixels = torch.stack([item.pixels for item in readable if item.pixels is not None])
        pixels = (pixels.pin_memory() if device.type == "cuda" else pixels).to(device, non_blocking=True)
        labels = torch.tensor([item.label for item in readable])
        found = {
            item.index: one for item, one in zip(readable, certify(as_float(pixels), labels), strict=True)
        }
    return [record(item, found.get(item.index)) for item in items]


def _sha256(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
