"""TODO."""

from __future__ import annotations

from typing import Any, get_args

from ...records.schema import Record
from ..findings import Outcome, failing_pairs, heat, of_classes, outcome
from .run import PAIRS, Run

CLASSES = 12  # of the hardest ones


CASES = ("agreed", "disagreer", "majority", "champion")


def _block(run: Run, name: str, pictures: dict[str, str], shown: list[Record]) -> dict[str, Any]:
    """One run for the script: columns of values, an entry an image."""
    e, records = run.experiment, run.records
    pairs = failing_pairs(records)
    plane = heat(pairs, run.masks, e["masks"]["image_size"])
    hardest = of_classes(records, run.summary.min_margin)
    fill = e.get("fill")
    grey = (
        isinstance(fill, list)
        and len(fill) == 3
        and all(isinstance(part, int | float) and 0 <= part <= 1 for part in fill)
    )
    place = {record.index: number for number, record in enumerate(records)}
    gallery = {name: [place[r.index] for r in group] for name, group in _grouped(shown, run).items()}
    return {
        "name": name,
        "size": e["masks"]["image_size"],
        "fill": "#" + "".join(f"{round(255 * part):02x}" for part in fill) if grey and fill else "#808080",
        "masks": run.masks,
        "classes": run.classes,
        "images": {
            "index": [r.index for r in records],
            "name": [r.name for r in records],
            "label": [r.label for r in records],
            "vanilla": [r.vanilla_label for r in records],
            "defended": [r.defended_label for r in records],
            "case": [None if r.case is None else CASES.index(r.case) for r in records],
            "outcome": [get_args(Outcome).index(outcome(r, run.summary.min_margin)) for r in records],
            "pair": [r.failing_pair for r in records],
            "fails": [r.failing_label for r in records],
            # Of a certificate; between wrong answers a margin says nothing.
            "margin": [
                float(f"{r.margin:.4g}") if r.certified and r.margin is not None else None for r in records
            ],
            "passes": [r.passes for r in records],
            "error": {number: r.error for number, r in enumerate(records) if r.error is not None},
        },
        "picture": {number: r.pixels for number, r in enumerate(records) if r.pixels in pictures},
        "gallery": gallery,
        "pairs": [[*pair, n] for pair, n in pairs[:PAIRS]],
        "failing": sum(n for _, n in pairs),
        "allPairs": len(pairs),
        "once": sum(n == 1 for _, n in pairs),
        "heat": {"rows": plane.rows, "columns": plane.columns, "counts": plane.counts.tolist()},
        "hardest": [
            {
                "label": one.label,
                "images": one.vanilla_accuracy.images,
                "vanilla": one.vanilla_accuracy.count,
                "clean": one.clean_accuracy.count,
                "certified": one.certified_robust_accuracy.count,
                "interval": one.certified_robust_accuracy.interval,
                "wrong": one.wrong,
                "others": one.others,
            }
            for one in hardest[:CLASSES]
        ],
        "allClasses": len(hardest),
    }


def _grouped(shown: list[Record], run: Run) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {"certified": [], "just missed": [], "hopeless": []}
    for record in shown:
        groups[outcome(record, run.summary.min_margin)].append(record)
    return groups
