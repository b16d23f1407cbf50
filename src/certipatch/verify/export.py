"""A folder of ``export`` checked by what lies beside its certificate: graph, runner, masks and numbers.

The certificate itself is a folder of records like any other and is checked as such.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..config import differences, parse_json
from ..errors import brief
from .findings import Finding

STATED, MANIFEST, RECORDS = "defended.json", "certificate/manifest.json", "certificate/records.jsonl"


def check_export(folder: Path) -> list[Finding]:
    """What is wrong beside the records of a deployed folder; nothing of another folder."""
    path = folder / STATED
    if not path.is_file():
        return []
    try:
        stated = parse_json(path.read_bytes())
        if not isinstance(stated, dict):
            raise TypeError("not an object")
        rest = {key: value for key, value in stated.items() if key != "sha256"}
        digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
        if digest != stated.get("sha256"):
            return [Finding(STATED, "its sha256 is of other entries: it is not what was written")]
        return [*_files(folder, stated), *_certificate(folder, stated)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return [Finding(STATED, f"is damaged ({type(error).__name__}: {brief(error, 100)})")]


def _files(folder: Path, stated: dict[str, Any]) -> list[Finding]:
    found = []
    for name in ("defended.onnx", "runner.py"):
        here = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if here != stated["files"][name]:
            there = stated["files"][name]
            found.append(
                Finding(name, f"is not what was exported: sha256 {there[:12]}..., found {here[:12]}...")
            )
    return found


def _certificate(folder: Path, stated: dict[str, Any]) -> list[Finding]:
    """The certificate must be of this graph under these masks, and its number that of the records."""
    if stated["certificate"] is None:
        return []
    experiment = parse_json((folder / MANIFEST).read_bytes())["experiment"]
    expected = {
        "weights_sha256": stated["files"]["defended.onnx"],
        "model": stated["model"],
        "masks": {**experiment["masks"], **stated["threat"], "windows": stated["windows"]},
        "fill": stated["fill"],
        "inference": stated["way"]["inference"],
        "precision": stated["way"]["precision"],
    }
    usual = {"inference": "double-masking"}
    here = {key: experiment.get(key, usual.get(key)) for key in expected}
    found = [
        Finding(STATED, f"is of another function than its certificate ({what})")
        for what in differences(here, expected)[:3]
    ]
    lines = [parse_json(line) for line in (folder / RECORDS).read_bytes().splitlines()]
    least = stated["least"]
    certified = sum(bool(line["certified"]) and (line["margin"] or 0.0) >= least for line in lines)
    share = stated["certificate"]["certified_robust_accuracy"]
    if (share["count"], share["images"]) != (certified, len(lines)):
        said = f"says {share['count']} of {share['images']} images are certified"
        found.append(Finding(STATED, f"{said}, the records {certified} of {len(lines)}"))
    return found
