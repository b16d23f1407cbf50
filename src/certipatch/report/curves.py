"""Certified accuracy against patch size and against k: which runs belong on one line."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..geometry.patch import by
from .certification import Summary, percent_of_image, strategy
from .shares import Share


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
    """Certified robust accuracy against the size of one patch, a line for each model, k and inference.

    None without two sizes for any of them.
    """

    def point(summary: Summary) -> Point:
        percent = percent_of_image(summary.experiment)
        return Point(percent, by(summary.threat.patch_size), summary.certified_robust_accuracy)

    curves = _curves(summaries, point, apart=lambda summary: f"k={summary.experiment.masks_per_axis}")
    x = "patch size in pixels, spaced by its area"
    return Chart("Certified accuracy against patch size", x, curves) if curves else None


def against_k(summaries: Sequence[Summary]) -> Chart | None:
    """Certified robust accuracy against masks per axis, a line for each model, patch and inference.

    None without two k for any of them.
    """

    def point(summary: Summary) -> Point:
        k = summary.experiment.masks_per_axis
        return Point(k, str(k), summary.certified_robust_accuracy)

    curves = _curves(summaries, point, apart=lambda summary: f"patch {by(summary.threat.patch_size)}")
    return Chart("Certified accuracy against masks per axis", "masks per axis, k", curves) if curves else None


@dataclass(frozen=True)
class _Line:
    """What the runs of one line share: ``weights`` and everything but x, and the name that follows from
    it."""

    weights: str
    rest: tuple[str, ...]
    name: str


def _curves(
    summaries: Sequence[Summary], point: Callable[[Summary], Point], *, apart: Callable[[Summary], str]
) -> tuple[Curve, ...]:
    """Runs of one model on the same images against one patch, by what holds them ``apart`` besides.

    Two models of one training have the same name; then their weights tell them apart.
    """
    groups: dict[_Line, dict[float, Point]] = defaultdict(dict)
    for summary in summaries:
        if summary.threat.is_single:
            one = point(summary)
            groups[_line(summary, apart(summary))].setdefault(one.x, one)
    lines = {line: group for line, group in groups.items() if len(group) > 1}
    names = Counter(line.name for line in lines)
    return tuple(
        Curve(
            line.name if names[line.name] == 1 else f"{line.name} ({line.weights[:6]})",
            tuple(group[x] for x in sorted(group)),
        )
        for line, group in lines.items()
    )


def _line(summary: Summary, apart: str) -> _Line:
    experiment = summary.experiment
    model = strategy(experiment) if experiment.trained else experiment.model.arch
    challenger = ["challenger"] if experiment.inference == "challenger" else []
    rest = experiment.data.fingerprint, experiment.defense, experiment.inference, experiment.precision, apart
    return _Line(experiment.weights_sha256, rest, ", ".join([model, apart, *challenger]))
