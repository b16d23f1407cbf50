"""TODO."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from ..config import ModelSpec
from ..data.source import Images, Item, Source
from ..defenses.contract import Verdict
from ..defenses.patchcleanser.algorithms import Inference
from ..defenses.patchcleanser.defense import PatchCleanser
from ..geometry.masks import MaskSet
from ..records.manifest import manifest
from ..records.schema import RECORDS, Record
from ..records.store import Store
from ..runtime.devices import environment, precision_of
from ..runtime.progress import progress_bar
from ..views.network import LARGE, fastest_batch_size, usable_precision
from .blocks import _examine_blocks, _look, _sha256, blocks_of
from .experiment import _experiment, _network_of


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
        network: ``Sequential(Normalize, network)`` as :func:`certipatch.models.build` gives it; moved to the
            device.
        data: how the data set is called in tables; trained: the configuration of the training run, if any.
        batch_size, compile, shared_prefix: as of :class:`PatchCleanser`. None: as the run that is resumed, or
            else
            what is fastest: in a large run both, with the batch size that a quick trial finds best, in a
            small one neither. They change rounding only; the manifest states them.
        inference: as of :class:`PatchCleanser`; part of the experiment.
        shard: (i, n): only the i-th of n parts, 1 <= i <= n, with files of its own. Parts need no
            communication, may run in any order and anywhere, and have the records that one process would
            write.

    Raises:
        SoundnessError: a premise of the certificate fails. RecordsError: ``out`` cannot be used.
    """
    model = network.to(fabric.device).eval()
    name = "" if shard == (1, 1) else f"{shard[0]}-of-{shard[1]}"
    precision = usable_precision(model, masks, precision_of(fabric))
    large = (
        len(source) * len(masks) * (len(masks) + 1) / 2 * masks.image_size[0] * masks.image_size[1] >= LARGE
    )
    earlier = _network_of(out, name)
    defense = PatchCleanser(
        model,
        masks,
        batch_size=batch_size
        or earlier.get("batch_size")
        or (fastest_batch_size(model, masks, precision) if large else None),
        exhaustive=exhaustive,
        inference=inference,
        precision=precision,
        compile=earlier.get("compiled", large) if compile is None else compile,
        shared_prefix=earlier.get("shared_prefix", large) or False
        if shared_prefix is None
        else shared_prefix,
    )
    experiment = {
        **_experiment(network, spec, source, defense, trained, fabric),
        "exhaustive": exhaustive,
        **(
            {"inference": inference} if inference != "double-masking" else {}
        ),  # as runs from before there was a choice
    }
    about = {
        **manifest("certify", experiment, network=defense.network.describe(), **environment(fabric)),
        "data": data,
    }
    blocks = blocks_of(len(source), shard)
    with (
        Store(out, about, RECORDS, shard=name, resume=resume) as store,
        progress_bar(sum(map(len, blocks)), f"certify {masks.name} {name}".strip()) as progress,
    ):
        examine = partial(_look, defense.certify, _record, fabric.device)
        _examine_blocks(
            examine,
            Record,
            Images(source, spec),
            blocks,
            store,
            progress,
            "certified",
            lambda record: record.certified,
        )
        store.finish()


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
