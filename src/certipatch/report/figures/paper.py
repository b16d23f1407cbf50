"""Figures for a two-column paper, from summaries: as wide as a column, in 8 point type, told apart without
colour too.

What holds for all that a figure shows is in its title, what differs in its legend.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Hashable
from itertools import cycle
from typing import Any, TypeVar

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from ...geometry.patch import by, threat_of, threat_text
from ..certification import Share, Summary, strategy
from .style import COLOURS, COLUMN, DASHES, MARKERS, STYLE, new_figure, percents

ACCURACIES = {  # name, colour, marker, filled
    "vanilla": ("vanilla_accuracy", "#000000", "o", "white"),
    "clean": ("clean_accuracy", "#0072B2", "s", "white"),
    "certified robust": ("certified_robust_accuracy", "#D55E00", "D", "#D55E00"),
}


Model = tuple[str, ...]


K = TypeVar("K", bound=Hashable)


def draw_comparisons(summaries: list[Summary]) -> tuple[dict[str, Figure], list[str]]:
    """The figures of some certifications by name, and what was left out or skipped, a line each.

    Compared are complete runs on the images of the first, as large as there.
    """
    notes, shown = [], []
    for summary in summaries:
        if not summary.complete:
            notes.append(f"left out: {summary.folder} is not complete; continue it with certify --resume")
        elif _images(summary) != _images(summaries[0]):
            notes.append(
                f"left out: {summary.folder} is of other images than {summaries[0].folder}, or of another size"
            )
        else:
            shown.append(summary)
    names = _names(shown)
    one_patch = [summary for summary in shown if set(threat_of(_masks(summary))) == {"patch_size"}]
    found = {
        f"certified-against-patch-k{k}": _against_patch(group, names)
        for k, group in _grouped(one_patch, _k).items()
    }
    if not any(found.values()):
        notes.append(
            "skipped certified-against-patch: needs one model certified for two patch sizes with the same k "
            "(certify --patch 1%,2%,3%)"
        )
    against_k = {
        f"certified-against-k-{_file(group[0])}": _against_k(group, names)
        for group in _grouped(shown, _threat).values()
    }
    if not any(against_k.values()):
        notes.append(
            "skipped certified-against-k: needs one model certified for two k against the same patch "
            "(certify --masks-per-axis 3,6)"
        )
    strategies = {
        f"strategies-{_file(group[0])}-k{k}": _strategies(group, names)
        for (_, k), group in _grouped(shown, lambda summary: (_threat(summary), _k(summary))).items()
    }
    if not any(strategies.values()):
        notes.append("skipped strategies: needs two models certified against the same patch with the same k")
    return {name: figure for name, figure in (found | against_k | strategies).items() if figure}, notes


def _masks(summary: Summary) -> dict[str, Any]:
    return summary.manifest["experiment"]["masks"]


def _images(summary: Summary) -> tuple[Any, ...]:
    data = summary.manifest["experiment"]["data"]
    return data["fingerprint"], data.get("sample"), data["images"], tuple(_masks(summary)["image_size"])


def _k(summary: Summary) -> int:
    return _masks(summary)["masks_per_axis"]


def _threat(summary: Summary) -> str:
    return threat_text(**threat_of(_masks(summary)))


def _file(summary: Summary) -> str:
    """The patches in the name of a file: ``5x5``, ``39x20+20x39``, ``2-patches-20x20``."""
    threat = threat_of(_masks(summary))
    shapes = "+".join(map(by, (threat["patch_size"], *threat.get("other_patch_sizes", ()))))
    return shapes if threat.get("patches", 1) == 1 else f"{threat['patches']}-patches-{shapes}"


def _model(summary: Summary) -> Model:
    """What has a line of its own: weights, and what they are certified with."""
    experiment = summary.manifest["experiment"]
    inference = "challenger masking" if experiment.get("inference") == "challenger" else "double masking"
    return experiment["weights_sha256"], experiment["precision"], inference


def _names(summaries: list[Summary]) -> dict[Model, str]:
    """Each model by its strategy, and by whatever else is not the same for all."""
    words: dict[Model, list[str]] = {}
    for summary in summaries:
        experiment = summary.manifest["experiment"]
        first, *others = strategy(summary.manifest).split(", ")
        seed = (experiment.get("trained") or {}).get("seed")
        others += [] if seed is None else [f"seed {seed}"]
        words[_model(summary)] = [first, experiment["model"]["arch"], *others, *_model(summary)[1:]]
    common = set.intersection(*map(set, words.values())) if words else set()
    names = {
        model: ", ".join([first, *(word for word in others if word not in common)])
        for model, (first, *others) in words.items()
    }
    shown = list(names.values())
    return {
        model: name if shown.count(name) == 1 else f"{name} ({model[0][:6]})" for model, name in names.items()
    }


def _wrapped(name: str, width: int) -> str:
    """A name in at most four lines, broken at commas where that goes."""
    lines: list[str] = []
    for word in name.replace(", ", ",\n").split("\n"):
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines += textwrap.wrap(word, width)
    return "\n".join(lines if len(lines) <= 4 else [*lines[:3], f"{lines[3][: width - 1]}…"])


def _grouped(summaries: list[Summary], key: Callable[[Summary], K]) -> dict[K, list[Summary]]:
    groups: dict[K, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(key(summary), []).append(summary)
    return groups


def _about(summary: Summary, *more: str) -> str:
    """What holds for a whole figure."""
    margin = [f"margin of at least {summary.min_margin:g}"] if summary.min_margin else []
    return ", ".join([*more, f"{summary.certified_robust_accuracy.images} images", *margin])


def _patch_of(summary: Summary) -> str:
    return f"patch {_threat(summary)} in {by(_masks(summary)['image_size'])}"


def _against_patch(summaries: list[Summary], names: dict[Model, str]) -> Figure | None:
    """Certified robust accuracy against the side of a square patch, or the area of others."""
    height, width = _masks(summaries[0])["image_size"]
    sizes = [tuple(_masks(summary)["patch_size"]) for summary in summaries]
    if all(h == w for h, w in sizes):
        xs, label = [float(h) for h, _ in sizes], f"side of the patch (pixels of {height}x{width})"
    else:
        xs, label = [100 * h * w / (height * width) for h, w in sizes], "area of the patch (% of the image)"
    return _lines(
        list(zip(xs, summaries, strict=True)), names, label, _about(summaries[0], f"k={_k(summaries[0])}")
    )


def _against_k(summaries: list[Summary], names: dict[Model, str]) -> Figure | None:
    points = [(float(_k(summary)), summary) for summary in summaries]
    return _lines(points, names, "masks per axis k", _about(summaries[0], _patch_of(summaries[0])))


def _lines(
    points: list[tuple[float, Summary]], names: dict[Model, str], xlabel: str, title: str
) -> Figure | None:
    """A line a model; None unless one of them has two points. Models that share an x stand beside each other,
    by points of type."""
    lines: dict[Model, dict[float, Share]] = {}
    for x, summary in sorted(points, key=lambda point: point[0]):
        lines.setdefault(_model(summary), {}).setdefault(x, summary.certified_robust_accuracy)
    if not any(len(line) > 1 for line in lines.values()):
        return None
    with mpl.rc_context(STYLE):
        shown = {model: _wrapped(names[model], 44) for model in lines}
        figure = new_figure(COLUMN, 2.2 + 0.13 * sum(label.count("\n") + 1 for label in shown.values()))
        axes = figure.subplots()
        looks = dict(
            zip(
                names,
                zip(cycle(COLOURS), cycle(MARKERS), cycle(DASHES), cycle((True, False)), strict=False),
                strict=False,
            )
        )
        top = 0.0
        for place, model in enumerate(model for model in names if model in lines):
            colour, marker, dashes, filled = looks[model]
            heights, reach = percents(list(lines[model].values()))
            top = max(top, *(height + above for height, above in zip(heights, reach[1], strict=True)))
            aside = ScaledTranslation((place - (len(lines) - 1) / 2) * 3 / 72, 0, figure.dpi_scale_trans)
            axes.errorbar(
                list(lines[model]), heights, yerr=reach, label=shown[model], transform=axes.transData + aside,
                color=colour, marker=marker, markerfacecolor=colour if filled else "white", markeredgewidth=0.8, linestyle=dashes,
                capsize=1.5, elinewidth=0.7, capthick=0.7,
            )  # fmt: skip
        xs = sorted({x for line in lines.values() for x in line})
        beside = 0.1 * (xs[-1] - xs[0])
        axes.set(
            xticks=xs, xlim=(xs[0] - beside, xs[-1] + beside), ylim=(0, min(102, 1.05 * top))
        )  # points of type do not count in autoscaling
        axes.set(title=title, xlabel=xlabel, ylabel="certified robust accuracy (%)")
        axes.grid(axis="y", color="0.85", linewidth=0.5)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", handlelength=3)
    return figure


def _strategies(summaries: list[Summary], names: dict[Model, str]) -> Figure | None:
    """Vanilla, clean and certified robust accuracy, a row a model; None with less than two."""
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
        for offset, (name, (attribute, colour, marker, face)) in zip(
            (-0.24, 0, 0.24), ACCURACIES.items(), strict=True
        ):
            places = [row + offset for row in range(len(rows))]
            lengths, reach = percents([getattr(summary, attribute) for summary in rows.values()])
            axes.errorbar(
                lengths, places, xerr=reach, label=name, color=colour, marker=marker, markerfacecolor=face, markeredgewidth=0.8,
                linestyle="", capsize=1.5, elinewidth=0.7, capthick=0.7,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-2, 102)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("accuracy (% of images)")
        figure.suptitle(_about(summaries[0], _patch_of(summaries[0]), f"k={_k(summaries[0])}"), fontsize=8)
        axes.grid(axis="x", color="0.85", linewidth=0.5)
        for between in range(1, len(rows)):
            axes.axhline(between - 0.5, color="0.85", linewidth=0.5)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1, handletextpad=0.3)
    return figure
