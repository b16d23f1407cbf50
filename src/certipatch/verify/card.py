"""The card of a folder for the hub: does it say what the records beside it say?"""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose
from pathlib import Path
from typing import Any

import yaml

from ..config import parse_json
from ..errors import brief
from .findings import Finding, Verification

CARD = "README.md"


def check_card(folder: Path, checked: Sequence[Verification]) -> list[Finding]:
    """Where the card differs from the certificates that were checked; nothing of a folder without both."""
    path, certificates = folder / CARD, folder / "certificates"
    if not (path.is_file() and certificates.is_dir()):
        return []
    try:
        text = path.read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---\n")[1])
        results = head["model-index"][0]["results"]
        stated = [(each["dataset"]["args"], metric) for each in results for metric in each["metrics"]]
        counts = {Path(one.folder).name: _counts(one) for one in checked}
        found = [what for args, metric in stated for what in _flaws(args, metric, counts, text)]
        said = {args["certificate"] for args, _ in stated}
        found += [f"says nothing of certificates/{name}" for name in counts if name not in said]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, yaml.YAMLError) as error:
        found = [f"is damaged ({type(error).__name__}: {brief(error, 100)})"]
    return [Finding(CARD, what) for what in found]


def _counts(checked: Verification) -> dict[str, tuple[int, int]]:
    """How many images of how many, by measure, as the records say it."""
    lines = [
        parse_json(line)
        for path in sorted(Path(checked.folder).glob("records*.jsonl"))
        for line in path.read_bytes().splitlines()
    ]
    right = {
        name: sum(line[field] == line["label"] for line in lines)
        for name, field in (("vanilla_accuracy", "vanilla_label"), ("clean_accuracy", "defended_label"))
    }
    every = {**right, "certified_robust_accuracy": checked.certified}
    return {name: (count, len(lines)) for name, count in every.items()}


def _flaws(args: Any, metric: Any, counts: dict[str, dict[str, tuple[int, int]]], text: str) -> list[str]:
    name, measure, value = args["certificate"], metric["type"], metric["value"]
    if name not in counts or measure not in counts[name]:
        return [f"states {measure} of certificates/{name}, of which there is none"]
    count, images = counts[name][measure]
    where = f"{measure} of certificates/{name}"
    if args["images"] != images or not isclose(value, count / images, rel_tol=1e-9, abs_tol=1e-12):
        return [f"says {where} is {value} of {args['images']} images, the records {count} of {images}"]
    rows = [row for row in text.splitlines() if row.startswith(f"| `{name}` |")]
    if not any(f"({count}/{images};" in row for row in rows):
        return [f"its table does not say {count}/{images} for {where}"]
    return []
