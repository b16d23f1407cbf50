"""The records of an attack, and what they say beside those of the certification; never loads torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..config import Frozen
from ..errors import RecordsError
from ..masks import threat_of
from ..records import Record, first_problem, read_manifest, read_written
from .summary import Share

ATTACKS = "attacks.jsonl"
BOUNDS = {
    "clean_accuracy": "the defended model is right without a patch",
    "attacked_accuracy": "upper bound: it is still right under every patch that was tried",
    "certified_robust_accuracy": "lower bound: it is right under every patch, proven",
}


class AttackRecord(Frozen):
    """The attack on one image: the best attempt, and how many were made. The patch is ``height`` x ``width`` pixels at (``top``, ``left``).

    ``ways``: how many goals the clean table leaves open. ``broken``: the defended model can be made to answer wrongly; without a
    place (``top``, ``left``) it does so on the clean image. ``defended_label`` and ``vanilla_label`` are those under the patch;
    ``image`` is the patched image as the model saw it, ``pixels`` its sha256.
    """

    index: int
    name: str
    label: int
    certified: bool
    ways: int
    broken: bool
    top: int | None = None
    left: int | None = None
    height: int | None = None
    width: int | None = None
    row: int | None = None
    target: int | None = None
    defended_label: int | None = None
    vanilla_label: int | None = None
    attempts: int = 0
    image: str | None = None
    pixels: str | None = None


def digest(records: list[Record]) -> str:
    """sha256 over records in the order of their index, in however many files they lie."""
    return hashlib.sha256("\n".join(record.model_dump_json() for record in records).encode()).hexdigest()


def read_attacks(folder: Path) -> list[AttackRecord]:
    """All records of an attack in the order of their index. Raises RecordsError for a damaged line."""
    records = {}
    for number, line in enumerate(read_written(folder, ATTACKS), start=1):
        try:
            record = AttackRecord.model_validate_json(json.dumps(line))
        except ValidationError as error:
            raise RecordsError(f"{folder / ATTACKS}, line {number}: {first_problem(error)}") from error
        if record.index in records:
            raise RecordsError(f"{folder / ATTACKS}, line {number}: image {record.index} occurs twice; keep one of the lines")
        records[record.index] = record
    return [records[index] for index in sorted(records)]


def summarize(folder: Path) -> dict[str, Any]:
    """The bounds on the accuracy under attack, on the same images, and what the attack was worth.

    ``certified_robust_accuracy`` is what no attack can go below, ``attacked_accuracy`` what this one left; ``attackable`` counts
    the images right without a patch whose clean table leaves a goal open. ``certified_undefended_fooled``: certified images on which the patch
    changed the undefended model's answer, so that the defense had something to withstand.
    """
    about, records = read_manifest(folder), read_attacks(folder)
    n, certified = len(records), [record for record in records if record.certified]
    if about["kind"] != "attack" or not records:
        raise RecordsError(f"{folder}: expected records of attack, found {'none' if about['kind'] == 'attack' else about['kind']}")
    return {
        "folder": str(folder),
        "complete": n == about["experiment"]["images"],
        **threat_of(about["experiment"]["certification"]["masks"]),
        "masks_per_axis": about["experiment"]["certification"]["masks"]["masks_per_axis"],
        "clean_accuracy": Share(sum(not record.broken or record.top is not None for record in records), n).to_json(),
        "attacked_accuracy": Share(sum(not record.broken for record in records), n).to_json(),
        "certified_robust_accuracy": Share(len(certified), n).to_json(),
        "certified_broken": sum(record.broken for record in certified),
        "certified_undefended_fooled": sum(record.vanilla_label != record.label for record in certified),
        "attackable": sum(record.ways > 0 for record in records),
        "attempts": sum(record.attempts for record in records),
        "attempts_on_certified": sum(record.attempts for record in certified),
    }


def text(found: dict[str, Any]) -> str:
    """The summary as a person reads it."""
    lines = []
    for name, means in BOUNDS.items():
        lines.append(f"{name:26} {Share(found[name]['count'], found[name]['images'])}  {means}")
    certified, images = found["certified_robust_accuracy"]["count"], found["clean_accuracy"]["images"]
    lines.append(
        f"certified images: {certified} attacked, {found['certified_broken']} broken in {found['attempts_on_certified']} attempts; "
        f"the undefended model was fooled on {found['certified_undefended_fooled']} of them"
    )
    tight = found["attacked_accuracy"]["count"] - certified
    lines.append(
        f"other images: {images - certified}, of them {found['attackable']} right without a patch and open to an attack; {tight} withstood this one"
    )
    return "\n".join(lines)
