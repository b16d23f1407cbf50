"""TODO."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError, one_line
from ..report.attack import attack_text, summarize_attack
from ..report.certification import summarize, table
from ..report.detection import detection_table, parse_thresholds, summarize_detection
from ..report.page.html import write_page
from .app import app
from .open import _certifications
from .options import AsJson, ClassMap, Split, Thresholds, stdout
from .parse import check_out_file


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="folders that certify, detect or attack wrote; the first is what a page is about"
        ),
    ],
    html: Annotated[Path | None, typer.Option(help="write one self-contained page")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="folder to write figures for a paper into, as SVG and PNG")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="of figures: the certified training run; draws the masks that each strategy finds"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="of a page and of figures: where the images are; default: as the records say"),
    ] = None,
    split: Split = None,
    class_map: ClassMap = None,
    thresholds: Thresholds = None,
    min_margin: Annotated[
        float, typer.Option(min=0, help="count only certificates with at least this logit margin")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Compare certifications, of answers or of detection, and attacks, from their records alone: as a table,
    or as a page."""
    from ..records.manifest import read_manifest

    swept = parse_thresholds(thresholds)
    every = [inside for folder in folders for inside in _certifications(folder)]
    kinds = {folder: read_manifest(folder)["kind"] for folder in every}
    if thresholds and "detect" not in kinds.values():
        raise ConfigError("thresholds: expected a folder that detect wrote, found none")
    if not math.isfinite(min_margin):
        raise ConfigError(f"min margin {min_margin}: expected a number from 0 up")
    if min_margin and "certify" not in kinds.values():
        raise ConfigError("min margin: expected a folder that certify wrote, found none")
    if html is None and figures is None and (data or split or class_map):
        raise ConfigError(
            "--data, --split and --class-map: expected --html or --figures with them, whose images they are"
        )
    if figures is None and model:
        raise ConfigError("--model: expected --figures with it")
    attacks = {folder: summarize_attack(folder) for folder in every if kinds[folder] == "attack"}
    sweeps = {folder: summarize_detection(folder, swept) for folder in every if kinds[folder] == "detect"}
    summaries = {
        folder: summarize(folder, min_margin=min_margin)
        for folder in every
        if folder not in {**attacks, **sweeps}
    }
    written: list[str] = []
    notes: list[str] = []
    if html is not None:
        check_out_file(html)
        notes += write_page(
            html,
            list(summaries.values()),
            list(sweeps.values()),
            list(attacks),
            data=data,
            split=split,
            class_map=class_map,
        )
        written.append(f"page: {html}")
    if figures is not None:
        from ..report.figures.write import Place
        from ..report.figures.write import write_figures as write

        place = Place(data, split, class_map) if data or split or class_map else None
        drawn, missing = write(
            figures, list(summaries.values()), model=Path(model) if model else None, place=place
        )
        written += [f"figure: {path}" for path in drawn]
        notes += missing
    for note in notes:
        print(one_line(note), file=sys.stderr)
    if as_json:
        print(
            json.dumps(
                [
                    attacks.get(folder) or (sweeps.get(folder) or summaries[folder]).to_json()
                    for folder in every
                ]
            )
        )
        return
    if summaries:
        stdout.print(table(list(summaries.values())))
    if sweeps:
        stdout.print(detection_table(list(sweeps.values())))
    for found in attacks.values():
        stdout.print(f"{one_line(found['folder'])}\n{attack_text(found)}", markup=False, soft_wrap=True)
    for line in written:
        stdout.print(line, markup=False, soft_wrap=True)
