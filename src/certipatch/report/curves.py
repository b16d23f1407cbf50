"""Certified accuracy against patch size and against k: which runs belong on one line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from ..geometry.patch import by
from .certification import Share, Summary, strategy


@dataclass(frozen=True)
class Point:
    """``x``: % of the image that the patch takes, or masks per axis; ``label``: x as a person reads it."""

    x: float
    label: str
    share: Share


@dataclass(frozen=True)
class Curve:
    """What one model reaches on the same images."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Chart:
    title: str
    x: str
    curves: tuple[Curve, ...]


def against_patch(summaries: Sequence[Summary]) -> Chart | None:
    """Certified robust accuracy against the size of one patch, a line for each model, k and inference; None
    without two sizes for any."""

    def point(summary: Summary) -> Point:
        masks = summary.manifest["experiment"]["masks"]
        (h, w), (height, width) = masks["patch_size"], masks["image_size"]
        return Point(100 * h * w / (height * width), by((h, w)), summary.certified_robust_accuracy)

    curves = _curves(summaries, point, apart=lambda masks: f"k={masks['masks_per_axis']}")
    return (
        Chart("Certified accuracy against patch size", "patch size in pixels, spaced by its area", curves)
        if curves
        else None
    )


def against_k(summaries: Sequence[Summary]) -> Chart | None:
    """Certified robust accuracy against masks per axis, a line for each model, patch and inference; None
    without two k for any."""

    def point(summary: Summary) -> Point:
        k = summary.manifest["experiment"]["masks"]["masks_per_axis"]
        return Point(k, str(k), summary.certified_robust_accuracy)

    curves = _curves(summaries, point, apart=lambda masks: f"patch {by(masks['patch_size'])}")
    return Chart("Certified accuracy against masks per axis", "masks per axis, k", curves) if curves else None


def _curves(
    summaries: Sequence[Summary], point: Callable[[Summary], Point], *, apart: Callable[[dict[str, Any]], str]
) -> tuple[Curve, ...]:
    """Runs of one model on the same images against one patch, by what holds them ``apart`` besides."""
    groups: dict[Hashable, dict[float, Point]] = defaultdict(dict)
    names: dict[Hashable, str] = {}
    for summary in summaries:
        experiment = summary.manifest["experiment"]
        masks = experiment["masks"]
        if masks.get("patches", 1) != 1 or masks.get("other_patch_sizes"):
            continue
        inference = experiment.get("inference", "double-masking")
        key = (
            experiment["weights_sha256"],
            experiment["data"]["fingerprint"],
            inference,
            experiment["precision"],
            apart(masks),
        )
        model = strategy(summary.manifest) if experiment.get("trained") else experiment["model"]["arch"]
        names[key] = ", ".join([model, apart(masks), *(["challenger"] if inference == "challenger" else [])])
        one = point(summary)
        groups[key].setdefault(one.x, one)
    lines = {key: tuple(group[x] for x in sorted(group)) for key, group in groups.items() if len(group) > 1}
    shown = [names[key] for key in lines]
    # Two models of one training: told apart by their weights.
    return tuple(
        Curve(names[key] if shown.count(names[key]) == 1 else f"{names[key]} ({str(key[0])[:6]})", points)  # type: ignore[index]
        for key, points in lines.items()
    )
