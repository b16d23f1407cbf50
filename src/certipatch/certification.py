"""Certify a data set, or detection on it: one record an image, resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from . import runtime
from .config import ModelSpec
from .data import Images, Item, Source, as_float
from .defense import MaskedClassifier, PatchCleanser, Verdict
from .detection import Detection, MinorityReports
from .errors import ConfigError
from .masks import MaskSet
from .minority_reports import above
from .models import weights_sha256
from .network import LARGE, fastest_batch_size, usable_precision
from .patchcleanser import Inference
from .progress import Progress, progress_bar, share
from .records import RECORDS, DetectionRecord, R, Record, Store, manifest, network_of, read_images, read_manifests

BLOCK = 32
V = TypeVar("V", Verdict, Detection)


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
    inference: Inference = "double-masking",
    compile: bool | None = None,
    shared_prefix: bool | None = None,
    shard: tuple[int, int] = (1, 1),
    resume: bool = False,
) -> None:
    """Certify ``source`` into the folder ``out``: ``manifest.json`` and a line of ``records.jsonl`` an image.

    Args:
        network: ``Sequential(Normalize, network)`` as :func:`certipatch.models.build` gives it; moved to the device.
        data: how the data set is called in tables; trained: the configuration of the training run, if any.
        batch_size, compile, shared_prefix: as of :class:`PatchCleanser`. None: as the run that is resumed, or else
            what is fastest: in a large run both, with the batch size that a quick trial finds best, in a small one neither. They
            change rounding only; the manifest states them.
        inference: as of :class:`PatchCleanser`; part of the experiment.
        shard: (i, n): only the i-th of n parts, 1 <= i <= n, with files of its own. Parts need no communication,
            may run in any order and anywhere, and have the records that one process would write.

    Raises:
        SoundnessError: a premise of the certificate fails. RecordsError: ``out`` cannot be used.
    """
    model = network.to(fabric.device).eval()
    name = "" if shard == (1, 1) else f"{shard[0]}-of-{shard[1]}"
    precision = usable_precision(model, masks, runtime.precision(fabric))
    large = len(source) * len(masks) * (len(masks) + 1) / 2 * masks.image_size[0] * masks.image_size[1] >= LARGE
    earlier = _network_of(out, name)
    defense = PatchCleanser(
        model,
        masks,
        batch_size=batch_size or earlier.get("batch_size") or (fastest_batch_size(model, masks, precision) if large else None),
        exhaustive=exhaustive,
        inference=inference,
        precision=precision,
        compile=earlier.get("compiled", large) if compile is None else compile,
        shared_prefix=earlier.get("shared_prefix", large) or False if shared_prefix is None else shared_prefix,
    )
    experiment = {
        **_experiment(network, spec, source, defense, trained, fabric),
        "exhaustive": exhaustive,
        **({"inference": inference} if inference != "double-masking" else {}),  # as runs from before there was a choice
    }
    about = {**manifest("certify", experiment, network=defense.network.describe(), **runtime.environment(fabric)), "data": data}
    blocks = blocks_of(len(source), shard)
    with (
        Store(out, about, RECORDS, shard=name, resume=resume) as store,
        progress_bar(sum(map(len, blocks)), f"certify {masks.name} {name}".strip()) as progress,
    ):
        examine = partial(_look, defense.certify, _record, fabric.device)
        _examine_blocks(examine, Record, Images(source, spec), blocks, store, progress, "certified", lambda record: record.certified)
        store.finish()


def detect(
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
    compile: bool | None = None,
    resume: bool = False,
) -> None:
    """Examine ``source`` with :class:`MinorityReports` into the folder ``out``, for every threshold at once.

    Arguments and errors are those of :func:`certify`.
    """
    model = network.to(fabric.device).eval()
    precision = usable_precision(model, masks, runtime.precision(fabric))
    large = len(source) * (len(masks) + 1) * masks.image_size[0] * masks.image_size[1] >= LARGE
    earlier = _network_of(out, "")
    detector = MinorityReports(
        model,
        masks,
        threshold=0,  # the records have what is needed for any
        batch_size=batch_size or earlier.get("batch_size") or (fastest_batch_size(model, masks, precision) if large else None),
        precision=precision,
        compile=earlier.get("compiled", large) if compile is None else compile,
    )
    experiment = _experiment(network, spec, source, detector, trained, fabric)
    about = {**manifest("detect", experiment, network=detector.network.describe(), **runtime.environment(fabric)), "data": data}
    with (
        Store(out, about, RECORDS, resume=resume) as store,
        progress_bar(len(source), f"detect {masks.name}") as progress,
    ):
        examine = partial(_look, detector.certify, _detection_record, fabric.device)
        _examine_blocks(
            examine, DetectionRecord, Images(source, spec), blocks_of(len(source), (1, 1)), store, progress,
            "certified detection at threshold 0", lambda record: above(record.agreement, 0),
        )  # fmt: skip
        store.finish()


def _experiment(
    network: nn.Module, spec: ModelSpec, source: Source, defense: MaskedClassifier, trained: dict[str, Any] | None, fabric: Fabric
) -> dict[str, Any]:
    """What can change a result, and is common to all that is certified."""
    return {
        "model": spec.model_dump(mode="json"),
        "weights_sha256": weights_sha256(network),
        "trained": trained,
        "masks": defense.masks.to_json(),
        "fill": defense.fill.tolist(),
        "data": source.describe(),
        "device": fabric.device.type,
        "precision": defense.network.precision,
        "block": BLOCK,
    }


def blocks_of(images: int, shard: tuple[int, int]) -> list[range]:
    """The blocks of consecutive images that a shard certifies: every n-th."""
    number, shards = shard
    if not 1 <= number <= shards:
        raise ConfigError(f"shard {number}/{shards}: expected i/n with 1 <= i <= n")
    return [range(start, min(start + BLOCK, images)) for start in range(0, images, BLOCK)][number - 1 :: shards]


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
        progress.advance(len(new), f"{good} {share(count, looked)}")


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


def _network_of(out: Path, shard: str) -> dict[str, Any]:
    """How the network was run by the attempt that is resumed, if there is one."""
    for path, found in read_manifests(out).items():
        if path.stem.removeprefix("manifest").lstrip("-") == shard:
            return network_of(found, path)
    return {}


def _look(
    certify: Callable[[Tensor, Tensor], list[V]], record: Callable[[Item, V | None], R], device: torch.device, items: list[Item]
) -> list[R]:
    """The records of some images, of which those that can be read are certified together."""
    readable = [item for item in items if item.pixels is not None]
    found: dict[int, V] = {}
    if readable:
        pixels = torch.stack([item.pixels for item in readable if item.pixels is not None])
        pixels = (pixels.pin_memory() if device.type == "cuda" else pixels).to(device, non_blocking=True)
        labels = torch.tensor([item.label for item in readable])
        found = {item.index: one for item, one in zip(readable, certify(as_float(pixels), labels), strict=True)}
    return [record(item, found.get(item.index)) for item in items]


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
        pixels=_sha256(item.pixels),
        vanilla_label=verdict.vanilla_label,
        defended_label=verdict.defended_label,
        case=verdict.case,
        certified=bool(verdict.certified),
        failing_pair=verdict.failing_pair,
        failing_label=verdict.failing_label,
        margin=verdict.margin,
        passes=verdict.passes,
    )


def _detection_record(item: Item, found: Detection | None) -> DetectionRecord:
    if found is None or item.pixels is None:
        return DetectionRecord(
            index=item.index, name=item.name, label=item.label, pixels=None, vanilla_label=None, agreement=None, dissent=None, passes=0,
            error=item.error,
        )  # fmt: skip
    return DetectionRecord(
        index=item.index,
        name=item.name,
        label=item.label,
        pixels=_sha256(item.pixels),
        vanilla_label=found.vanilla_label,
        agreement=found.agreement,
        dissent=found.dissent,
        passes=found.passes,
    )


def _sha256(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
