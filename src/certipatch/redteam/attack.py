"""Attack the images of a certification: one record each, resumable; a certified image that breaks stops
everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from ..data.source import Images, Item, Source
from ..defenses.contract import CertifiedDefense, check_precision
from ..defenses.patchcleanser.defense import PatchCleanser
from ..errors import RecordsError
from ..models.runs import Opened
from ..records.manifest import begin_manifest
from ..records.read import Folder, read_folder
from ..records.schema import ATTACKS, AttackRecord, digest
from ..records.store import BLOCK, Store
from ..runtime.devices import precision_of
from ..runtime.progress import percent, progress_bar
from ..runtime.team import Team
from .climb import AttackConfig
from .found import Found, check_certificate, save
from .harness import check_one_patch
from .work import Attacked, Attacker, AttackersOnTeam, Records


def attack(
    opened: Opened,
    source: Source,
    defense: CertifiedDefense,
    certified: Folder[Any],
    out: Path,
    *,
    fabric: Fabric,
    config: AttackConfig,
    limit: int | None = None,
    resume: bool = False,
    team: Team | None = None,
    restored: Callable[[Opened, Fabric], CertifiedDefense] | None = None,
) -> None:
    """Attack the images of a certification, into ``out``: a manifest, ``attacks.jsonl``, the patched images.

    Args:
        opened, source: the model and the images that were certified.
        defense: as :func:`certipatch.certification.restore.restore` gives it back from the certification.
        certified: the manifest and the records of the certification.
        limit: only this many of the images, spread over all.
        team: workers that do it, each on a device of its own; None: this process.
        restored: with a team, (the model, fabric) -> the defense on the device of a worker.

    Raises:
        SoundnessError: a certified image was broken (the folder that it names has all that is needed to
            replay it), or an image is not the one that was certified.
        RecordsError: records that are not complete, or ``out`` cannot be used.
        ConfigError: a defense against two patches.
    """
    check_one_patch(defense.threat)
    check_precision(defense, precision_of(fabric))
    chosen = _chosen(certified, len(source), limit)
    alone = Attacker(opened, defense, certified.path, config, fabric)
    here = AttackersOnTeam(team, alone, source, restored) if team and restored else alone
    experiment = {
        "certification": certified.manifest.stated,
        "records_sha256": digest(certified.records),
        "attack": config.model_dump(),
        "images": len(chosen),
        "device": here.device,
        "precision": precision_of(fabric),
    }
    about = begin_manifest("attack", experiment, **here.run_on)
    with (
        Store(out, about, ATTACKS, resume=resume) as store,
        progress_bar(len(chosen), f"attack {_against(defense)}") as progress,
    ):
        before = read_folder(out).records
        done, broken = {record.index for record in before}, sum(record.broken for record in before)
        progress.resume(len(done))
        manifests = {"attack": store.manifest, "certification": certified.manifest.written}
        for block, (items, found) in _attacked(here, _blocks(chosen, done), source, store):
            new = _saved(out, items, block, found, manifests, done)
            store.append(record.model_dump(mode="json") for record in new)
            broken, attacked = broken + sum(one.broken for one in new), progress.done + len(new)
            progress.advance(len(new), f"attacked accuracy {percent(attacked - broken, attacked)}")
        store.finish()


def _against(defense: CertifiedDefense) -> str:
    """What is attacked, for the progress."""
    return defense.masks.name if isinstance(defense, PatchCleanser) else defense.threat.file_name


def _saved(
    out: Path,
    items: list[Item],
    block: Records,
    found: list[Found],
    manifests: dict[str, Any],
    done: set[int],
) -> list[AttackRecord]:
    """The records of those images of a block that have none yet.

    The patched images are on disk before a certificate that broke stops the run.
    """
    results = list(zip(block, found, strict=True))
    new = [save(out, record, result) for record, result in results if record.index not in done]
    for item, (record, result) in zip(items, results, strict=True):
        check_certificate(out, item, record, result, manifests)
    return new


def _chosen(certified: Folder[Any], images: int, limit: int | None) -> Records:
    """The records of the images to attack, spread over all."""
    records = certified.records
    if certified.manifest.finished is None or len(records) != images:
        raise RecordsError(
            f"records {certified.path}: expected one for each of {images} images, found {len(records)}; run "
            "certify --resume"
        )
    if limit is None or limit >= len(records):
        return records
    return [records[i * len(records) // limit] for i in range(limit)]


def _blocks(chosen: Records, done: set[int]) -> list[Records]:
    """The blocks in which some image is left to attack."""
    blocks = [chosen[start : start + BLOCK] for start in range(0, len(chosen), BLOCK)]
    return [block for block in blocks if not done.issuperset(record.index for record in block)]


def _attacked(
    here: Attacker | AttackersOnTeam, blocks: list[Records], source: Source, store: Store
) -> Iterator[tuple[Records, Attacked]]:
    """Each block with its images and what became of them, in order."""
    if isinstance(here, AttackersOnTeam):
        return zip(blocks, here.attack(blocks, store), strict=True)
    images = Images(source, here.opened.spec)
    return ((block, here.attack(block, [images[record.index] for record in block])) for block in blocks)
