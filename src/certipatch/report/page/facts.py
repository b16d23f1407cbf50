"""What the template says of each run: the question, the answer, and the run in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ...records.schema import Record
from ..advice import near
from ..certification import below_the_margin, in_words, percent_of_image, strategy
from ..findings import outcome
from .shown import Shown


def facts_of(run: Shown) -> dict[str, Any]:
    """One run for the template."""
    summary, experiment = run.summary, run.experiment
    n, threat = len(run.windows), summary.threat
    return {
        **_provenance(run),
        "summary": summary,
        "name": run.name,
        "defense": in_words(experiment),
        "knows_patch_size": experiment.knows_patch_size,
        "windows": experiment.windows_shown,
        "model": experiment.model.arch,
        "training": strategy(experiment),
        "threat": threat.text,
        "shapes": threat.shapes,
        "patches": threat.patches,
        "percent": percent_of_image(experiment),
        "image_size": experiment.against.image_size,
        "k": experiment.masks_per_axis,
        "masks": n,
        "inference": experiment.inference,
        "images": summary.images,
        "asked": experiment.data.images,
        "states": Counter(outcome(record, summary.min_margin) for record in run.records),
        "passes": summary.passes / summary.images,
        "all_passes": 1 + n * (n + 1) // 2,
        "not_counted": below_the_margin(summary),
        "smallest_margin": min(_margins(run.records, summary.min_margin), default=None),
        "near": near(summary),
        "rounding": summary.folder.manifest.rounding,
    }


def _margins(records: Sequence[Record], least: float) -> list[float]:
    return [record.margin for record in records if record.counts(least) and record.margin is not None]


def _provenance(run: Shown) -> dict[str, Any]:
    """Where the numbers come from."""
    manifest = run.manifest
    environment: dict[str, Any] = {"versions": {}, "network": {}, **manifest.environment}
    for name in ("versions", "network"):  # as a damaged manifest may have them
        environment[name] = environment[name] if isinstance(environment[name], Mapping) else {}
    return {
        "experiment": run.experiment,
        "environment": environment,
        "data": manifest.data or "?",
        "started": manifest.started,
        "finished": (manifest.finished or {}).get("at", "not finished"),
        "seconds": manifest.seconds,
        "records_sha256": manifest.line_hashes,
    }


def answer_of(runs: Sequence[Shown], attacks: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The question and the answer of the page, about its first run."""
    if not runs:
        return None
    run, certified = runs[0], runs[0].summary.certified_robust_accuracy
    most = max(other.summary.certified_robust_accuracy.count for other in runs)
    return {
        **facts_of(run),
        "name": run.summary.name,
        "certified": certified,
        "attack": next((attack for attack in attacks if attack["run"] is run), None),
        "runs": len(runs),
        "best": len(runs) > 1 and certified.count == most,
    }


def scale_of(run: Shown, pictures: Mapping[str, str], shown: Sequence[Record]) -> dict[str, Any]:
    """The threat model, drawn to scale: an image with each patch shape, and one mask over it."""
    height, width = run.experiment.against.image_size
    shapes = run.summary.threat.patch_sizes
    # Each shape stands on the diagonal, the shapes side by side as they come.
    patches = []
    for number, (h, w) in enumerate(shapes[:3], start=1):
        at = number / (len(shapes[:3]) + 1)
        patches.append((max(0, round(at * height - h / 2)), max(0, round(at * width - w / 2)), h, w))
    cover = (mask for mask in run.windows if any(_inside(patches[0], window) for window in mask))
    return {
        "height": height,
        "width": width,
        "image": next((pictures[r.pixels] for r in shown if r.pixels and r.pixels in pictures), None),
        "patches": patches,
        "mask": next(cover, []),
        "more": len(shapes) > 3,
    }


def _inside(patch: Sequence[int], rectangle: Sequence[int]) -> bool:
    (y, x, h, w), (top, left, height, width) = patch, rectangle
    return top <= y and left <= x and y + h <= top + height and x + w <= left + width
