"""``certipatch report --html``: one self-contained page out of the records of some runs.

Text and charts are laid out by the template ``page.html.j2``; what can be stepped through is drawn by
``page.js`` from one block of JSON. The page asks the network for nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ...config import DataAsked
from ...records.files import write_atomically
from ...records.manifest import now
from ..advice import advise
from ..certification import in_other_environments
from ..compared import Compared
from ..curves import against_k, against_patch
from .attacks import attack_of, worth_a_look
from .blocks import CASES, OUTCOMES, block_of
from .facts import answer_of, facts_of, scale_of
from .gallery import Pictures, choose
from .shown import Shown

PAGE = Path(__file__).parent
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(PAGE),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(
    path: Path, compared: Compared, data: DataAsked | None = None, words: Mapping[str, str] | None = None
) -> list[str]:
    """Write the page. The first certification is what it is about, the others are compared with it.

    Args:
        data: where the images are, as ``certify`` had it; None: as the manifests say. A page without images
            is complete but for its pictures.
        words: what people call a class, by the folder's name; WordNet's ids have theirs.

    Returns:
        A line for each thing that is not shown, and why.

    Raises:
        RecordsError: damaged records. CertiPatchError: ``data`` is given and holds other images.
    """
    place, names = _names([summary.name for summary in compared.summaries])
    runs = [Shown(summary, names[summary.name], words) for summary in compared.summaries]
    pictures = Pictures(data)
    attacked = {record.index for one in compared.attacks for record in worth_a_look(one.folder.records)}
    galleries = choose(runs, attacked, pictures)
    attacks = [attack_of(one, runs, pictures.found) for one in compared.attacks]
    charts = against_patch(compared.summaries), against_k(compared.summaries)
    text = TEMPLATES.get_template("page.html.j2").render(
        runs=[facts_of(run) for run in runs],
        masked=any(run.windows for run in runs),
        by_place=any(run.by_place is not None for run in runs),
        place=place,
        answer=answer_of(runs, attacks),
        scale=scale_of(runs[0], pictures.found, galleries[0]) if runs else None,
        charts=[chart for chart in charts if chart],
        advice=advise(runs[0].summary, attacked=bool(attacks)) if runs else [],
        sweeps=compared.sweeps,
        attacks=attacks,
        notes=[*pictures.notes, *in_other_environments(one.folder.manifest for one in compared.every)],
        version=metadata.version("certipatch"),
        at=now(),
        **_script(runs, galleries, pictures.found),
    )
    write_atomically(path, text.encode("utf-8", "replace"))
    return pictures.notes


def _script(
    runs: Sequence[Shown], galleries: Sequence[list[Any]], pictures: dict[str, str]
) -> dict[str, Any]:
    """Style and script of the page, and the JSON that the script draws from."""
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    blocks = [block_of(run, pictures, gallery) for run, gallery in zip(runs, galleries, strict=True)]
    return {
        "style": Markup((PAGE / "page.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "json": _json({"pictures": pictures, "runs": blocks, "cases": CASES, "outcomes": OUTCOMES}),
    }


def _names(folders: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The folder that several runs are in, if it is not the current one, and what each is called there."""
    place = ""
    if len(folders) > 1 and len(set(map(os.path.isabs, folders))) == 1:
        place = os.path.commonpath([os.path.dirname(folder) for folder in folders])
    return place, {folder: os.path.relpath(folder, place) if place else folder for folder in folders}


def _json(value: Any) -> Markup:
    """JSON that no text in it can end the script element of."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
