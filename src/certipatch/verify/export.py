"""A folder of ``export`` checked by what lies beside its certificate: graph, runner, masks and numbers.

The certificate itself is a folder of records like any other and is checked as such.
"""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

from ..config import differences, parse_json
from ..errors import brief
from .findings import Finding
from .record import LEAST_MARGIN, is_margin

STATED, MANIFEST, RECORDS = "defended.json", "certificate/manifest.json", "certificate/records.jsonl"


def check_export(folder: Path, runner: str | None = None) -> list[Finding]:
    """What is wrong beside the records of a deployed folder; nothing of another folder.

    ``runner``: the text of the runner that this version writes, which one of the same version must have.
    """
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
        found = [*_files(folder, stated), *_least(stated), *_certificate(folder, stated)]
        ours = None if runner is None else hashlib.sha256(runner.encode()).hexdigest()
        same = stated["versions"]["certipatch"] == metadata.version("certipatch")
        if ours is not None and same and stated["files"]["runner.py"] != ours:
            found.append(Finding("runner.py", "is not what this version writes; read it before you run it"))
        return found
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


def _least(stated: dict[str, Any]) -> list[Finding]:
    """Nothing may count as proven that rounding could turn."""
    least, moved = stated["least"], stated["exported"]["moved"]
    numbers = is_margin(least) and is_margin(moved)
    if numbers and least >= max(LEAST_MARGIN[stated["way"]["precision"]], moved):
        return []
    return [Finding(STATED, f"least is {least!r}: rounding moves margins by as much (moved: {moved!r})")]


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
    proofs = stated["certificate"].get("proven_answers", {})
    if bool(proofs) is not experiment.get("prove", False):
        found.append(Finding(STATED, "its proven_answers are not what was asked for"))
    shares = {**stated["certificate"], **proofs}
    for name, counted in _counts(lines, stated["least"], proofs=bool(proofs)).items():
        share, n = shares[name], len(lines)
        if [share["count"], share["images"], share["share"]] != [counted, n, counted / n]:
            said = f"says {share['count']} of {share['images']} images"
            found.append(Finding(STATED, f"{name} {said}, the records {counted} of {n}"))
    return found


def _counts(lines: list[dict[str, Any]], least: float, *, proofs: bool) -> dict[str, int]:
    """Of how many images each share of a certificate is, by what the records say."""
    found = dict.fromkeys(("vanilla_accuracy", "clean_accuracy", "certified_robust_accuracy"), 0)
    found |= dict.fromkeys(("proven", "wrong", "forgeable") if proofs else (), 0)
    for line in lines:
        wide, right = (line["margin"] or 0.0) >= least, line["defended_label"] == line["label"]
        found["vanilla_accuracy"] += line["vanilla_label"] == line["label"]
        found["clean_accuracy"] += right
        found["certified_robust_accuracy"] += line["certified"] is True and wide
        if proofs and line["error"] is None:
            proven = line["unchangeable"] is True and wide
            found["proven"] += proven
            found["wrong"] += proven and not right
            found["forgeable"] += line["forgeable"] is True or not (wide or line["certified"])
    return found
