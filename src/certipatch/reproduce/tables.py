"""A recipe's results beside the paper's: Markdown to read, CSV and JSON to compute with."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import RecordsError
from ..records.files import write_atomically
from ..report.certification import Summary, summarize, training_cost
from ..report.shares import Share
from .done import certification
from .paper import comparators, not_run, search_passes
from .plan import Run, published
from .recipe import Published, Recipe

HOW_TO_READ = (
    "vanilla: the undefended model is right; clean: the defended model is right; certified robust: it stays "
    "right under every patch, proven. In brackets: 95 % Wilson interval; of several seeds the mean is shown, "
    "with the interval of one seed's images (seeds share the images, so they do not narrow it) and then each "
    "seed. cost: forward passes worth of fine-tuning for one image over all epochs, a backward pass counted "
    "as two. copies: masked copies of each image in a gradient step (2: the batch is doubled). An empty cell "
    "has not been run, or is not a number that we know of the paper."
)
ACCURACIES = ("vanilla_accuracy", "clean_accuracy", "certified_robust_accuracy")
PLACES = "certified_share_of_places"  # of setups that certify by place


@dataclass(frozen=True)
class Cell:
    """One certification of a recipe: found, missing (no ``summary``), or not this recipe's (a ``problem``).

    Attributes:
        folder: where it is, relative to ``--out``.
        summary: what it says, without its records, of which a recipe may have millions.
        cost: forward-equivalents of fine-tuning for one image, over all epochs.
        published: what the paper prints there.
        problem: why what is there is not shown.
    """

    run: Run
    patch: str
    masks_per_axis: int
    folder: str
    summary: Summary | None = None
    cost: float | None = None
    published: Published | None = None
    problem: str | None = None

    @property
    def passes(self) -> float | None:
        """Forward passes of the certification for one image."""
        return self.summary.passes / self.summary.images if self.summary else None


def collect(recipe: Recipe, runs: list[Run], out: Path) -> list[Cell]:
    """What the folder ``out`` holds of each run's certifications.

    What is missing, not complete, of another experiment, or of other images or another device than the first
    cell of its table stays empty.
    """
    first: dict[str, tuple[str, str]] = {}
    return [
        _filled(
            Cell(run, *asked, run.certified(*asked), published=published(recipe, run, *asked)), out, first
        )
        for run in runs
        for asked in run.certifications
    ]


def _filled(cell: Cell, out: Path, first: dict[str, tuple[str, str]]) -> Cell:
    """The cell with what is there of it; ``first`` remembers the images and the device of each place."""
    run = cell.run
    try:
        found = certification(run, out, cell.patch, cell.masks_per_axis)
        summary = summarize(found) if found else None
        if found is None or summary is None or not summary.complete:
            return cell
        same = summary.experiment.data.fingerprint, summary.experiment.device
        if first.setdefault(run.place, same) != same:
            raise RecordsError(f"{found.path}: of other images or another device than the cells before it")
        light = replace(summary, folder=replace(found, records=[]))
        return replace(cell, summary=light, cost=training_cost(out / run.name))
    except RecordsError as error:
        return replace(cell, problem=str(error))


def write_tables(recipe: Recipe, cells: list[Cell], stem: Path) -> str:
    """Write ``stem``.md, .csv and .json; returns the Markdown."""
    text, rows = markdown(recipe, cells), [to_json(cell) for cell in cells]
    as_json = json.dumps({"title": recipe.title, "cells": rows}, indent=1)
    write_atomically(Path(f"{stem}.md"), text.encode())
    write_atomically(Path(f"{stem}.json"), as_json.encode() + b"\n")
    write_atomically(Path(f"{stem}.csv"), _csv(rows).encode())
    return text


def to_json(cell: Cell) -> dict[str, Any]:
    """One cell as JSON; what has not been run is null."""
    run, summary = cell.run, cell.summary
    measured = summary.to_json() if summary else {}
    return {
        "data": run.setup.data,
        "model": run.arch,
        "row": run.row,
        "strategy": run.strategy,
        "seed": run.seed,
        "epochs": run.epochs,
        "patch": cell.patch,
        "masks_per_axis": cell.masks_per_axis,
        "training_images": run.train_images,
        "precision": run.setup.precision,
        "forward_equivalents_per_image": cell.cost,
        "images": summary.images if summary else None,
        **{name: measured.get(name) for name in ACCURACIES},
        **({PLACES: measured.get(PLACES)} if run.setup.places else {}),
        "passes_per_image": cell.passes,
        "paper_clean_accuracy_percent": cell.published and cell.published.clean_accuracy,
        "paper_certified_robust_accuracy_percent": cell.published
        and cell.published.certified_robust_accuracy,
        "records": cell.folder if summary else None,
    }


def _csv(rows: list[dict[str, Any]]) -> str:
    """The rows of the JSON, with a column for each part of a share."""
    flat = [_flat(row) for row in rows]
    out = io.StringIO()
    columns = dict.fromkeys(column for row in flat for column in row)
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for key, value in row.items():
        shared = key in (*ACCURACIES, PLACES)
        line |= _share_columns(key, value or {}) if shared else {key: value}
    return line


def _share_columns(name: str, share: dict[str, Any]) -> dict[str, Any]:
    """Four columns for a share, three for a mean of shares; they are empty if there is none."""
    low, high = share.get("interval_95", (None, None))
    return {
        **({} if name == PLACES else {f"{name}_count": share.get("count")}),
        name: share.get("share"),
        f"{name}_low": low,
        f"{name}_high": high,
    }


def markdown(recipe: Recipe, cells: list[Cell]) -> str:
    """A table for each data set, model and patch, then where each number comes from."""
    lines, missing = [f"# {recipe.title}", "", f"The claim examined: {recipe.claim}", ""], []
    for (_, arch, patch), group in groupby(sorted(cells, key=_place), key=_place):
        of_table = list(group)
        if any(cell.summary for cell in of_table):
            lines += _table(of_table)
        else:
            known = [(cell.run.row, cell.masks_per_axis, cell.published) for cell in of_table]
            place = f"{of_table[0].run.setup.data}, {arch}, patch {patch}"
            missing += not_run(place, known)
    lines += comparators(recipe) + search_passes(recipe)
    if missing:
        lines += ["## Not run", "", *missing, ""]
    lines += [HOW_TO_READ, "", "<details><summary>Fractions and records of each run</summary>", ""]
    lines += [
        "| records | seed | vanilla | clean | certified robust | passes/image |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_fractions(cell, cell.summary) for cell in cells if cell.summary]
    return "\n".join([*lines, "", "</details>", ""])


def _place(cell: Cell) -> tuple[str, str, str]:
    """What the cells of one table have in common."""
    return cell.run.place, cell.run.arch, cell.patch


def _fractions(cell: Cell, summary: Summary) -> str:
    """The line of one certification below the tables."""
    shares = " | ".join(str(getattr(summary, name)) for name in ACCURACIES)
    return f"| `{cell.folder}` | {cell.run.seed} | {shares} | {cell.passes:.0f} |"


def _table(cells: list[Cell]) -> list[str]:
    """The table of one data set, model and patch: a row for each way of fine-tuning."""
    ks = sorted({cell.masks_per_axis for cell in cells})
    known = any(cell.published is not None for cell in cells)
    heads = ["fine-tuned with", "seeds", "epochs", "copies", "cost", "vanilla"]
    for k in ks:
        heads += [f"clean k={k}", f"certified robust k={k}"]
        heads += [f"certified share of places k={k}"] if cells[0].run.setup.places else []
        heads += [f"paper k={k}"] if known else []
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.run.row, []).append(cell)
    entries = [heads, *(_row(of_row, ks, known) for of_row in rows.values())]
    head, *body = [f"| {' | '.join(line)} |" for line in entries]
    return [*_heading(cells[0]), head, "|" + "---|" * len(heads), *body, ""]


def _heading(cell: Cell) -> list[str]:
    """What holds for all rows of a table."""
    run, setup = cell.run, cell.run.setup
    height, width = run.masks(cell.patch, cell.masks_per_axis).patch_size
    of_images = (
        f"{run.train_images} training images, {run.test_images} test images, batches of {setup.batch_size}, "
        f"{setup.precision}. {setup.note}"
    )
    return [
        f"## {setup.data}, {run.arch}, every {height}x{width} patch in "
        f"{setup.image_size}x{setup.image_size} pixels ({cell.patch})",
        "",
        of_images.rstrip(),
        "",
    ]


def _row(cells: list[Cell], ks: list[int], known: bool) -> list[str]:
    """One way of fine-tuning, over its seeds; ``known``: with a column for the paper's value."""
    run = cells[0].run
    seeds = sorted({cell.run.seed for cell in cells if cell.summary})
    shown = [run.row, ", ".join(map(str, seeds)), str(run.epochs), str(run.copies), _mean_cost(cells)]
    shown.append(mean([summary.vanilla_accuracy for summary in _with_k(cells, ks[-1])]))
    for k in ks:
        summaries = _with_k(cells, k)
        shown.append(mean([summary.clean_accuracy for summary in summaries]))
        shown.append(mean([summary.certified_robust_accuracy for summary in summaries]))
        shown += [_places(summaries)] if run.setup.places else []
        shown += [_paper(cells, k)] if known else []
    return shown


