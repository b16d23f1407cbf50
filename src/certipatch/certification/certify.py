"""Certify a data set with any defense: one record an image, resumable, in one process or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from ..data.source import Images, Source
from ..defenses.contract import CertifiedDefense
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
    certify_sizes(
        opened,
        source,
        {out: masks},
        fabric=fabric,
        defense=defense,
        data=data,
        way=way,
        team=team,
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
    team: Team | None = None,
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
    run = _Run(source, fabric, team, method, data, (name, shard), resume)
    shared = method.against is not None and team is None
    groups = [folders] if shared else [{out: masks} for out, masks in folders.items()]
    for group in groups:
        out, masks = next(iter(group.items()))
        pixels = len(source) * method.views(masks, **options) * masks.image_size[0] * masks.image_size[1]
        work = Work(
            *(opened, masks, defense, options, precision_of(fabric)),
            asked=way or WayAsked(),
            earlier=network_used(out, name),
            large=pixels >= LARGE,
        )
        _certify_group(group, work, run)


@dataclass(frozen=True)
class _Run:
    """What is the same for all sizes of the patch; ``part`` is the shard, by name and as (i, n)."""

    source: Source
    fabric: Fabric
    team: Team | None
    method: Method
    data: str
    part: tuple[str, tuple[int, int]]
    resume: bool


def _certify_group(group: dict[Path, MaskSet], work: Work, run: _Run) -> None:
    """Write the records of some sizes of the patch, block by block for all of them."""
    (name, shard), method = run.part, run.method
    here = OnTeam(run.team, work, run.source, run.fabric) if run.team else Examiner(work, run.fabric)
    stated: list[Any] = [here.lead] if isinstance(here, OnTeam) else _defenses(here, group, method)
    device = here.lead.device if isinstance(here, OnTeam) else run.fabric.device.type
    blocks = blocks_of(len(run.source), shard)
    title = " ".join([method.kind, *(_against(method, each) for each in group.values()), name]).strip()
    with ExitStack() as stack:
        stores = []
        for out, one in zip(group, stated, strict=True):
            experiment = experiment_of(work.opened, run.source, one, device)
            about = {**begin_manifest(method.kind, experiment, **here.run_on), "data": run.data}
            stores.append(stack.enter_context(Store(out, about, RECORDS, shard=name, resume=run.resume)))
        progress = stack.enter_context(progress_bar(sum(map(len, blocks)), title))
        if len(group) > 1:
            stack.enter_context(method.remembering(stated[0]))
        lines = _on_team(here, stores[0]) if isinstance(here, OnTeam) else _here(here, stated, run.source)
        write_blocks(lines, blocks, stores, progress, method)
        for store in stores:
            store.finish()


def _defenses(here: Examiner, group: dict[Path, MaskSet], method: Method) -> list[CertifiedDefense]:
    """The defense against the first size of the patch, and the same against the others."""
    first, others = here.defense, [*group.values()][1:]
    return [first, *(method.against(first, masks.threat) for masks in others if method.against)]


Lines = Callable[[list[range]], Iterator[list[list[Line]]]]  # what finds the lines of blocks, in order


def _here(here: Examiner, defenses: Sequence[CertifiedDefense], source: Source) -> Lines:
    """This process."""
    return partial(examined, here.looks(defenses), Images(source, here.work.opened.spec))


def _on_team(here: OnTeam, store: Store) -> Lines:
    """A team, which certifies one size of the patch at a time."""
    return lambda blocks: ([lines] for lines in here.lines(blocks, store))


def _against(method: Method, masks: MaskSet) -> str:
    """What is certified against, for the progress: with k where the method has masks."""
    return masks.name if method.masks else masks.threat.file_name
