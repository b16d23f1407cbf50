"""Attack the images of a certification: one record each, resumable; a certified image that breaks stops
everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from ..data.source import Images, Item, Source, as_float, pixels_sha256
from ..defenses.contract import CertifiedDefense, check_precision
from ..defenses.patchcleanser.defense import PatchCleanser
from ..errors import ConfigError, RecordsError, SoundnessError
from ..models.runs import Opened
from ..records.manifest import begin_manifest
from ..records.read import Folder, read_folder
from ..records.schema import ATTACKS, AttackRecord, Record, digest
from ..records.store import BLOCK, Store
from ..runtime.devices import derived_seed, environment, precision_of
from ..runtime.progress import percent, progress_bar
from .climb import AttackConfig, attack_images
from .found import Found, check_certificate, save
from .goals import Goal, clean_tables, goals
from .harness import Harness, check_one_patch
from .places import attack_places
from .windows import attack_windows, by_windows

Records = Sequence[Record]


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
) -> None:
    """Attack the images of a certification, into ``out``: a manifest, ``attacks.jsonl``, the patched images.

    Args:
        opened, source: the model and the images that were certified.
        defense: as :func:`certipatch.certification.restore.restore` gives it back from the certification.
        certified: the manifest and the records of the certification.
        limit: only this many of the images, spread over all.

    Raises:
        SoundnessError: a certified image was broken (the folder that it names has all that is needed to
            replay it), or an image is not the one that was certified.
        RecordsError: records that are not complete, or ``out`` cannot be used.
        ConfigError: a defense against two patches.
    """
    check_one_patch(defense.threat)
    check_precision(defense, precision_of(fabric))
    chosen = _chosen(certified, len(source), limit)
    experiment = {
        "certification": certified.manifest.stated,
        "records_sha256": digest(certified.records),
        "attack": config.model_dump(),
        "images": len(chosen),
        "device": fabric.device.type,
        "precision": precision_of(fabric),
    }
    about = begin_manifest("attack", experiment, network=defense.describe_network(), **environment(fabric))
    images = Images(source, opened.spec)
    with (
        Store(out, about, ATTACKS, resume=resume) as store,
        progress_bar(len(chosen), f"attack {_against(defense)}") as progress,
    ):
        before = read_folder(out).records
        done, broken = {record.index for record in before}, sum(record.broken for record in before)
        progress.resume(len(done))
        manifests = {"attack": store.manifest, "certification": certified.manifest.written}
        for block in _blocks(chosen, done):
            items = [_as_certified(images[record.index], record, certified.path) for record in block]
            with fabric.autocast():  # gradients of the function that is deployed
                found = _attack_block(opened, defense, items, block, config)
            new = _saved(out, items, block, found, manifests, done)
            store.append(record.model_dump(mode="json") for record in new)
            broken += sum(record.broken for record in new)
            attacked = progress.done + len(new)
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


def _as_certified(item: Item, record: Record, certified: Path) -> Item:
    """The image. Raises SoundnessError if its pixels or its label are not those that were certified."""
    pixels = None if item.pixels is None else pixels_sha256(item.pixels)
    if (pixels, item.label) != (record.pixels, record.label):
        raise SoundnessError(
            f"image {record.index} ({record.name!r}): is not the one that was certified; give the data of "
            f"{certified}"
        )
    return item


def _attack_block(
    opened: Opened, defense: CertifiedDefense, items: list[Item], records: Records, config: AttackConfig
) -> list[Found]:
    """Attack those images of a block that the defended model is right on; a block is always attacked as a
    whole."""
    found = _clean_answers(opened, defense, items)
    right = [a for a, one in enumerate(found) if one.clean and one.clean.defended_label == items[a].label]
    if not right:
        return found
    device = next(opened.network.parameters()).device
    pixels = torch.stack([items[a].readable() for a in right]).to(device)
    labels = torch.tensor([items[a].label for a in right], device=device)
    if by_windows(defense):
        seeds = [derived_seed(config.seed, records[a].index) for a in right]
        attacked = attack_windows(Harness(defense, pixels), labels, config, seeds)
        for a, (open_at, judged) in zip(right, attacked, strict=True):
            found[a] = replace(found[a], ways=open_at, results=tuple(judged))
        return found
    if not isinstance(defense, PatchCleanser):
        raise ConfigError(f"attack: expected a defense that it knows, found {defense.name}")
    ways = _open_ways(defense, pixels, labels, [records[a].certified for a in right])
    seeds = [derived_seed(config.seed, records[a].index) for a in right]
    results = attack_images(opened.network, Harness(defense, pixels), labels, ways, config, seeds)
    for a, open_ways, judged in zip(right, ways, results, strict=True):
        found[a] = replace(found[a], ways=len(open_ways), results=tuple(judged))
    by_place = [(records[a].index, getattr(records[a], "proven", None) or "") for a in right]
    if by_place[0][1]:
        at_places = attack_places(opened.network, Harness(defense, pixels), labels, ways, config, by_place)
        for a, one in zip(right, at_places, strict=True):
            found[a] = replace(found[a], places=one)
    return found


def _clean_answers(opened: Opened, defense: CertifiedDefense, items: list[Item]) -> list[Found]:
    """What the defended model answers on the clean images; nothing for those that cannot be read."""
    readable = [a for a, item in enumerate(items) if item.pixels is not None]
    found = [Found(None) for _ in items]
    if readable:
        device = next(opened.network.parameters()).device
        pixels = torch.stack([items[a].readable() for a in readable]).to(device)
        for a, verdict in zip(readable, defense.examine(as_float(pixels)), strict=True):
            found[a] = Found(verdict)
    return found


def _open_ways(
    defense: PatchCleanser, pixels: torch.Tensor, labels: torch.Tensor, certified: list[bool]
) -> list[list[Goal]]:
    """The goals of each image. The table of a certified image is in its certificate: it leaves none."""
    ways: list[list[Goal]] = [[] for _ in certified]
    uncertain = [a for a, proven in enumerate(certified) if not proven]
    if uncertain:
        tables = clean_tables(defense, as_float(pixels[uncertain]))
        for a, table in zip(uncertain, tables, strict=True):
            ways[a] = goals(defense.masks, table, int(labels[a]))
    return ways
