"""Figures for a two-column paper, from summaries: as wide as a column, in 8 point type.

Lines are told apart without colour too. What holds for all that a figure shows is in its title, what differs
is in its legend.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from ...geometry.patch import Size, by
from ..certification import Summary, strategy
from ..shares import Share
from .places import draw_places
from .style import COLOURS, COLUMN, DASHES, MARKERS, STYLE, new_figure, percents

ACCURACIES = {  # name, colour, marker, filled
    "vanilla": ("vanilla_accuracy", "#000000", "o", "white"),
    "clean": ("clean_accuracy", "#0072B2", "s", "white"),
    "certified robust": ("certified_robust_accuracy", "#D55E00", "D", "#D55E00"),
}
PLACES = ("certified_share_of_places", "#009E73", "^", "#009E73")  # of runs that were certified by place
BARS: dict[str, Any] = {
    "capsize": 1.5,
    "elinewidth": 0.7,
    "capthick": 0.7,
    "markeredgewidth": 0.8,
}  # points of type
NEEDED = {
    "certified-against-patch": (
        "one model certified for two patch sizes with the same k (certify --patch 1%,2%,3%)"
    ),
    "certified-against-k": (
        "one model certified for two k against the same patch (certify --masks-per-axis 3,6)"
    ),
    "strategies": "two models certified against the same patch with the same k",
    "places": "a run that was certified by place, against one patch (certify --places)",
}

Model = tuple[str, ...]


def draw_comparisons(summaries: list[Summary]) -> tuple[dict[str, Figure], list[str]]:
    """The figures of some certifications by name, and what was left out or skipped, a line each.

    Only complete runs are compared, on the images of the first one and at the same size.
    """
    shown, notes = _comparable(summaries)
    names = _names(shown)
    one_patch = [summary for summary in shown if summary.threat.is_single]
    drawn = {
        "certified-against-patch": _drawn(
            _against_patch, _grouped(one_patch, lambda one: f"k{_k(one)}"), names
        ),
        "certified-against-k": _drawn(_against_k, _grouped(shown, _file), names),
        "strategies": _drawn(_strategies, _grouped(shown, _file_and_k), names),
        "places": draw_places(_by_name(_grouped(shown, _file_and_k), names)),
    }
    notes += [f"skipped {kind}: needs {NEEDED[kind]}" for kind, found in drawn.items() if not found]
    figures = {f"{kind}-{name}": figure for kind, found in drawn.items() for name, figure in found.items()}
    return figures, notes


def _comparable(summaries: list[Summary]) -> tuple[list[Summary], list[str]]:
    """The complete runs on the images of the first, and a line for each of the others."""
    shown, notes = [], []
    for summary in summaries:
        if not summary.complete:
            notes.append(f"left out: {summary.name} is not complete; continue it with certify --resume")
        elif _images(summary) != _images(summaries[0]):
            notes.append(
                f"left out: {summary.name} is of other images than {summaries[0].name}, or of another size"
            )
        else:
            shown.append(summary)
    return shown, notes


def _grouped(summaries: Sequence[Summary], name: Callable[[Summary], str]) -> dict[str, list[Summary]]:
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(name(summary), []).append(summary)
    return groups


def _by_name(groups: Mapping[str, list[Summary]], names: dict[Model, str]) -> dict[str, dict[str, Summary]]:
    """The runs of each group by the name of their model; of two runs of one model the first."""
    found: dict[str, dict[str, Summary]] = {kind: {} for kind in groups}
    for kind, group in groups.items():
        for one in group:
            found[kind].setdefault(_wrapped(names[_model(one)], 22), one)
    return found


def _drawn(
    draw: Callable[[list[Summary], dict[Model, str]], Figure | None],
    groups: Mapping[str, list[Summary]],
    names: dict[Model, str],
) -> dict[str, Figure]:
    """The figures of those groups that have enough to be drawn, by the name of the group."""
    figures = {name: draw(group, names) for name, group in groups.items()}
    return {name: figure for name, figure in figures.items() if figure}


def _images(summary: Summary) -> tuple[Any, ...]:
    """What two runs on the same images have in common."""
    data = summary.experiment.data
    return data.fingerprint, data.sample, data.images, _size(summary)


def _size(summary: Summary) -> Size:
    height, width = summary.experiment.against.image_size
    return height, width


def _k(summary: Summary) -> int:
    return summary.experiment.masks_per_axis


def _file(summary: Summary) -> str:
    return summary.threat.file_name


def _k_as_text(summary: Summary) -> str:
    return f"k={_k(summary)}"


def _file_and_k(summary: Summary) -> str:
    return f"{_file(summary)}-k{_k(summary)}"


def _model(summary: Summary) -> Model:
    """What has a line of its own: weights, and what they are certified with."""
    experiment = summary.experiment
    inference = "challenger masking" if experiment.inference == "challenger" else "double masking"
    method = inference if experiment.defense == "patchcleanser" else experiment.defense
    return experiment.weights_sha256, experiment.precision, method


def _names(summaries: list[Summary]) -> dict[Model, str]:
    """Each model by its strategy, and by whatever else is not the same for all."""
    words = {_model(summary): _words(summary) for summary in summaries}
    common = set.intersection(*map(set, words.values())) if words else set()

    def name(first: str, *others: str) -> str:
        return ", ".join([first, *(word for word in others if word not in common)])

    names = {model: name(*of_model) for model, of_model in words.items()}
    shown = list(names.values())
    return {
        model: name if shown.count(name) == 1 else f"{name} ({model[0][:6]})" for model, name in names.items()
    }


def _words(summary: Summary) -> list[str]:
    """What there is to say of a model, the most telling first."""
    experiment = summary.experiment
    first, *others = strategy(experiment).split(", ")
    seed = experiment.trained.seed if experiment.trained else None
    seeded = [] if seed is None else [f"seed {seed}"]
    return [first, experiment.model.arch, *others, *seeded, *_model(summary)[1:]]


def _wrapped(name: str, width: int) -> str:
    """A name in at most four lines, broken at commas where that goes."""
    lines: list[str] = []
    for word in name.replace(", ", ",\n").split("\n"):
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines += textwrap.wrap(word, width)
    return "\n".join(lines if len(lines) <= 4 else [*lines[:3], f"{lines[3][: width - 1]}…"])


def _about(summary: Summary, *more: str) -> str:
    """What holds for a whole figure."""
    margin = [f"margin of at least {summary.min_margin:g}"] if summary.below else []
    return ", ".join([*more, f"{summary.images} images", *margin])


def _patch_of(summary: Summary) -> str:
    return f"patch {summary.threat.text} in {by(_size(summary))}"


def _against_patch(summaries: list[Summary], names: dict[Model, str]) -> Figure | None:
    """Certified robust accuracy against the side of a square patch, or the area of others."""
    height, width = _size(summaries[0])
    sizes = [summary.threat.patch_size for summary in summaries]
    if all(h == w for h, w in sizes):
        xs, label = [float(h) for h, _ in sizes], f"side of the patch (pixels of {height}x{width})"
    else:
        xs, label = [100 * h * w / (height * width) for h, w in sizes], "area of the patch (% of the image)"
    points = list(zip(xs, summaries, strict=True))
    return _lines(points, names, label, _about(summaries[0], _k_as_text(summaries[0])))


def _against_k(summaries: list[Summary], names: dict[Model, str]) -> Figure | None:
    points = [(float(_k(summary)), summary) for summary in summaries]
    return _lines(points, names, "masks per axis k", _about(summaries[0], _patch_of(summaries[0])))


def _lines(
    points: list[tuple[float, Summary]], names: dict[Model, str], xlabel: str, title: str
) -> Figure | None:
    """A line for each model; None unless one of them has two points."""
    found: dict[Model, dict[float, Share]] = {}
    for x, summary in sorted(points, key=lambda point: point[0]):
        found.setdefault(_model(summary), {}).setdefault(x, summary.certified_robust_accuracy)
    if not any(len(line) > 1 for line in found.values()):
        return None
    lines = {model: found[model] for model in names if model in found}
    labels = {model: _wrapped(names[model], 44) for model in lines}
    looks = dict(zip(names, _looks(), strict=False))
    with mpl.rc_context(STYLE):
        figure = new_figure(COLUMN, 2.2 + 0.13 * sum(label.count("\n") + 1 for label in labels.values()))
        axes = figure.subplots()
        for place, (model, line) in enumerate(lines.items()):
            # Models that share an x stand beside each other, by points of type.
            aside = ScaledTranslation((place - (len(lines) - 1) / 2) * 3 / 72, 0, figure.dpi_scale_trans)
            _draw_line(axes, line, aside, label=labels[model], **looks[model])
        _limit(axes, list(lines.values()))
        axes.set(title=title, xlabel=xlabel, ylabel="certified robust accuracy (%)")
        axes.grid(axis="y", color="0.85", linewidth=0.5)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", handlelength=3)
    return figure


def _looks() -> Iterator[dict[str, Any]]:
    """Colour, marker and dashes of one line after the other, without an end."""
    for colour, marker, dashes, filled in zip(
        cycle(COLOURS), cycle(MARKERS), cycle(DASHES), cycle((True, False)), strict=False
    ):
        face = colour if filled else "white"
        yield {"color": colour, "marker": marker, "markerfacecolor": face, "linestyle": dashes}


def _draw_line(axes: Axes, line: Mapping[float, Share], aside: ScaledTranslation, **look: Any) -> None:
    """The shares of one model by x, with their intervals."""
    heights, reach = percents(list(line.values()))
    axes.errorbar(list(line), heights, yerr=reach, transform=axes.transData + aside, **look, **BARS)


def _limit(axes: Axes, lines: Sequence[Mapping[float, Share]]) -> None:
    """Room for all lines, which autoscaling does not give: it does not count points of type."""
    xs = sorted({x for line in lines for x in line})
    top = max(_top(list(line.values())) for line in lines)
    beside = 0.1 * (xs[-1] - xs[0])
    axes.set(xticks=xs, xlim=(xs[0] - beside, xs[-1] + beside), ylim=(0, min(102, 1.05 * top)))


def _top(shares: list[Share]) -> float:
    """How high the intervals reach, in %."""
    heights, (_, above) = percents(shares)
    return max(height + more for height, more in zip(heights, above, strict=True))


def _strategies(summaries: list[Summary], names: dict[Model, str]) -> Figure | None:
    """Vanilla, clean and certified robust accuracy, and the certified share of places where all have one.

    There is a row for each model; None with less than two.
    """
    rows: dict[Model, Summary] = {}
    for summary in summaries:
        rows.setdefault(_model(summary), summary)
    if len(rows) < 2:
        return None
    labels = [_wrapped(names[model], 22) for model in rows]
    row = max(0.36, 0.13 * max(label.count("\n") + 1 for label in labels))
    with mpl.rc_context(STYLE):
        figure = new_figure(COLUMN, 0.8 + row * len(rows))
        axes = figure.subplots()
        by_place = all(summary.certified_share_of_places for summary in rows.values())
        shown = {**ACCURACIES, **({"certified share of places": PLACES} if by_place else {})}
        for offset, name in zip(np.linspace(-0.24, 0.24, len(shown)), shown, strict=True):
            _draw_measure(axes, name, shown[name], list(rows.values()), float(offset))
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(
            "accuracy (% of images), share of places (%)" if by_place else "accuracy (% of images)"
        )
        figure.suptitle(_about(summaries[0], _patch_of(summaries[0]), _k_as_text(summaries[0])), fontsize=8)
        axes.grid(axis="x", color="0.85", linewidth=0.5)
        for between in range(1, len(rows)):
            axes.axhline(between - 0.5, color="0.85", linewidth=0.5)
        axes.set_axisbelow(True)
        figure.legend(
            loc="outside lower center", ncols=2 if by_place else 3, columnspacing=1, handletextpad=0.3
        )
    return figure


def _draw_measure(
    axes: Axes, name: str, look_of: tuple[str, str, str, str], summaries: Sequence[Summary], offset: float
) -> None:
    """One measure of each row, so far from the middle of the row."""
    attribute, colour, marker, face = look_of
    places = [row + offset for row in range(len(summaries))]
    lengths, reach = percents([getattr(summary, attribute) for summary in summaries])
    look: dict[str, Any] = {"color": colour, "marker": marker, "markerfacecolor": face, "linestyle": ""}
    axes.errorbar(lengths, places, xerr=reach, label=name, **look, **BARS)
