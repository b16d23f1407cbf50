"""TODO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CertiPatchError
from ..reproduce.budget import plan_json, plan_table
from ..reproduce.budget import tasks as tasks_of
from ..reproduce.run import run
from ..reproduce.tables import Cell, collect, write_tables
from ..runtime.console import stderr
from ..runtime.devices import make_fabric
from .app import app
from .open import _resumable
from .options import AsJson, Device, Workers, stdout
from .parse import parse_locations


@app.command()
def reproduce(
    recipe: Annotated[
        str,
        typer.Argument(help="table1, table2, table3, tableA1, figure5, lite0, or a .toml file like those"),
    ],
    out: Annotated[Path, typer.Option(help="folder to write; tables share the runs in it")] = Path(
        "reproduced"
    ),
    only: Annotated[
        str | None,
        typer.Option(
            help="run only what matches each of 'cifar10,resnet*,!grid-fine,seed0' (data, model, strategy, "
            "seed; ! none)"
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="share of the images, for a quick look")] = 1.0,
    data: Annotated[
        list[str] | None, typer.Option(help="NAME=PLACE: where a data set is (repeat for more)")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", hidden=True)] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only plan: passes, FLOPs, time")] = False,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="plan for a device that sustains this rate")
    ] = None,
    device: Device = "auto",
    precision: Annotated[str | None, typer.Option(help="as in train; default: the recipe's")] = None,
    workers: Workers = 0,
    as_json: AsJson = False,
) -> None:
    """Reproduce a table or figure of the paper: plan, train, certify, and show it beside the paper's
    numbers."""
    from functools import cache

    from ..reproduce.figure5 import against_k
    from ..reproduce.plan import plan
    from ..reproduce.recipe import read_recipe

    wanted = read_recipe(recipe, precision=precision)
    runs, every = plan(wanted, only=only, scale=scale), plan(wanted, scale=scale)
    locations = parse_locations(data or [], every)
    fab = cache(lambda precision: make_fabric(device=device, precision=precision))
    if dry_run:
        tasks = tasks_of(runs, out, fabric=fab, tflops=tflops)
        print(json.dumps(plan_json(tasks))) if as_json else stdout.print(plan_table(tasks))
        return
    stem = out / f"{Path(recipe).name.removesuffix('.toml')}{'' if scale == 1 else f'-x{scale:g}'}"

    def render() -> list[Cell]:
        out.mkdir(parents=True, exist_ok=True)
        cells = collect(wanted, every, out)
        write_tables(wanted, cells, stem)
        return cells

    if any(cell.summary is None for cell in collect(wanted, runs, out)):
        left = [task for task in tasks_of(runs, out, fabric=fab, tflops=tflops) if not task.finished]
        stderr.print(plan_table(left))
    with _resumable(out, "run the same command again"):
        failures = run(runs, out, locations=locations, fabric=fab, workers=workers, after_each=render)
    cells = render()
    written = [Path(f"{stem}.{ending}") for ending in ("md", "csv", "json")] + (
        against_k(cells, stem) if wanted.figure else []
    )
    shown = Path(f"{stem}.{'json' if as_json else 'md'}").read_text()
    print(shown if as_json else shown.partition("<details>")[0])
    for cell in cells:
        if cell.problem:
            stderr.print(f"not shown: {cell.problem}", markup=False, soft_wrap=True)
    stderr.print(f"written: {', '.join(map(str, written))}", markup=False, soft_wrap=True)
    if failures:
        raise CertiPatchError(f"{len(failures)} of {len(runs)} runs failed; the first: {failures[0]}")
