"""A recipe's results beside the paper's: Markdown to read, CSV and JSON to compute with, a figure where it
has one."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import RecordsError
from ..records.files import write_atomically
from ..report.certification import Share, Summary, summarize, training_cost
from .plan import Run, published
from .recipe import Recipe

HOW_TO_READ = (
    "vanilla: the undefended model is right; clean: the defended model is right; certified robust: it stays "
    "right under "
    "every patch, proven. In brackets: 95 % Wilson interval; of several seeds the mean is shown, with the "
    "interval of one "
    "seed's images (seeds share the images, so they do not narrow it) and then each seed. cost: forward "
    "passes worth of "
    "fine-tuning for one image over all epochs, a backward pass counted as two. copies: masked copies of "
    "each image in a "
    "gradient step (2: the batch is doubled). An empty cell has not been run, or is not a number that we "
    "know of the paper."
)


@dataclass(frozen=True)
class Cell:
    """One certification of a recipe: found, missing (no ``summary``), or there but not this recipe's (a
    ``problem``)."""

    run: Run
    patch: str
    masks_per_axis: int
    folder: str
    summary: Summary | None
    cost: float | None
    published: float | None
    problem: str | None = None


def collect(recipe: Recipe, runs: list[Run], out: Path) -> list[Cell]:
    """What the folder ``out`` holds of each run's certifications.

    What is missing, not complete, of another experiment, or of other images or another device than the first
    cell of its table stays empty.
    """
    cells: list[Cell] = []
    first: dict[str, tuple[str, str]] = {}
    for run in runs:
        for patch, k in run.certifications:
            summary, cost, problem = None, None, None
            try:
                if (
                    run.certification(out, patch, k)
                    and (found := summarize(out / run.certified(patch, k))).complete
                ):
                    experiment = found.manifest["experiment"]
                    same = experiment["data"]["fingerprint"], experiment["device"]
                    if first.setdefault(run.place, same) != same:
                        raise RecordsError(
                            f"{out / run.certified(patch, k)}: of other images or another device than the "
                            "cells before it"
                        )
                    summary, cost = found, training_cost(out / run.name)
            except RecordsError as error:
                problem = str(error)
            cells.append(
                Cell(
                    run,
                    patch,
                    k,
                    run.certified(patch, k),
                    summary,
                    cost,
                    published(recipe, run, patch, k),
                    problem,
                )
            )
    return cells


def write_tables(recipe: Recipe, cells: list[Cell], stem: Path) -> str:
    """Write ``stem``.md, .csv and .json; returns the Markdown."""
    text = markdown(recipe, cells)
    rows = [to_json(cell) for cell in cells]
    write_atomically(Path(f"{stem}.md"), text.encode())
    write_atomically(
        Path(f"{stem}.json"), json.dumps({"title": recipe.title, "cells": rows}, indent=1).encode() + b"\n"
    )
    write_atomically(Path(f"{stem}.csv"), _csv(rows).encode())
    return text


def to_json(cell: Cell) -> dict[str, Any]:
    run, summary = cell.run, cell.summary
    measured = summary.to_json() if summary else {}
    accuracies = ("vanilla_accuracy", "clean_accuracy", "certified_robust_accuracy")
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
        "images": summary.certified_robust_accuracy.images if summary else None,
        **{name: measured.get(name) for name in accuracies},
        "passes_per_image": summary.passes / summary.certified_robust_accuracy.images if summary else None,
        "paper_certified_robust_accuracy_percent": cell.published,
        "records": cell.folder if summary else None,
    }


def _csv(rows: list[dict[str, Any]]) -> str:
    flat = []
    for row in rows:
        line: dict[str, Any] = {}
        for key, value in row.items():
            if key.endswith("_accuracy"):
                low, high = value["interval_95"] if value else (None, None)
                line |= {
                    f"{key}_count": value and value["count"],
                    key: value and value["share"],
                    f"{key}_low": low,
                    f"{key}_high": high,
                }
            else:
                line[key] = value
        flat.append(line)
    out = io.StringIO()
    writer = csv.DictWriter(out, flat[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def markdown(recipe: Recipe, cells: list[Cell]) -> str:
    """A table for each data set, model and patch, then where each number comes from."""
    lines, missing = [f"# {recipe.title}", "", f"The claim examined: {recipe.claim}", ""], []

    def place(cell: Cell) -> tuple[str, str, str]:
        return cell.run.place, cell.run.arch, cell.patch

    for (_, arch, patch), group in groupby(sorted(cells, key=place), key=place):
        of_table = list(group)
        if any(cell.summary for cell in of_table):
            lines += _table(of_table, arch, patch)
        else:
            missing.append(f"{of_table[0].run.setup.data}, {arch}, patch {patch}")
    if missing:
        lines += ["## Not run", "", *(f"- {name}" for name in missing), ""]
    lines += [HOW_TO_READ, "", "<details><summary>Fractions and records of each run</summary>", ""]
    lines += [
        "| records | seed | vanilla | clean | certified robust | passes/image |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells:
        if s := cell.summary:
            shares = " | ".join(map(str, (s.vanilla_accuracy, s.clean_accuracy, s.certified_robust_accuracy)))
            lines.append(
                f"| `{cell.folder}` | {cell.run.seed} | {shares} | "
                f"{s.passes / s.certified_robust_accuracy.images:.0f} |"
            )
    return "\n".join([*lines, "", "</details>", ""])


def _table(cells: list[Cell], arch: str, patch: str) -> list[str]:
    run = cells[0].run
    ks = sorted({cell.masks_per_axis for cell in cells})
    known = any(cell.published is not None for cell in cells)
    height, width = run.masks(patch, ks[-1]).patch_size
    heads = ["fine-tuned with", "seeds", "epochs", "copies", "cost", "vanilla"]
    for k in ks:
        heads += [f"clean k={k}", f"certified robust k={k}", *([f"paper k={k}"] if known else [])]
    lines = [
        f"## {run.setup.data}, {arch}, every {height}x{width} patch in "
        f"{run.setup.image_size}x{run.setup.image_size} pixels ({patch})",
        "",
        f"{run.train_images} training images, {run.test_images} test images, batches of "
        f"{run.setup.batch_size}, {run.setup.precision}. "
        f"{run.setup.note}".rstrip(),
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    rows = list(dict.fromkeys(cell.run.row for cell in cells))
    for row in rows:
        of_row = [cell for cell in cells if cell.run.row == row]
        first = of_row[0].run
        costs = [cell.cost for cell in of_row if cell.cost is not None]
        seeds = ", ".join(str(seed) for seed in sorted({cell.run.seed for cell in of_row if cell.summary}))
        shown = [
            row,
            seeds,
            str(first.epochs),
            str(first.copies),
            f"{sum(costs) / len(costs):.0f}" if costs else "",
        ]
        shown.append(
            _mean([c.summary.vanilla_accuracy for c in of_row if c.summary and c.masks_per_axis == ks[-1]])
        )
        for k in ks:
            done = [c.summary for c in of_row if c.masks_per_axis == k and c.summary]
            shown.append(_mean([s.clean_accuracy for s in done]))
            shown.append(_mean([s.certified_robust_accuracy for s in done]))
            if known:
                (paper,) = {c.published for c in of_row if c.masks_per_axis == k}
                shown.append("" if paper is None else f"{paper:.1f}")
        lines.append(f"| {' | '.join(shown)} |")
    return [*lines, ""]


def _mean(shares: list[Share]) -> str:
    """``25.1 (22.5-27.9)``; of several seeds the mean, the interval at one seed's images, and each seed's
    share."""
    if not shares:
        return ""
    percents = [100 * share.count / share.images for share in shares]
    low, high = Share(round(sum(s.count for s in shares) / len(shares)), shares[0].images).interval
    each = f"; {', '.join(f'{p:.1f}' for p in percents)}" if len(percents) > 1 else ""
    return f"**{sum(percents) / len(percents):.1f}** ({100 * low:.1f}-{100 * high:.1f}){each}"
