"""``certipatch reproduce``: the runs behind a table or figure of the paper, and the table beside the
paper's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CertiPatchError
from ..runtime.console import print_table, stderr
from . import options as ask
from .open import resumable
from .parse import parse_locations

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from ..reproduce.plan import Run
    from ..reproduce.recipe import Recipe
    from ..reproduce.tables import Cell


def reproduce(
    recipe: ask.Recipe,
    out: ask.OutShared = Path("reproduced"),
    only: ask.Only = None,
    scale: ask.Scale = 1.0,
    data: ask.Places = None,
    resume: ask.ResumeAlways = True,
    dry_run: ask.DryRun = False,
    tflops: ask.Tflops = None,
    device: ask.Device = "auto",
    precision: ask.PrecisionOfRecipe = None,
    workers: ask.Workers = 0,
    as_json: ask.AsJson = False,
) -> None:
    """Reproduce a table or figure of the paper: plan, train, certify, and show it beside the paper's
    numbers."""
    from ..reproduce.plan import plan
    from ..reproduce.recipe import read_recipe
    from ..reproduce.run import run
    from ..runtime.devices import make_fabric

    wanted = read_recipe(recipe, precision=precision)
    if wanted.comparison is not None:
        how = {"device": device, "precision": precision or "32-true"}
        _compare(recipe, wanted, out, {"only": only, "scale": scale}, data or [], how, workers, dry_run)
        return
    runs, every = plan(wanted, only=only, scale=scale), plan(wanted, scale=scale)
    locations = parse_locations(data or [], (run.setup.data for run in every))
    fab = cache(lambda precision: make_fabric(device=device, precision=precision))
    if dry_run:
        _show_plan(runs, out, fab, tflops, as_json)
        return
    stem = out / f"{Path(recipe).name.removesuffix('.toml')}{'' if scale == 1 else f'-x{scale:g}'}"
    tables = Tables(wanted, every, out, stem)
    tables.announce(runs, fab, tflops)
    with resumable(out, "run the same command again"):
        failures = run(runs, out, locations=locations, fabric=fab, workers=workers, after_each=tables.render)
    tables.show(as_json)
    if failures:
        raise CertiPatchError(f"{len(failures)} of {len(runs)} runs failed; the first: {failures[0]}")


def _compare(
    recipe: str,
    wanted: Recipe,
    out: Path,
    part: dict[str, Any],
    data: list[str],
    how: dict[str, str],
    workers: int,
    dry_run: bool,
) -> None:
    """Certified defenses side by side: plan, or run and print the table."""
    from ..reproduce.compare import compared, plan_lines, run, write
    from ..runtime.devices import make_fabric

    assert wanted.comparison is not None  # as asked
    runs, every = (compared(wanted.comparison, **{**part, "only": only}) for only in (part["only"], None))
    if dry_run:
        print("\n".join(plan_lines(runs)))
        return
    locations = parse_locations(data, [wanted.comparison.data])
    scale = part["scale"]
    stem = out / f"{Path(recipe).name.removesuffix('.toml')}{'' if scale == 1 else f'-x{scale:g}'}"
    with resumable(out, "run the same command again"):
        failures = run(
            runs,
            out,
            locations=locations,
            fabric=make_fabric(device=how["device"], precision=how["precision"]),
            workers=workers,
            after_each=lambda: write(wanted, every, out, stem),
        )
    print(write(wanted, every, out, stem))
    if failures:
        raise CertiPatchError(f"{len(failures)} of {len(runs)} rows failed; the first: {failures[0]}")


def _show_plan(
    runs: list[Run], out: Path, fab: Callable[[str], Fabric], tflops: float | None, as_json: bool
) -> None:
    from ..reproduce.budget import plan_json, plan_table, tasks

    found = tasks(runs, out, fabric=fab, tflops=tflops)
    if as_json:
        print(json.dumps(plan_json(found)))
    else:
        print_table(plan_table(found))


@dataclass(frozen=True)
class Tables:
    """The files of a recipe: ``stem``.md, .csv and .json, written anew after each run."""

    recipe: Recipe
    runs: list[Run]
    out: Path
    stem: Path

    def announce(self, runs: list[Run], fab: Callable[[str], Fabric], tflops: float | None) -> None:
        """Say what is still to be done of some runs, and how long it will take."""
        from ..reproduce.budget import plan_table, tasks
        from ..reproduce.tables import collect

        if any(cell.summary is None for cell in collect(self.recipe, runs, self.out)):
            left = [task for task in tasks(runs, self.out, fabric=fab, tflops=tflops) if not task.finished]
            print_table(plan_table(left), stderr)

    def render(self) -> list[Cell]:
        """Write the files from what there is."""
        from ..reproduce.tables import collect, write_tables

        self.out.mkdir(parents=True, exist_ok=True)
        cells = collect(self.recipe, self.runs, self.out)
        write_tables(self.recipe, cells, self.stem)
        return cells

    def show(self, as_json: bool) -> None:
        """Write the files, print the table, and name on standard error what is not shown."""
        from ..reproduce.figure5 import against_k

        cells = self.render()
        written = [Path(f"{self.stem}.{ending}") for ending in ("md", "csv", "json")]
        written += against_k(cells, self.stem) if self.recipe.figure else []
        shown = Path(f"{self.stem}.{'json' if as_json else 'md'}").read_text(encoding="utf-8")
        print(shown if as_json else shown.partition("<details>")[0])
        say = partial(stderr.print, markup=False, soft_wrap=True)
        for cell in cells:
            if cell.problem:
                say(f"not shown: {cell.problem}")
        say(f"written: {', '.join(map(str, written))}")
