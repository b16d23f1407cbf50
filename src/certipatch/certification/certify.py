"""Certify a data set with any defense: one record an image, resumable, in one process or many."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from ..data.source import Images, Source
from ..geometry.masks import MaskSet
from ..models.runs import Opened
from ..records.manifest import begin_manifest, network_used
from ..records.schema import RECORDS
from ..records.store import Store
from ..runtime.devices import environment, precision_of
from ..runtime.progress import progress_bar
from ..views.network import LARGE, fastest_batch_size, usable_precision
from .blocks import blocks_of, examine_blocks, look
from .experiment import experiment_of
from .methods import Method, Way, check_options, method_of


@dataclass(frozen=True)
class WayAsked:
    """How the network shall be run. None: as in the run that is resumed, or else what is fastest.

    That is: in a large run compiled and with a shared prefix, with the batch size that a quick trial finds
    best; in a small one neither. All of this changes rounding only; the manifest states it.
    """

    batch_size: int | None = None
    compile: bool | None = None
    shared_prefix: bool | None = None


def certify(
    opened: Opened,
    source: Source,
    masks: MaskSet,
    out: Path,
    *,
    fabric: Fabric,
    defense: str = "patchcleanser",
    data: str = "",
    way: WayAsked | None = None,
    shard: tuple[int, int] = (1, 1),
    resume: bool = False,
    **options: Any,
) -> None:
    """Certify ``source`` into the folder ``out``: ``manifest.json`` and a line of ``records.jsonl`` an image.

    Args:
        opened: the model; moved to the device.
        masks: against what, and with which masks.
        defense: a name in :data:`certipatch.certification.methods.METHODS`; with "minority-reports" the
            records are of detection, for every threshold at once.
        data: how the data set is called in tables.
        shard: (i, n): only the i-th of n parts, 1 <= i <= n, with files of its own. Parts need no
            communication, may run in any order and anywhere, and have the records that one process would
            write.
        options: the defense's own, such as ``exhaustive`` and ``inference`` of
            :class:`certipatch.PatchCleanser`, or ``windows`` of ds, smoothed-vit and patchguard.

    Raises:
        SoundnessError: a premise of the certificate fails. RecordsError: ``out`` cannot be used. ConfigError:
        an unknown defense or option.
    """
    method, options = method_of(defense), check_options(defense, options)
    name = "" if shard == (1, 1) else f"{shard[0]}-of-{shard[1]}"
    model = opened.network.to(fabric.device).eval()
    pixels = len(source) * method.views(masks, **options) * masks.image_size[0] * masks.image_size[1]
    earlier = network_used(out, name)
    built = method.build(
        model, masks, _way(way or WayAsked(), earlier, model, masks, fabric, large=pixels >= LARGE), **options
    )
    experiment = experiment_of(opened, source, built, fabric.device.type)
    run_on = {"network": built.describe_network(), **environment(fabric)}
    about = {**begin_manifest(method.kind, experiment, **run_on), "data": data}
    blocks = blocks_of(len(source), shard)
    with (
        Store(out, about, RECORDS, shard=name, resume=resume) as store,
        progress_bar(
            sum(map(len, blocks)), f"{method.kind} {_against(method, masks)} {name}".strip()
        ) as progress,
    ):
        examine = partial(look, built, fabric.device)
        examine_blocks(examine, Images(source, opened.spec), blocks, store, progress, method)
        store.finish()


def _against(method: Method, masks: MaskSet) -> str:
    """What is certified against, for the progress: with k where the method has masks."""
    return masks.name if method.masks else masks.threat.file_name


def _way(
    asked: WayAsked, earlier: dict[str, Any], model: nn.Module, masks: MaskSet, fabric: Fabric, *, large: bool
) -> Way:
    """What was asked for; else what an earlier attempt of the run did; else what is fastest."""
    precision = usable_precision(model, masks, precision_of(fabric))
    batch_size = asked.batch_size or earlier.get("batch_size")
    if batch_size is None and large:
        batch_size = fastest_batch_size(model, masks, precision)
    prefix = asked.shared_prefix
    return Way(
        precision=precision,
        batch_size=batch_size,
        compile=earlier.get("compiled", large) if asked.compile is None else asked.compile,
        shared_prefix=earlier.get("shared_prefix", large) or False if prefix is None else prefix,
    )
