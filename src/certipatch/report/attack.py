"""The records of an attack, and what they say beside those of the certification; never loads torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RecordsError
from ..geometry.patch import threat_of
from ..records.manifest import read_manifest
from ..records.read import read_attacks
from ..records.schema import AttackRecord
from .certification import Share

BOUNDS = {
    "clean_accuracy": "the defended model is right without a patch",
    "attacked_accuracy": "upper bound: it is still right under every patch that was tried",
    "certified_robust_accuracy": "lower bound: it is right under every patch, proven",
}


def summarize_attack(folder: Path) -> dict[str, Any]:
    """The bounds on the accuracy under attack, on the same images, and what the attack was worth.

    ``certified_robust_accuracy`` is what no attack can go below, ``attacked_accuracy`` what this one left;
    ``attackable`` counts the images right without a patch whose clean table leaves a goal open.
    ``certified_undefended_fooled``: certified images on which the patch changed the undefended model's
        answer, so that the defense had something to withstand.
    """
    about, records = read_manifest(folder), read_attacks(folder)
    n, certified = len(records), [record for record in records if record.certified]
    if about["kind"] != "attack" or not records:
        raise RecordsError(
            f"{folder}: expected records of attack, found "
            f"{'none' if about['kind'] == 'attack' else about['kind']}"
        )
    return {
        "folder": str(folder),
        "complete": n == about["experiment"]["images"],
        **threat_of(about["experiment"]["certification"]["masks"]),
        "masks_per_axis": about["experiment"]["certification"]["masks"]["masks_per_axis"],
        "clean_accuracy": Share(
            sum(not record.broken or record.top is not None for record in records), n
        ).to_json(),
        "attacked_accuracy": Share(sum(not record.broken for record in records), n).to_json(),
        "certified_robust_accuracy": Share(len(certified), n).to_json(),
        "certified_broken": sum(record.broken for record in certified),
        "certified_undefended_fooled": sum(record.vanilla_label != record.label for record in certified),
        "attackable": sum(record.ways > 0 for record in records),
        "attempts": sum(record.attempts for record in records),
        "attempts_on_certified": sum(record.attempts for record in certified),
    }


def attack_text(found: dict[str, Any]) -> str:
    """The summary as a person reads it."""
    lines = []
    for name, means in BOUNDS.items():
        lines.append(f"{name:26} {Share(found[name]['count'], found[name]['images'])}  {means}")
    certified, images = found["certified_robust_accuracy"]["count"], found["clean_accuracy"]["images"]
    lines.append(
        f"certified images: {certified} attacked, {found['certified_broken']} broken in "
        f"{found['attempts_on_certified']} attempts; "
        f"the undefended model was fooled on {found['certified_undefended_fooled']} of them"
    )
    tight = found["attacked_accuracy"]["count"] - certified
    lines.append(
        f"other images: {images - certified}, of them {found['attackable']} right without a patch and open "
        f"to an attack; {tight} withstood this one"
    )
    return "\n".join(lines)


ATTACKED = 12  # images beside their patched ones


def _some_attacks(folder: Path) -> list[AttackRecord]:
    """Those images of an attack that are worth a look: broken ones, then certified ones under a patch, then
    others that withstood."""
    records = [record for record in read_attacks(folder) if record.image is not None]
    broken = [record for record in records if record.broken]
    proven = sorted(
        (r for r in records if r.certified), key=lambda r: r.vanilla_label == r.label
    )  # an undefended model that fell first
    rest = [record for record in records if not record.broken and not record.certified]
    return [*broken[: ATTACKED // 2], *proven[: ATTACKED // 3], *rest[: ATTACKED // 6]]
