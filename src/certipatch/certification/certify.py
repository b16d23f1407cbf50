"""Certify a data set with any defense: one record an image, resumable, in one process or many."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from ..data.source import Images, Source
from ..defenses.contract import CertifiedDefense
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
    certify_sizes(
        opened,
        source,
        {out: masks},
        fabric=fabric,
        defense=defense,
        data=data,
        way=way,
        shard=shard,
        resume=resume,
        **options,
    )


def certify_sizes(
    opened: Opened,
    source: Source,
    folders: dict[Path, MaskSet],
    *,
    fabric: Fabric,
    defense: str = "patchcleanser",
    data: str = "",
    way: WayAsked | None = None,
    shard: tuple[int, int] = (1, 1),
    resume: bool = False,
    **options: Any,
) -> None:
    """Certify against several patches, each into a folder of its own, as :func:`certify` does one.

    What the windows of a defense by windows say does not depend on the patch: of such a one the images are
    looked at once for all sizes. Each folder has the records that :func:`certify` would write by itself.
    """
    method, options = method_of(defense), check_options(defense, options)
    name = "" if shard == (1, 1) else f"{shard[0]}-of-{shard[1]}"
    model = opened.network.to(fabric.device).eval()
    groups = [folders] if method.against else [{out: masks} for out, masks in folders.items()]
    for group in groups:
        out, masks = next(iter(group.items()))
        pixels = len(source) * method.views(masks, **options) * masks.image_size[0] * masks.image_size[1]
        how = _way(way or WayAsked(), network_used(out, name), model, masks, fabric, large=pixels >= LARGE)
        first = method.build(model, masks, how, **options)
        others = (
            [method.against(first, each.threat) for each in [*group.values()][1:]] if method.against else []
        )
        title = " ".join([method.kind, *(_against(method, each) for each in group.values()), name]).strip()
        _certify_group(
            dict(zip(group, [first, *others], strict=True)),
            _Run(opened, source, fabric, method, data, (name, shard), resume),
            title,
        )


@dataclass(frozen=True)
class _Run:
    """What is the same for all sizes of the patch; ``part`` is the shard, by name and as (i, n)."""

    opened: Opened
    source: Source
    fabric: Fabric
    method: Method
    data: str
    part: tuple[str, tuple[int, int]]
    resume: bool


def _certify_group(defenses: dict[Path, CertifiedDefense], run: _Run, title: str) -> None:
    """Write the records of some defenses, block by block for all of them."""
    name, shard = run.part
    blocks = blocks_of(len(run.source), shard)
    with ExitStack() as stack:
        parts = []
        for out, built in defenses.items():
            experiment = experiment_of(run.opened, run.source, built, run.fabric.device.type)
            run_on = {"network": built.describe_network(), **environment(run.fabric)}
            about = {**begin_manifest(run.method.kind, experiment, **run_on), "data": run.data}
            store = stack.enter_context(Store(out, about, RECORDS, shard=name, resume=run.resume))
            parts.append((partial(look, built, run.fabric.device), store))
        progress = stack.enter_context(progress_bar(sum(map(len, blocks)), title))
        if len(defenses) > 1:
            stack.enter_context(run.method.remembering(next(iter(defenses.values()))))
        examine_blocks(parts, Images(run.source, run.opened.spec), blocks, progress, run.method)
        for _, store in parts:
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
