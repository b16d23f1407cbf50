"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...records.manifest import read_manifest
from ...records.read import digest, read_attacks
from ..attack import BOUNDS, _some_attacks, summarize_attack
from ..certification import Share
from .pictures import patched
from .run import Run


def _attack(folder: Path, runs: list[Run], pictures: dict[str, str], short: dict[str, str]) -> dict[str, Any]:
    found = summarize_attack(folder)
    records = read_attacks(folder)
    manifest = read_manifest(folder)["experiment"]
    of = next((run for run in runs if digest(run.records) == manifest.get("records_sha256")), None)
    names = of.classes if of else []
    clean = {record.index: record for record in of.records} if of else {}

    def name(label: int | None) -> str:
        return "?" if label is None else names[label] if 0 <= label < len(names) else str(label)

    shown = []
    for record in _some_attacks(folder):
        before = clean.get(record.index)
        shown.append(
            {
                "record": record,
                "clean": pictures.get(before.pixels or "") if before else None,
                "patched": patched(folder, record),
                "truth": name(record.label),
                "answer": name(record.defended_label),
                "undefended": name(record.vanilla_label),
            }
        )
    return {
        "folder": str(folder),
        "found": found,
        "shares": {key: Share(found[key]["count"], found[key]["images"]) for key in BOUNDS},
        "run": of.summary.folder if of else None,
        "name": short[of.summary.folder] if of else None,
        "size": manifest["certification"]["masks"]["image_size"],
        "broken": sum(record.broken and record.top is not None for record in records),
        "withstood": sum(not record.broken for record in records),
        "settings": manifest.get("attack"),
        "shown": [one for one in shown if one["patched"]],
    }
