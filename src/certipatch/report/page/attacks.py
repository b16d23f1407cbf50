"""What the template says of an attack, and which attacked images it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...records.schema import AttackRecord, Record, digest
from ..attack import BOUNDS
from ..compared import AttackSummary
from ..images import patched
from ..shares import Share
from .shown import Shown

ATTACKED = 12  # images beside their patched ones


def worth_a_look(records: Sequence[AttackRecord]) -> list[AttackRecord]:
    """Some images of an attack: broken ones, then certified ones under a patch, then others that withstood.

    Of the certified ones those come first on which the undefended model fell.
    """
    shown = [record for record in records if record.image is not None]
    broken = [record for record in shown if record.broken]
    proven = sorted((r for r in shown if r.certified), key=lambda r: r.vanilla_label == r.label)
    rest = [record for record in shown if not (record.broken or record.certified)]
    return [*broken[: ATTACKED // 2], *proven[: ATTACKED // 3], *rest[: ATTACKED // 6]]


def attack_of(attack: AttackSummary, runs: Sequence[Shown], pictures: Mapping[str, str]) -> dict[str, Any]:
    """One attack for the template, beside the run that it is on where that is shown."""
    experiment, records = attack.folder.manifest.attack, attack.folder.records
    run = next((run for run in runs if digest(run.records) == experiment.records_sha256), None)
    shown = [_image(attack, record, run, pictures) for record in worth_a_look(records)]
    return {
        "folder": str(attack.folder.path),
        "found": attack.summary,
        "shares": {key: Share(attack.summary[key]["count"], attack.summary[key]["images"]) for key in BOUNDS},
        "run": run,
        "proven": "certificates_as_stated" not in attack.summary,
        "name": run.name if run else None,
        "size": experiment.certification.against.image_size,
        "broken": sum(record.broken and record.top is not None for record in records),
        "withstood": sum(not record.broken for record in records),
        "settings": experiment.attack,
        "shown": [one for one in shown if one["patched"]],
    }


def _image(
    attack: AttackSummary, record: AttackRecord, run: Shown | None, pictures: Mapping[str, str]
) -> dict[str, Any]:
    names = run.class_names if run else []
    before = _record_of(run, record.index) if run else None

    def name(label: int | None) -> str:
        if label is None:
            return "?"
        return names[label] if 0 <= label < len(names) else str(label)

    return {
        "record": record,
        "clean": pictures.get(before.pixels or "") if before else None,
        "patched": patched(attack.folder.path, record),
        "truth": name(record.label),
        "answer": name(record.defended_label),
        "undefended": name(record.vanilla_label),
    }


def _record_of(run: Shown, index: int) -> Record | None:
    return next((record for record in run.records if record.index == index), None)
