"""Attack the images of a certification: one record each, resumable; a certified image that breaks stops
everything."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor, nn

from ..config import ModelSpec
from ..data.source import Images, Item, Source, as_float
from ..defenses.contract import Verdict
from ..defenses.patchcleanser.defense import PatchCleanser
from ..errors import RecordsError, SoundnessError
from ..geometry.masks import MaskSet
from ..records.files import write_atomically
from ..records.manifest import manifest, read_manifest
from ..records.read import digest, read_attacks, read_records
from ..records.schema import ATTACKS, AttackRecord, Record
from ..records.store import Store
from ..runtime.devices import derived_seed, environment, precision_of
from ..runtime.progress import percent, progress_bar
from .climb import AttackConfig, Result, attack_images
from .goals import Goal, clean_tables, goals
from .harness import Harness, check_one_patch

PICTURES = "patched"


BLOCK = 32


def attack(
    network: nn.Sequential,
    spec: ModelSpec,
    source: Source,
    masks: MaskSet,
    certified: Path,
    out: Path,
    *,
    fabric: Fabric,
    config: AttackConfig,
    options: dict[str, Any],
    limit: int | None = None,
    resume: bool = False,
) -> None:
    """Attack the images that the records in ``certified`` are of, into ``out``: a manifest,
    ``attacks.jsonl``, the patched images.

    Args:
        network, spec, source, masks, options: those of the certification;
            :func:`certipatch.options.as_certified` compares them, and gives the ``options`` of
            :class:`PatchCleanser`.
        limit: only this many of the images, spread over all.

    Raises:
        SoundnessError: a certified image was broken (the folder that it names has all that is needed to
            replay it), or an image is not the one that was certified. RecordsError: records that are not
            complete, or ``out`` cannot be used. ConfigError: masks
        against two patches.
    """
    check_one_patch(masks)
    about, records = read_manifest(certified), read_records(certified)
    if about["finished"] is None or len(records) != len(source):
        raise RecordsError(
            f"records {certified}: expected one for each of {len(source)} images, found {len(records)}; run "
            "certify --resume"
        )
    chosen = (
        records
        if limit is None or limit >= len(records)
        else [records[i * len(records) // limit] for i in range(limit)]
    )
    defense = PatchCleanser(network.to(fabric.device).eval(), masks, **options)
    defense.check_precision(precision_of(fabric))
    experiment = {
        "certification": about["experiment"],
        "records_sha256": digest(records),
        "attack": config.model_dump(),
        "images": len(chosen),
        "device": fabric.device.type,
        "precision": precision_of(fabric),
    }
    images = Images(source, spec)
    with (
        Store(out, manifest("attack", experiment, **environment(fabric)), ATTACKS, resume=resume) as store,
        progress_bar(len(chosen), f"attack {masks.name}") as progress,
    ):
        before = read_attacks(out)
        done, broken = {record.index for record in before}, sum(record.broken for record in before)
        progress.resume(len(done))
        for start in range(0, len(chosen), BLOCK):
            block = chosen[start : start + BLOCK]
            if all(record.index in done for record in block):
                continue
            items = [_as_certified(images[record.index], record, certified) for record in block]
            with fabric.autocast():  # gradients of the function that is deployed
                found = _attack_block(network, defense, items, block, config, fabric.device)
            new = [
                _save(out, record, result)
                for record, result in zip(block, found, strict=True)
                if record.index not in done
            ]
            _check_certificates(out, items, block, found, {"attack": store.manifest, "certification": about})
            store.append(record.model_dump(mode="json") for record in new)
            broken += sum(record.broken for record in new)
            attacked = progress.done + len(new)
            progress.advance(len(new), f"attacked accuracy {percent(attacked - broken, attacked)}")
        store.finish()


@dataclass(frozen=True)
class Found:
    """What became of one image: the clean answer, the number of goals, and everything that was judged
    (nothing if it was wrong anyway)."""

    clean: Verdict | None
    ways: int = 0
    results: tuple[Result, ...] = ()

    @property
    def best(self) -> Result | None:
        """The attempt that broke the image, or else came nearest to it."""
        return min(
            self.results, key=lambda result: (not result.broken, result.attempt.shortfall), default=None
        )


def _as_certified(item: Item, record: Record, certified: Path) -> Item:
    if (None if item.pixels is None else sha256(item.pixels)) != record.pixels:
        raise SoundnessError(
            f"image {record.index} ({record.name!r}): is not the one that was certified; give the data of "
            f"{certified}"
        )
    return item


def _attack_block(
    network: nn.Module,
    defense: PatchCleanser,
    items: list[Item],
    records: list[Record],
    config: AttackConfig,
    device: torch.device,
) -> list[Found]:
    """Attack those images of a block that the defended model is right on; a block is always attacked as a
    whole."""
    found = [Found(None) for _ in items]
    readable = [a for a, item in enumerate(items) if item.pixels is not None]
    if not readable:
        return found
    pixels = torch.stack([item.pixels for item in items if item.pixels is not None]).to(device)
    labels = torch.tensor([items[a].label for a in readable], device=device)
    for a, verdict in zip(readable, defense.examine(as_float(pixels)), strict=True):
        found[a] = Found(verdict)
    right = [
        b
        for b, a in enumerate(readable)
        if (clean := found[a].clean) and clean.defended_label == items[a].label
    ]
    if not right:
        return found
    pixels, labels, readable = pixels[right], labels[right], [readable[b] for b in right]
    # The table of a certified image is in its certificate: the label throughout.
    ways: dict[int, list[Goal]] = {a: [] for a in readable}
    if uncertain := [b for b, a in enumerate(readable) if not records[a].certified]:
        for b, table in zip(uncertain, clean_tables(defense, as_float(pixels[uncertain])), strict=True):
            ways[readable[b]] = goals(defense.masks, table, int(labels[b]))
    seeds = [derived_seed(config.seed, records[a].index) for a in readable]
    results = attack_images(
        network, Harness(defense, pixels), labels, [ways[a] for a in readable], config, seeds
    )
    for a, judged in zip(readable, results, strict=True):
        found[a] = replace(found[a], ways=len(ways[a]), results=tuple(judged))
    return found


def _save(out: Path, record: Record, found: Found) -> AttackRecord:
    """The record of an attack; the patched image goes into a file of its own."""
    common: dict[str, Any] = {
        "index": record.index,
        "name": record.name,
        "label": record.label,
        "certified": record.certified,
        "ways": found.ways,
    }
    best = found.best
    if best is None:
        answer = found.clean.defended_label if found.clean else None
        vanilla = found.clean.vanilla_label if found.clean else None
        return AttackRecord(**common, broken=True, defended_label=answer, vanilla_label=vanilla)
    name = f"{PICTURES}/{record.index}.png"
    write_png(out / name, best.patched)
    return AttackRecord(
        **common,
        broken=best.broken,
        top=best.attempt.top,
        left=best.attempt.left,
        height=best.attempt.patch_size[0],
        width=best.attempt.patch_size[1],
        row=best.attempt.row,
        target=best.attempt.target,
        defended_label=best.verdict.defended_label,
        vanilla_label=best.verdict.vanilla_label,
        attempts=len(found.results),
        image=name,
        pixels=sha256(best.patched),
    )


def _check_certificates(
    out: Path, items: list[Item], records: list[Record], found: list[Found], manifests: dict[str, Any]
) -> None:
    """Stop if a certified image was broken, with all that is needed to replay it in a folder of its own."""
    for item, record, image in zip(items, records, found, strict=True):
        if not record.certified or (image.best and not image.best.broken):
            continue
        folder = out / f"broken-certificate-{record.index}"
        answer = (
            image.best.verdict.defended_label if image.best else image.clean and image.clean.defended_label
        )
        case: dict[str, Any] = {
            "record": record.model_dump(mode="json"),
            "answer": answer,
            "patch": None,
            **manifests,
        }
        if item.pixels is not None:
            write_png(folder / "clean.png", item.pixels)
        if image.best:
            attempt = image.best.attempt
            case["patch"] = {
                "top": attempt.top,
                "left": attempt.left,
                "row": attempt.row,
                "target": attempt.target,
            }
            write_png(folder / "patch.png", (attempt.content * 255).round().to(torch.uint8))
            write_png(folder / "patched.png", image.best.patched)
        write_atomically(folder / "case.json", json.dumps(case, indent=2).encode())
        margin = "none" if record.margin is None else f"{record.margin:g}"
        raise SoundnessError(
            f"image {record.index} ({record.name!r}): expected the certified answer {record.label}, found "
            f"{answer}; the certificate's margin was {margin}; replay it from {folder}"
        )


def write_png(path: Path, pixels: Tensor) -> None:
    """A (3, h, w) uint8 tensor as a PNG of those very pixels."""
    data = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(data, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data.getvalue())


def sha256(pixels: Tensor) -> str:
    return hashlib.sha256(pixels.cpu().contiguous().numpy().tobytes()).hexdigest()
