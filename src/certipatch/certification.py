"""Certify a data set: one record an image, resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from . import runtime
from .config import ModelSpec
from .data import Images, Item, Source, as_float
from .defense import PatchCleanser, Verdict
from .errors import ConfigError
from .masks import MaskSet
from .models import weights_sha256
from .records import RECORDS, Record, Store, manifest, read_records

BLOCK = 32


def certify(
    network: nn.Sequential,
    spec: ModelSpec,
    source: Source,
    masks: MaskSet,
    out: Path,
    *,
    fabric: Fabric,
    data: str = "",
    trained: dict[str, Any] | None = None,
    batch_size: int | None = None,
    exhaustive: bool = False,
    shard: tuple[int, int] = (1, 1),
    resume: bool = False,
) -> None:
    """Certify ``source`` into the folder ``out``: ``manifest.json`` and a line of ``records.jsonl`` an image.

    Args:
        network: ``Sequential(Normalize, network)`` as :func:`certipatch.models.build` gives it.
        data: how the data set is called in tables; trained: the configuration of the training run, if any.
        shard: (i, n): only the i-th of n parts, 1 <= i <= n, with files of its own. Parts need no communication,
            may run in any order and anywhere, and have the records that one process would write.

    Raises:
        SoundnessError: a premise of the certificate fails. RecordsError: ``out`` cannot be used.
    """
    model = fabric.setup_module(network).eval()
    defense = PatchCleanser(model, masks, batch_size=batch_size, exhaustive=exhaustive)
    experiment = {
        "model": spec.model_dump(mode="json"),
        "weights_sha256": weights_sha256(network),
        "trained": trained,
        "masks": masks.to_json(),
        "fill": defense.fill.tolist(),
        "data": source.describe(),
        "device": fabric.device.type,
        "precision": runtime.precision(fabric),
        "batch_size": defense.batch_size,
        "block": BLOCK,
        "exhaustive": exhaustive,
    }
    about = {**manifest("certify", experiment, **runtime.environment(fabric)), "data": data}
    blocks = blocks_of(len(source), shard)
    name = "" if shard == (1, 1) else f"{shard[0]}-of-{shard[1]}"
    certified = 0
    with (
        Store(out, about, RECORDS, shard=name, resume=resume) as store,
        runtime.progress_bar(sum(map(len, blocks)), f"certify {masks.name} {name}".strip()) as advance,
    ):

        def progress(records: list[Record], *, resumed: bool = False) -> None:
            nonlocal certified
            certified += sum(record.certified for record in records)
            advance(len(records), "" if resumed else f"certified so far {certified}")

        certify_images(defense, Images(source, spec), blocks, store, device=fabric.device, progress=progress)
        store.finish()


def blocks_of(images: int, shard: tuple[int, int]) -> list[range]:
    """The blocks of consecutive images that a shard certifies: every n-th."""
    number, shards = shard
    if not 1 <= number <= shards:
        raise ConfigError(f"shard {number}/{shards}: expected i/n with 1 <= i <= n")
    return [range(start, min(start + BLOCK, images)) for start in range(0, images, BLOCK)][number - 1 :: shards]


def certify_images(
    defense: PatchCleanser,
    images: Images,
    blocks: list[range],
    store: Store,
    *,
    device: torch.device,
    progress: Callable[..., None],
) -> None:
    """Append a record for each image of ``blocks`` that has none yet.

    Images are examined in blocks of 32 consecutive ones. A block shares its forward passes, so it is always
    computed as a whole: an interrupted run that is resumed, or a shard, computes the very same numbers.
    """
    mine = {index for block in blocks for index in block}
    before = [record for record in read_records(store.folder) if record.index in mine]
    done = {record.index for record in before}
    progress(before, resumed=True)
    for block in blocks:
        missing = [index for index in block if index not in done]
        if missing:
            records = _certify_block(defense, [images[index] for index in block], device)
            new = [record for record in records if record.index in set(missing)]
            store.append(record.model_dump(mode="json") for record in new)
            progress(new)


def _certify_block(defense: PatchCleanser, items: list[Item], device: torch.device) -> list[Record]:
    readable = [item for item in items if item.pixels is not None]
    verdicts: dict[int, Verdict] = {}
    if readable:
        pixels = torch.stack([item.pixels for item in readable if item.pixels is not None]).to(device)
        labels = torch.tensor([item.label for item in readable])
        found = defense.certify(as_float(pixels), labels)
        verdicts = {item.index: verdict for item, verdict in zip(readable, found, strict=True)}
    return [_record(item, verdicts.get(item.index)) for item in items]


def _record(item: Item, verdict: Verdict | None) -> Record:
    if verdict is None or item.pixels is None:
        return Record(
            index=item.index, name=item.name, label=item.label, pixels=None, vanilla_label=None, defended_label=None,
            case=None, certified=False, failing_pair=None, failing_label=None, margin=None, passes=0, error=item.error,
        )  # fmt: skip
    return Record(
        index=item.index,
        name=item.name,
        label=item.label,
        pixels=hashlib.sha256(item.pixels.numpy().tobytes()).hexdigest(),
        vanilla_label=verdict.vanilla_label,
        defended_label=verdict.defended_label,
        case=verdict.case,
        certified=bool(verdict.certified),
        failing_pair=verdict.failing_pair,
        failing_label=verdict.failing_label,
        margin=verdict.margin,
        passes=verdict.passes,
    )
