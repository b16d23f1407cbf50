"""TODO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...geometry.patch import threat_of, threat_text
from ...records.manifest import read_manifests
from ...records.schema import Record
from ..advice import near, rounding
from ..certification import percent_of_image, strategy
from ..findings import outcome
from .run import Run, _dict, _seconds


def _facts(run: Run, name: str) -> dict[str, Any]:
    """One run for the template, under a short name."""
    s, e, environment = run.summary, run.experiment, _dict(run.summary.manifest.get("environment"))
    masks, finished = e["masks"], s.manifest["finished"]
    n, images = len(run.masks), s.certified_robust_accuracy.images
    margins = [r.margin for r in run.records if r.certified and r.margin is not None]
    states = Counter(outcome(r, s.min_margin) for r in run.records)
    return {
        "summary": s,
        "name": name,
        "model": str(e["model"]["arch"]),
        "training": strategy(s.manifest),
        "threat": threat_text(**threat_of(masks)),
        "shapes": threat_text(**{**threat_of(masks), "patches": 1}),
        "patches": masks.get("patches", 1),
        "percent": percent_of_image(masks),
        "image_size": masks["image_size"],
        "k": masks["masks_per_axis"],
        "masks": n,
        "inference": e.get("inference", "double-masking"),
        "images": images,
        "asked": e["data"]["images"],
        "states": states,
        "passes": s.passes / images,
        "all_passes": 1 + n * (n + 1) // 2,
        "seconds": _seconds(s.manifest),
        "smallest_margin": min(margins, default=None),
        "near": near(s, run.records),
        "rounding": rounding(e),
        "data": str(s.manifest.get("data") or "?"),
        "records_sha256": [
            _dict(m["finished"]).get("sha256", "?") for m in read_manifests(Path(s.folder)).values()
        ],
        "finished": _dict(finished).get("at", "not finished"),
        "environment": {
            **environment,
            **{name: _dict(environment.get(name)) for name in ("versions", "network")},
        },
        "experiment": e,
        "started": str(s.manifest.get("started", "?")),
    }


def _answer(runs: list[Run], attacks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The question and the answer of the page, about its first run."""
    if not runs:
        return None
    run, facts = runs[0], _facts(runs[0], runs[0].summary.folder)
    attack = next((a for a in attacks if a["run"] == run.summary.folder), None)
    most = max(other.summary.certified_robust_accuracy.count for other in runs)
    certified = run.summary.certified_robust_accuracy
    return {
        **facts,
        "certified": certified,
        "attack": attack,
        "runs": len(runs),
        "best": len(runs) > 1 and certified.count == most,
    }


def _scale(run: Run, pictures: dict[str, str], shown: list[Record]) -> dict[str, Any]:
    """The threat model, drawn to scale: an image with each patch shape, and one mask over it."""
    masks = run.experiment["masks"]
    height, width = masks["image_size"]
    shapes = [masks["patch_size"], *masks.get("other_patch_sizes", [])]
    image = next((pictures[r.pixels] for r in shown if r.pixels in pictures), None)
    # Each shape in the middle of the first mask that hides it, the shapes side by side as they come.
    patches = []
    for number, (h, w) in enumerate(shapes[:3]):
        at = (number + 1) / (len(shapes[:3]) + 1)
        patches.append((max(0, round(at * height - h / 2)), max(0, round(at * width - w / 2)), h, w))
    top, left, h, w = patches[0]
    cover = next((m for m in run.masks if any(_inside((top, left, h, w), rectangle) for rectangle in m)), [])
    return {
        "height": height,
        "width": width,
        "image": image,
        "patches": patches,
        "mask": cover,
        "more": len(shapes) > 3,
    }


def _inside(patch: Sequence[int], rectangle: Sequence[int]) -> bool:
    (y, x, h, w), (top, left, height, width) = patch, rectangle
    return top <= y and left <= x and y + h <= top + height and x + w <= left + width
