"""``certipatch report --html``: one self-contained page out of the records of some runs.

Every number comes from ``summary``, ``findings``, ``detection`` and ``attacked``. Text and charts are laid
out by the template ``page/page.html.j2``; what can be stepped through is drawn by ``page/page.js`` from one
block of JSON. The page asks the network for nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import jinja2
from markupsafe import Markup

from ...records.files import write_atomically
from ...records.manifest import now
from ..advice import advise
from ..certification import Summary
from ..curves import against_k, against_patch
from ..detection import DetectionSummary
from ..findings import Outcome
from .attacks import _attack
from .blocks import CASES, _block
from .facts import _answer, _facts, _scale
from .pictures import _pictures
from .run import Run, _records

PAGE = Path(__file__).parent


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(PAGE),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(
    path: Path,
    summaries: Sequence[Summary],
    sweeps: Sequence[DetectionSummary] = (),
    attacks: Sequence[Path] = (),
    *,
    data: str | None = None,
    split: str | None = None,
    class_map: str | None = None,
) -> list[str]:
    """Write the page. The first summary is what it is about, the others are compared with it.

    Args:
        attacks: folders that ``attack`` wrote.
        data, split, class_map: where the images are, as ``certify`` had them; None: as the manifests say. A
            page without images is complete but for its pictures.

    Returns:
        A line for each thing that is not shown, and why.

    Raises:
        RecordsError: damaged records. CertiPatchError: ``data`` is given and holds other images.
    """
    runs = [Run(summary, _records(summary)) for summary in summaries]
    notes: list[str] = []
    pictures, shown = _pictures(runs, attacks, notes, data, split, class_map)
    place, names = _names([run.summary.folder for run in runs])
    blocks = [
        _block(run, names[run.summary.folder], pictures, some) for run, some in zip(runs, shown, strict=True)
    ]
    under_attack = [_attack(folder, runs, pictures, names) for folder in attacks]
    script, style = (PAGE / "page.js").read_text(), (PAGE / "page.css").read_text()
    text = TEMPLATES.get_template("page.html.j2").render(
        runs=[_facts(run, names[run.summary.folder]) for run in runs],
        place=place,
        answer=_answer(runs, under_attack),
        scale=_scale(runs[0], pictures, shown[0]) if runs else None,
        charts=[chart for chart in (against_patch(summaries), against_k(summaries)) if chart],
        advice=advise(runs[0].summary, runs[0].records, attacked=bool(attacks)) if runs else [],
        sweeps=sweeps,
        attacks=under_attack,
        notes=notes,
        version=metadata.version("certipatch"),
        at=now(),
        style=Markup(style),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        json=_json({"pictures": pictures, "runs": blocks, "cases": CASES, "outcomes": get_args(Outcome)}),
    )
    write_atomically(path, text.encode("utf-8", "replace"))
    return notes


def _names(folders: list[str]) -> tuple[str, dict[str, str]]:
    """The folder that several runs are in, if it is not the current one, and what each is called there."""
    place = (
        os.path.commonpath([os.path.dirname(folder) for folder in folders])
        if len(folders) > 1 and len(set(map(os.path.isabs, folders))) == 1
        else ""
    )
    return place, {folder: os.path.relpath(folder, place) if place else folder for folder in folders}


def _json(value: Any) -> Markup:
    """JSON that no text in it can end the script element of."""
    return Markup(
        json.dumps(value, separators=(",", ":"))
        .replace("&", "\\u0026")
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
    )
