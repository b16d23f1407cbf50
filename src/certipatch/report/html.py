"""``certipatch report --html``: one self-contained page out of the records of some runs.

Every number comes from ``summary``, ``findings``, ``detection`` and ``attacked``. Text and charts are laid out by the template ``page/page.html.j2``;
what can be stepped through is drawn by ``page/page.js`` from one block of JSON. The page asks the network for nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import jinja2
from markupsafe import Markup

from ..errors import CertiPatchError, RecordsError
from ..masks import threat_of, threat_text
from ..records import Record, now, read_manifest, read_manifests, read_records, write_atomically
from . import attacked, findings, thumbnails
from .advice import advise, near, rounding
from .curves import against_k, against_patch
from .detection import DetectionSummary
from .summary import Share, Summary, percent_of_image, strategy

PICTURES = 180  # at most in galleries, in all: with 224 pixels a side a page of some 3 megabytes
ROOM = 1_500_000  # characters for further pictures of images without a certificate
EACH = 8  # of an outcome in a gallery
PAIRS = 10  # of the most frequent failing ones
CLASSES = 12  # of the hardest ones
ATTACKED = 12  # images beside their patched ones
CASES = ("agreed", "disagreer", "majority", "champion")
PAGE = Path(__file__).parent / "page"
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True)
class Run:
    """A certification as the page shows it."""

    summary: Summary
    records: list[Record]

    @property
    def experiment(self) -> dict[str, Any]:
        experiment: dict[str, Any] = self.summary.manifest["experiment"]
        return experiment

    @property
    def masks(self) -> list[list[list[int]]]:
        masks: list[list[list[int]]] = self.experiment["masks"]["windows"]
        return masks

    @property
    def classes(self) -> list[str]:
        """Names of labels; a damaged manifest has none, then numbers stand for them."""
        names = self.experiment["model"].get("classes")
        return [str(name) for name in names] if isinstance(names, list) else []


def write(
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
        data, split, class_map: where the images are, as ``certify`` had them; None: as the manifests say. A page
            without images is complete but for its pictures.

    Returns:
        A line for each thing that is not shown, and why.

    Raises:
        RecordsError: damaged records. CertiPatchError: ``data`` is given and holds other images.
    """
    runs = [Run(summary, _records(summary)) for summary in summaries]
    notes: list[str] = []
    pictures, shown = _pictures(runs, attacks, notes, data, split, class_map)
    place, names = _names([run.summary.folder for run in runs])
    blocks = [_block(run, names[run.summary.folder], pictures, some) for run, some in zip(runs, shown, strict=True)]
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
        json=_json({"pictures": pictures, "runs": blocks, "cases": CASES, "outcomes": get_args(findings.Outcome)}),
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
    return Markup(json.dumps(value, separators=(",", ":")).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _records(summary: Summary) -> list[Record]:
    records, masks = read_records(Path(summary.folder)), len(summary.manifest["experiment"]["masks"]["windows"])
    for record in records:
        if record.failing_pair is not None and not all(0 <= mask < masks for mask in record.failing_pair):
            raise RecordsError(f"{summary.folder}: image {record.index}: expected a pair of its {masks} masks, found {record.failing_pair}")
    return records


def _pictures(
    runs: list[Run], attacks: Sequence[Path], notes: list[str], data: str | None, split: str | None, class_map: str | None
) -> tuple[dict[str, str], list[list[Record]]]:
    """The pictures of the page by the hash of their pixels, and for each run the records that its gallery shows."""
    each = max(2, min(EACH, PICTURES // (3 * max(1, len(runs)))))
    found: dict[str, str] = {}
    gallery = []
    opened: dict[str, Any] = {}
    under_attack = {record.index for folder in attacks for record in _some_attacks(folder)}
    for run in runs:
        groups = findings.telling(run.records, each, run.summary.min_margin)
        some = {record.index: record for group in groups.values() for record in group}
        gallery.append(list(some.values()))
        for pair, _ in findings.failing_pairs(run.records)[:PAIRS]:  # an example of each, one in the gallery if there is one
            failing = [record for record in run.records if record.failing_pair == pair]
            some |= {r.index: r for r in failing[:1] if not any(r.index in some for r in failing)}
        some |= {record.index: record for record in run.records if record.index in under_attack}
        key = json.dumps([run.experiment["data"], run.experiment["model"]])
        try:
            if key not in opened:
                opened[key] = thumbnails.images_of(run.summary.manifest, data, split, class_map)
            missing = [record for record in some.values() if record.pixels not in found]
            found |= thumbnails.pictures(opened[key], missing)
            room = ROOM
            for record in run.records if run is runs[0] else ():
                if room > 0 and not record.certified and record.pixels not in found:
                    more = thumbnails.pictures(opened[key], [record])
                    found |= more
                    room -= sum(map(len, more.values()))
        except CertiPatchError as error:
            if data is not None:
                raise
            opened.setdefault(key, None)
            note = f"pictures of {run.summary.folder}: not shown ({error}); give its --data, --split and --class-map"
            notes += [note]
    return found, gallery


def _facts(run: Run, name: str) -> dict[str, Any]:
    """One run for the template, under a short name."""
    s, e, environment = run.summary, run.experiment, _dict(run.summary.manifest.get("environment"))
    masks, finished = e["masks"], s.manifest["finished"]
    n, images = len(run.masks), s.certified_robust_accuracy.images
    margins = [r.margin for r in run.records if r.certified and r.margin is not None]
    states = Counter(findings.outcome(r, s.min_margin) for r in run.records)
    return {
        "summary": s,
        "name": name,
        "model": str(e["model"]["arch"]),
        "training": strategy(s.manifest),
        "threat": threat_text(**threat_of(masks)),
        "shapes": threat_text(**{**threat_of(masks), "patches": 1}),
        "patches": masks.get("patches", 1),
        "percent": percent_of_image(masks),
        "image_size": masks["image_size"],
        "k": masks["masks_per_axis"],
        "masks": n,
        "inference": e.get("inference", "double-masking"),
        "images": images,
        "asked": e["data"]["images"],
        "states": states,
        "passes": s.passes / images,
        "all_passes": 1 + n * (n + 1) // 2,
        "seconds": _seconds(s.manifest),
        "smallest_margin": min(margins, default=None),
        "near": near(s, run.records),
        "rounding": rounding(e),
        "data": str(s.manifest.get("data") or "?"),
        "records_sha256": [_dict(m["finished"]).get("sha256", "?") for m in read_manifests(Path(s.folder)).values()],
        "finished": _dict(finished).get("at", "not finished"),
        "environment": {**environment, **{name: _dict(environment.get(name)) for name in ("versions", "network")}},
        "experiment": e,
        "started": str(s.manifest.get("started", "?")),
    }


def _dict(value: Any) -> dict[str, Any]:
    """What a manifest says beside its experiment is shown, not relied on."""
    return value if isinstance(value, dict) else {}


def _seconds(manifest: dict[str, Any]) -> float | None:
    """From the start to the end of a run, pauses before a resume included."""
    try:
        return (datetime.fromisoformat(manifest["finished"]["at"]) - datetime.fromisoformat(manifest["started"])).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None


def _answer(runs: list[Run], attacks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The question and the answer of the page, about its first run."""
    if not runs:
        return None
    run, facts = runs[0], _facts(runs[0], runs[0].summary.folder)
    attack = next((a for a in attacks if a["run"] == run.summary.folder), None)
    most = max(other.summary.certified_robust_accuracy.count for other in runs)
    certified = run.summary.certified_robust_accuracy
    return {**facts, "certified": certified, "attack": attack, "runs": len(runs), "best": len(runs) > 1 and certified.count == most}


def _scale(run: Run, pictures: dict[str, str], shown: list[Record]) -> dict[str, Any]:
    """The threat model, drawn to scale: an image with each patch shape, and one mask over it."""
    masks = run.experiment["masks"]
    height, width = masks["image_size"]
    shapes = [masks["patch_size"], *masks.get("other_patch_sizes", [])]
    image = next((pictures[r.pixels] for r in shown if r.pixels in pictures), None)
    # Each shape in the middle of the first mask that hides it, the shapes side by side as they come.
    patches = []
    for number, (h, w) in enumerate(shapes[:3]):
        at = (number + 1) / (len(shapes[:3]) + 1)
        patches.append((max(0, round(at * height - h / 2)), max(0, round(at * width - w / 2)), h, w))
    top, left, h, w = patches[0]
    cover = next((m for m in run.masks if any(_inside((top, left, h, w), rectangle) for rectangle in m)), [])
    return {"height": height, "width": width, "image": image, "patches": patches, "mask": cover, "more": len(shapes) > 3}


def _inside(patch: Sequence[int], rectangle: Sequence[int]) -> bool:
    (y, x, h, w), (top, left, height, width) = patch, rectangle
    return top <= y and left <= x and y + h <= top + height and x + w <= left + width


def _block(run: Run, name: str, pictures: dict[str, str], shown: list[Record]) -> dict[str, Any]:
    """One run for the script: columns of values, an entry an image."""
    e, records = run.experiment, run.records
    pairs = findings.failing_pairs(records)
    plane = findings.heat(pairs, run.masks, e["masks"]["image_size"])
    hardest = findings.of_classes(records, run.summary.min_margin)
    fill = e.get("fill")
    grey = isinstance(fill, list) and len(fill) == 3 and all(isinstance(part, int | float) and 0 <= part <= 1 for part in fill)
    place = {record.index: number for number, record in enumerate(records)}
    gallery = {name: [place[r.index] for r in group] for name, group in _grouped(shown, run).items()}
    return {
        "name": name,
        "size": e["masks"]["image_size"],
        "fill": "#" + "".join(f"{round(255 * part):02x}" for part in fill) if grey and fill else "#808080",
        "masks": run.masks,
        "classes": run.classes,
        "images": {
            "index": [r.index for r in records],
            "name": [r.name for r in records],
            "label": [r.label for r in records],
            "vanilla": [r.vanilla_label for r in records],
            "defended": [r.defended_label for r in records],
            "case": [None if r.case is None else CASES.index(r.case) for r in records],
            "outcome": [get_args(findings.Outcome).index(findings.outcome(r, run.summary.min_margin)) for r in records],
            "pair": [r.failing_pair for r in records],
            "fails": [r.failing_label for r in records],
            # Of a certificate; between wrong answers a margin says nothing.
            "margin": [float(f"{r.margin:.4g}") if r.certified and r.margin is not None else None for r in records],
            "passes": [r.passes for r in records],
            "error": {number: r.error for number, r in enumerate(records) if r.error is not None},
        },
        "picture": {number: r.pixels for number, r in enumerate(records) if r.pixels in pictures},
        "gallery": gallery,
        "pairs": [[*pair, n] for pair, n in pairs[:PAIRS]],
        "failing": sum(n for _, n in pairs),
        "allPairs": len(pairs),
        "once": sum(n == 1 for _, n in pairs),
        "heat": {"rows": plane.rows, "columns": plane.columns, "counts": plane.counts.tolist()},
        "hardest": [
            {
                "label": one.label,
                "images": one.vanilla_accuracy.images,
                "vanilla": one.vanilla_accuracy.count,
                "clean": one.clean_accuracy.count,
                "certified": one.certified_robust_accuracy.count,
                "interval": one.certified_robust_accuracy.interval,
                "wrong": one.wrong,
                "others": one.others,
            }
            for one in hardest[:CLASSES]
        ],
        "allClasses": len(hardest),
    }


def _grouped(shown: list[Record], run: Run) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {"certified": [], "just missed": [], "hopeless": []}
    for record in shown:
        groups[findings.outcome(record, run.summary.min_margin)].append(record)
    return groups


# --- What was attacked -----------------------------------------------------------------------------------------------


def _some_attacks(folder: Path) -> list[attacked.AttackRecord]:
    """Those images of an attack that are worth a look: broken ones, then certified ones under a patch, then others that withstood."""
    records = [record for record in attacked.read_attacks(folder) if record.image is not None]
    broken = [record for record in records if record.broken]
    proven = sorted((r for r in records if r.certified), key=lambda r: r.vanilla_label == r.label)  # an undefended model that fell first
    rest = [record for record in records if not record.broken and not record.certified]
    return [*broken[: ATTACKED // 2], *proven[: ATTACKED // 3], *rest[: ATTACKED // 6]]


def _attack(folder: Path, runs: list[Run], pictures: dict[str, str], short: dict[str, str]) -> dict[str, Any]:
    found = attacked.summarize(folder)
    records = attacked.read_attacks(folder)
    manifest = read_manifest(folder)["experiment"]
    of = next((run for run in runs if attacked.digest(run.records) == manifest.get("records_sha256")), None)
    names = of.classes if of else []
    clean = {record.index: record for record in of.records} if of else {}

    def name(label: int | None) -> str:
        return "?" if label is None else names[label] if 0 <= label < len(names) else str(label)

    shown = []
    for record in _some_attacks(folder):
        before = clean.get(record.index)
        shown.append(
            {
                "record": record,
                "clean": pictures.get(before.pixels or "") if before else None,
                "patched": thumbnails.patched(folder, record),
                "truth": name(record.label),
                "answer": name(record.defended_label),
                "undefended": name(record.vanilla_label),
            }
        )
    return {
        "folder": str(folder),
        "found": found,
        "shares": {key: Share(found[key]["count"], found[key]["images"]) for key in attacked.BOUNDS},
        "run": of.summary.folder if of else None,
        "name": short[of.summary.folder] if of else None,
        "size": manifest["certification"]["masks"]["image_size"],
        "broken": sum(record.broken and record.top is not None for record in records),
        "withstood": sum(not record.broken for record in records),
        "settings": manifest.get("attack"),
        "shown": [one for one in shown if one["patched"]],
    }
