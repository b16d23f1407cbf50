"""Images of a data set, block by block, to records: read ahead, examined together, written together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ..data.source import Images, Item, as_float, pixels_sha256
from ..defenses.contract import CertifiedDefense, Verdict
from ..errors import ConfigError
from ..records.read import read_folder
from ..records.schema import SCHEMAS, Line, Record
from ..records.store import BLOCK, Store
from ..runtime.progress import Progress, percent
from .methods import Method


def blocks_of(images: int, shard: tuple[int, int]) -> list[range]:
    """The blocks of consecutive images that a shard (i, n) certifies: every n-th from the i-th on."""
    number, shards = shard
    if not 1 <= number <= shards:
        raise ConfigError(f"shard {number}/{shards}: expected i/n with 1 <= i <= n")
    blocks = [range(start, min(start + BLOCK, images)) for start in range(0, images, BLOCK)]
    return blocks[number - 1 :: shards]


Examine = Callable[[list[Item]], list[Line]]


def examined(looks: Sequence[Examine], images: Images, blocks: list[range]) -> Iterator[list[list[Line]]]:
    """What each of some defenses says of each block, which is looked at in this process."""
    for items in _read_ahead(images, blocks):
        yield [look(items) for look in looks]


def write_blocks(
    lines_of: Callable[[list[range]], Iterator[list[list[Line]]]],
    blocks: list[range],
    stores: Sequence[Store],
    progress: Progress,
    method: Method,
) -> None:
    """Append a record for each image of ``blocks`` that has none yet, in their order, to each of some stores,
    and show the share of certificates so far, in the first.

    A block shares its forward passes, so it is always computed as a whole: an interrupted run that is
    resumed, or a shard, computes the very same numbers.

    Args:
        lines_of: finds of each block the lines for each store.
        stores: one for each size of the patch.
    """
    folders = [read_folder(store.folder) for store in stores]
    before = [_of_blocks(folder.records, blocks) for folder in folders]
    done, least = [{record.index for record in records} for records in before], folders[0].manifest.rounding
    kept = _kept(before[0], method, least)
    progress.resume(len(done[0]))

    everywhere = set.intersection(*done)
    for lines in lines_of([block for block in blocks if not everywhere.issuperset(block)]):
        new = [_missing(of_store, known) for of_store, known in zip(lines, done, strict=True)]
        for store, records in zip(stores, new, strict=True):
            store.append(record.model_dump(mode="json") for record in records)
        kept += _kept(new[0], method, least)
        progress.advance(len(new[0]), f"{method.promise} {percent(kept, progress.done + len(new[0]))}")


def _of_blocks(records: Sequence[Any], blocks: list[range]) -> list[Any]:
    mine = {index for block in blocks for index in block}
    return [record for record in records if record.index in mine]


def _kept(records: Sequence[Any], method: Method, least: float) -> int:
    """How many of the records have a certificate of the method."""
    return sum(method.keeps(record, least) for record in records)


def _missing(lines: list[Line], known: set[int]) -> list[Line]:
    return [record for record in lines if record.index not in known]


def _read_ahead(images: Images, blocks: list[range]) -> Iterator[list[Item]]:
    """The images of each block; the next block is read while one is examined."""

    def read(block: range) -> list[Item]:
        return [images[index] for index in block]

    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = [reader.submit(read, block) for block in blocks[:1]]
        for following in [*([block] for block in blocks[1:]), []]:
            coming += [reader.submit(read, block) for block in following]
            if coming:
                yield coming.pop(0).result()


def look(defense: CertifiedDefense, device: torch.device, items: list[Item]) -> list[Line]:
    """The records of some images, of which those that can be read are examined together."""
    readable = [item for item in items if item.pixels is not None]
    found: dict[int, Verdict] = {}
    if readable:
        pixels = torch.stack([item.pixels for item in readable if item.pixels is not None])
        pixels = (pixels.pin_memory() if device.type == "cuda" else pixels).to(device, non_blocking=True)
        labels = torch.tensor([item.label for item in readable])
        verdicts = defense.examine(as_float(pixels), labels)
        found = {item.index: verdict for item, verdict in zip(readable, verdicts, strict=True)}
    schema = SCHEMAS.get(defense.name, Record)
    return [_record(schema, item, found.get(item.index)) for item in items]


def _record(schema: type[Line], item: Item, verdict: Verdict | None) -> Line:
    """What the schema has of an image and of the verdict on it; an unreadable image has no verdict."""
    image: dict[str, Any] = {
        "index": item.index,
        "name": item.name,
        "label": item.label,
        "pixels": None if item.pixels is None else pixels_sha256(item.pixels),
        "error": item.error,
    }
    return schema(**image, **_taken(schema, verdict))


def _taken(schema: type[Line], verdict: Verdict | None) -> dict[str, Any]:
    own = [
        field for field in schema.model_fields if field not in ("index", "name", "label", "pixels", "error")
    ]
    if verdict is None:
        return {**dict.fromkeys(own), **{key: none for key, none in _NOTHING.items() if key in own}}
    every = {
        "vanilla_label": verdict.vanilla_label,
        "defended_label": verdict.defended_label,
        "certified": bool(verdict.certified),
        "margin": verdict.margin,
        "passes": verdict.passes,
        **verdict.detail,
    }
    open_ended = schema.model_config.get("extra") == "allow"
    return every if open_ended else {field: every[field] for field in own}


_NOTHING = {"certified": False, "passes": 0}
