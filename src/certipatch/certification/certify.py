"""Certify a data set with any defense: one record an image, resumable, in one process or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from ..data.source import Images, Source
from ..geometry.masks import MaskSet
from ..models.runs import Opened
from ..records.manifest import begin_manifest, network_used
from ..records.schema import RECORDS, Line
from ..records.store import Store
from ..runtime.devices import precision_of
from ..runtime.progress import progress_bar
from ..runtime.team import Team
from ..views.network import LARGE
from .blocks import blocks_of, examined, write_blocks
from .experiment import experiment_of
from .methods import Method, check_options, method_of
from .work import Examiner, OnTeam, WayAsked, Work


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
    team: Team | None = None,
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
        team: workers that do it, each on a device of its own, and have the model sent; None: this process.
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
    pixels = len(source) * method.views(masks, **options) * masks.image_size[0] * masks.image_size[1]
    work = Work(
        *(opened, masks, defense, options, precision_of(fabric)),
        asked=way or WayAsked(),
        earlier=network_used(out, name),
        large=pixels >= LARGE,
    )
    here = OnTeam(team, work, source, fabric) if team else Examiner(work, fabric)
    if isinstance(here, OnTeam):
        experiment = experiment_of(opened, source, here.lead, here.lead.device)
    else:
        experiment = experiment_of(opened, source, here.defense, fabric.device.type)
    about = {**begin_manifest(method.kind, experiment, **here.run_on), "data": data}
    blocks = blocks_of(len(source), shard)
    with (
        Store(out, about, RECORDS, shard=name, resume=resume) as store,
        progress_bar(
            sum(map(len, blocks)), f"{method.kind} {_against(method, masks)} {name}".strip()
        ) as progress,
    ):
        write_blocks(_lines(here, source, store), blocks, store, progress, method)
        store.finish()


def _lines(
    here: Examiner | OnTeam, source: Source, store: Store
) -> Callable[[list[range]], Iterator[list[Line]]]:
    """What finds the lines of blocks, in order: this process, or a team."""
    if isinstance(here, OnTeam):
        return partial(here.lines, store=store)
    return partial(examined, here.look, Images(source, here.work.opened.spec))


def _against(method: Method, masks: MaskSet) -> str:
    """What is certified against, for the progress: with k where the method has masks."""
    return masks.name if method.masks else masks.threat.file_name