def _places(summaries: list[Summary]) -> str:
    """The certified share of places, and its interval; of several seeds each."""
    return "; ".join(str(summary.certified_share_of_places or "") for summary in summaries)


def _mean_cost(cells: list[Cell]) -> str:
    costs = [cell.cost for cell in cells if cell.cost is not None]
    return f"{sum(costs) / len(costs):.0f}" if costs else ""


def _with_k(cells: list[Cell], k: int) -> list[Summary]:
    """The results with k masks per axis, of all seeds."""
    summaries = [cell.summary for cell in cells if cell.masks_per_axis == k]
    return [summary for summary in summaries if summary]


def _paper(cells: list[Cell], k: int) -> str:
    """What the paper prints, which is the same for all seeds."""
    (value,) = {cell.published for cell in cells if cell.masks_per_axis == k}
    return str(value or "")


def mean(shares: Sequence[Share]) -> str:
    """``25.1 (22.5-27.9)``, the share in % and its interval.

    Of several seeds the mean, the interval at one seed's images, and each seed's share.
    """
    if not shares:
        return ""
    percents = [100 * share.count / share.images for share in shares]
    low, high = Share(round(sum(share.count for share in shares) / len(shares)), shares[0].images).interval
    each = f"; {', '.join(f'{percent:.1f}' for percent in percents)}" if len(percents) > 1 else ""
    return f"**{sum(percents) / len(percents):.1f}** ({100 * low:.1f}-{100 * high:.1f}){each}"
