"""``certipatch report``: what folders of records say, as a table, a page or figures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import DataAsked
from ..errors import ConfigError, one_line
from ..runtime.console import print_table, stdout
from . import options as ask
from .open import folders_of_records
from .parse import check_out_file

if TYPE_CHECKING:
    from ..report.compared import Compared
    from ..report.require import Requirement


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
    model: ask.ModelToDraw = None,
    data: ask.DataToDraw = None,
    split: ask.Split = None,
    class_map: ask.ClassMap = None,
    class_names: ask.ClassNames = None,
    thresholds: ask.Thresholds = None,
    min_margin: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="count only certificates with at least this logit margin; default: what rounding does not "
            "reach",
        ),
    ] = None,
    require: ask.Require = None,
    as_json: ask.AsJson = False,
) -> None:
    """Compare certifications, of answers or of detection, and attacks, from their records alone: as a table,
    or as a page."""
    from ..data.words import read_class_names
    from ..records.read import read_folder
    from ..report.compared import compare
    from ..report.detection import parse_thresholds
    from ..report.require import parse_requirements

    swept, requirements = parse_thresholds(thresholds), parse_requirements(require or [])
    named = [inside for folder in folders for inside in folders_of_records(folder)]
    found = [read_folder(folder) for folder in dict.fromkeys(named)]  # one may be named twice
    kinds = {folder.manifest.kind for folder in found}
    _refuse_without(kinds, thresholds, min_margin)
    place = _place(data, split, class_map, html is not None or figures is not None)
    if figures is None and model:
        raise ConfigError("--model: expected --figures with it")
    compared = compare(found, swept, min_margin)
    words = read_class_names(class_names) if class_names else {}
    written, notes = _write(compared, html, words, figures, model, place)
    for note in notes:
        print(one_line(note), file=sys.stderr)
    _say(compared, written, as_json)
    _demand(compared, requirements)


def _say(compared: Compared, written: list[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(compared.to_json()))
        return
    _show(compared)
    for line in written:
        stdout.print(line, markup=False, soft_wrap=True)


def _demand(compared: Compared, requirements: list[Requirement]) -> None:
    """End with exit code 1, and a line for each folder that does not meet what was required of it."""
    not_met = [line for each in requirements for line in each.broken_by(compared)]
    for line in not_met:
        print(one_line(line), file=sys.stderr)
    if not_met:
        raise typer.Exit(1)


def _refuse_without(kinds: set[str], thresholds: str | None, min_margin: float | None) -> None:
    """Refuse options about records that no folder has."""
    if thresholds and "detect" not in kinds:
        raise ConfigError("thresholds: expected a folder that detect wrote, found none")
    if min_margin is not None and not math.isfinite(min_margin):
        raise ConfigError(f"min margin {min_margin}: expected a number from 0 up")
    if min_margin and "certify" not in kinds:
        raise ConfigError("min margin: expected a folder that certify wrote, found none")


def _place(data: str | None, split: str | None, class_map: str | None, pictures: bool) -> DataAsked | None:
    """Where the images of a page or of figures are; None: as the records say."""
    if not (data or split or class_map):
        return None
    if not pictures:
        raise ConfigError(
            "--data, --split and --class-map: expected --html or --figures with them, whose images they are"
        )
    return DataAsked(data or "", split, class_map)


def _write(
    compared: Compared,
    html: Path | None,
    words: dict[str, str],
    figures: Path | None,
    model: str | None,
    place: DataAsked | None,
) -> tuple[list[str], list[str]]:
    """A line for each file that was written, and one for each thing that could not be shown."""
    written: list[str] = []
    notes: list[str] = []
    if html is not None:
        from ..report.page.html import write_page

        check_out_file(html)
        notes += write_page(html, compared, place, words)
        written.append(f"page: {html}")
    if figures is not None:
        from ..report.figures.write import write_figures

        run = Path(model) if model else None
        drawn, missing = write_figures(figures, compared.summaries, model=run, place=place)
        written += [f"figure: {path}" for path in drawn]
        notes += missing
    return written, notes


def _show(compared: Compared) -> None:
    from ..report.attack import attack_text
    from ..report.certification import in_other_environments, table
    from ..report.crosscert import crosscert
    from ..report.detection import detection_table

    if compared.summaries:
        print_table(table(compared.summaries))
    for line in crosscert(compared.summaries):
        stdout.print(line, markup=False, soft_wrap=True)
    if compared.sweeps:
        print_table(detection_table(compared.sweeps))
    for line in in_other_environments(attack.folder.manifest for attack in compared.attacks):
        stdout.print(line, markup=False, soft_wrap=True)
    for attack in compared.attacks:
        text = f"{one_line(str(attack.folder.path))}\n{attack_text(attack.summary)}"
        stdout.print(text, markup=False, soft_wrap=True)
