"""Check a folder of records from what it says, with code of its own.

Nothing here uses the mask geometry, the algorithms or the schedule of the library: coverage is tried position by
position on arrays of bool (``verify_geometry``), and images are looked at again one view at a time by a naive restatement of
PatchCleanser's Algorithms 1 and 2 and of challenger masking (``verify_views``), or of detection (``verify_detection``). What is
found wrong is a list of :class:`Finding`; an untouched folder has none.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from . import verify_detection
from .config import ModelSpec, differences
from .data import Source
from .errors import one_line
from .models import weights_sha256
from .verify_geometry import demanded, uncovered, uncovered_pair
from .verify_views import look_again

MOST_PIXELS = 2**28  # of all masks together, held in memory

FIELDS = {
    "index", "name", "label", "pixels", "vanilla_label", "defended_label", "case", "certified", "failing_pair", "failing_label",
    "margin", "passes", "error",
}  # fmt: skip
EXPERIMENT = {
    "model", "weights_sha256", "trained", "masks", "fill", "data", "device", "precision", "block", "exhaustive",
}  # fmt: skip
KINDS = {"certify": (EXPERIMENT, FIELDS), "detect": (EXPERIMENT - {"exhaustive"}, verify_detection.FIELDS)}
CASES = {"double-masking": ("agreed", "disagreer", "majority"), "challenger": ("agreed", "champion")}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: where (a file, line, image), and what was expected and found."""

    where: str
    what: str

    def __str__(self) -> str:
        return one_line(f"{self.where}: {self.what}")


@dataclass
class Verification:
    """What was checked, and what is wrong.

    ``certified``: at threshold 0 if the records are of detection. ``undecided`` images differ from their record by no more than rounding in another batch can do.
    """

    folder: str
    kind: str = "certify"
    images: int = 0
    certified: int = 0
    recomputed: int = 0
    undecided: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        self.findings.append(Finding(where, what))

    def text(self, *, again: bool) -> str:
        """The findings, one a line, and what was checked."""
        looked = f"looked again at {self.recomputed}" if again else "looked again at none (give --model and --data)"
        unclear = f", {self.undecided} of them too close to a tie to tell" if self.undecided else ""
        of_kind = " for detection at threshold 0" if self.kind == "detect" else ""
        verdict = f"{len(self.findings)} findings" if self.findings else "nothing wrong found"
        return "\n".join(
            [*map(str, self.findings), f"{self.folder}: {self.certified} of {self.images} certified{of_kind}; {looked}{unclear}; {verdict}"]
        )

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "findings": [{"where": f.where, "what": f.what} for f in self.findings]}


Given = tuple[ModelSpec, nn.Sequential, dict[str, Any] | None]  # a model as options.open_model gives it


def verify(
    folder: Path, *, model: Given | None = None, source: Source | None = None, sample: int | None = 20, seed: int = 0, device: str = "auto"
) -> Verification:
    """Check the records that ``certify`` or ``detect`` wrote into ``folder``.

    Args:
        model, source: the model and the whole data set that were given to ``certify``, to be compared with what the folder says.
        sample: with model and source: how many images to look at again, drawn with ``seed``; None for all.

    Raises:
        CertiPatchError: the stated precision is none, or the model cannot be run.
    """
    found = Verification(str(folder))
    manifests = dict(_manifests(folder, found))
    if not manifests:
        return found
    experiment, found.kind = (next(iter(manifests.values()))[key] for key in ("experiment", "kind"))
    for path, manifest in manifests.items():
        if manifest["kind"] != found.kind:
            found.add(path.name, f"is of {manifest['kind']}, its neighbour of {found.kind}")
        for difference in differences(manifest["experiment"], experiment)[:3]:
            found.add(path.name, f"is of another experiment than its neighbour ({difference})")
    entries, _ = KINDS[found.kind]
    optional = {"inference"} if found.kind == "certify" else set()
    if odd := sorted(entries ^ (set(experiment) - optional)):
        found.add("manifest", f"its experiment has other entries than those of a certification: {', '.join(odd)}")
        return found
    try:
        sound = _check_geometry(experiment, found)
        records = _records(manifests, found)
        consistent = [index for index, record in records.items() if _check_record(index, record, experiment, found)]
        found.images, found.certified = len(records), sum(map(_is_certified, records.values()))
        _check_images(records, experiment, found)
        if model is not None:
            _check_model(experiment, model, found)
        if source is not None:
            source = source.first(experiment["data"]["images"])
            for difference in differences(experiment["data"], source.describe())[:3]:
                found.add("manifest", f"is of other data than was given: data.{difference}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        found.add("manifest", f"is damaged ({type(error).__name__}: {' '.join(str(error).split())[:100]})")
        return found
    if model is not None and source is not None and sound:
        chosen = sorted(index for index in consistent if index < len(source))
        if sample is not None and sample < len(chosen):
            chosen = sorted(np.random.default_rng(seed).choice(chosen, size=sample, replace=False).tolist())
        look_again(chosen, records, experiment, model, source, device, found)
    return found


# --- What the folder says --------------------------------------------------------------------------------------------


def _manifests(folder: Path, found: Verification) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The manifests that can be read; a finished one states the lines beside it and their hash."""
    paths = sorted(path for path in folder.glob("manifest*.json") if re.fullmatch(r"manifest(-\d+-of-\d+)?\.json", path.name))
    if not paths:
        found.add(str(folder), "has no manifest.json; give a folder that certify wrote")
    for path in paths:
        try:
            manifest = json.loads(path.read_bytes())
            kind, experiment, finished = manifest["kind"], manifest["experiment"], manifest["finished"]
            entries = json.dumps({key: value for key, value in manifest.items() if key != "sha256"}, sort_keys=True)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            found.add(path.name, f"is damaged ({type(error).__name__}: {' '.join(str(error).split())[:80]})")
            continue
        if kind not in tuple(KINDS) or manifest.get("format") != 1 or not isinstance(experiment, dict):
            found.add(path.name, f"expected format 1 of certify or detect, found {manifest.get('format')!r} of {kind!r}")
            continue
        if "sha256" in manifest and manifest["sha256"] != hashlib.sha256(entries.encode()).hexdigest():
            found.add(path.name, "its sha256 is of other entries: it is not what was written")
        _check_finished(path, finished, found)
        yield path, manifest
    known = {_lines_of(path) for path in paths}
    for path in sorted(set(folder.glob("records*.jsonl")) - known):
        found.add(path.name, "has no manifest beside it")
    parts = [re.fullmatch(r"manifest-(\d+)-of-(\d+)", path.stem) for path in paths]
    for shards in {int(part[2]) for part in parts if part}:
        there = {int(part[1]) for part in parts if part and int(part[2]) == shards}
        if absent := sorted(set(range(1, min(shards, 100_000) + 1)) - there):
            found.add(str(folder), f"lacks shard {absent[0]} of {shards}" + (f" and {len(absent) - 1} more" if absent[1:] else ""))


def _lines_of(manifest: Path) -> Path:
    return manifest.with_name(manifest.name.replace("manifest", "records", 1).replace(".json", ".jsonl"))


def _check_finished(path: Path, finished: Any, found: Verification) -> None:
    if finished is None:
        found.add(path.name, "is not finished; run certify --resume")
        return
    lines = _lines_of(path)
    data = lines.read_bytes() if lines.exists() else b""
    stated, lines_found = finished if isinstance(finished, dict) else {}, data.count(b"\n")
    if stated.get("lines") != lines_found:
        found.add(lines.name, f"expected the {stated.get('lines')!r} lines that {path.name} states, found {lines_found}")
    if stated.get("sha256") != hashlib.sha256(data).hexdigest():
        found.add(lines.name, f"expected the sha256 that {path.name} states, found another: the file is not what was written")


def _check_geometry(experiment: dict[str, Any], found: Verification) -> bool:
    """Windows inside the image, in the places that patch and k demand, over every position of the patch; the fill. True if all is so."""
    masks, before = experiment["masks"], len(found.findings)
    size, k, windows = masks["image_size"], masks["masks_per_axis"], masks["windows"]
    shapes, patches = [masks["patch_size"], *masks.get("other_patch_sizes", [])], masks.get("patches", 1)
    if size != experiment["model"]["image_size"]:
        found.add("manifest", f"masks.image_size {size} is not the model's {experiment['model']['image_size']}")
    for patch in shapes:
        if not all(type(side) is int and 1 <= side <= whole <= 10_000 for side, whole in zip(patch, size, strict=True)):
            found.add("manifest", f"masks: a patch of {patch} does not fit into {size}")
            return False
    if type(patches) is not int or patches not in (1, 2):
        found.add("manifest", f"masks.patches is {patches!r}")
        return False
    if type(k) is not int or k < 1:
        found.add("manifest", f"masks.masks_per_axis is {k!r}")
        return False
    if len(windows) * size[0] * size[1] > MOST_PIXELS:
        found.add("manifest", f"masks: {len(windows)} masks of {size} are too many to check")
        return False
    keep = np.ones((len(windows), *size), dtype=bool)
    for i, mask in enumerate(windows):
        for window in mask:
            top, left, height, width = window
            if (
                not all(type(side) is int for side in window)
                or min(top, left) < 0
                or min(height, width) < 1
                or top + height > size[0]
                or left + width > size[1]
            ):
                found.add("manifest", f"masks.windows[{i}]: {window} is not a window within {size}")
                return False
            keep[i, top : top + height, left : left + width] = False
    against = f"{f'{patches} patches' if patches > 1 else 'a patch'} of {' or '.join(map(str, shapes))}"
    if not all(mask == demanded for mask, demanded in zip_longest(windows, demanded(size, shapes, k, patches, len(windows)))):
        found.add("manifest", f"masks.windows are not those that {against} and masks_per_axis {k} demand")
    for patch in shapes:
        if hole := uncovered(keep, *patch):
            found.add("manifest", f"masks: a patch of {patch} at {hole} is covered by no mask")
    if patches == 2 and (pair := uncovered_pair(keep, shapes)):
        found.add("manifest", f"masks: patches of {pair[0][0]} at {pair[0][1]} and of {pair[1][0]} at {pair[1][1]} are covered by no mask")
    if found.kind == "certify" and type(experiment["exhaustive"]) is not bool:
        found.add("manifest", f"exhaustive is {experiment['exhaustive']!r}")
    if experiment.get("inference", "challenger") != "challenger":  # the default is not stated
        found.add("manifest", f"inference is {experiment['inference']!r}, expected 'challenger' or none")
    fill, mean = experiment["fill"], experiment["model"]["mean"]
    if np.shape(fill) != (3,) or not np.allclose(fill, mean, rtol=1e-6, atol=0):
        found.add("manifest", f"fill {fill} is not the model's mean {mean}")
    return len(found.findings) == before


def _records(manifests: dict[Path, dict[str, Any]], found: Verification) -> dict[int, dict[str, Any]]:
    """The lines that are objects with a place of their own, by that place."""
    records: dict[int, dict[str, Any]] = {}
    _, fields = KINDS[found.kind]
    for path in map(_lines_of, manifests):
        data = path.read_bytes() if path.exists() else b""
        if not data.endswith(b"\n") and data:
            found.add(path.name, "ends in the middle of a line")
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            where = f"{path.name}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                found.add(where, "is not JSON")
                continue
            if not isinstance(record, dict) or set(record) != fields:
                odd = sorted(set(record) ^ fields) if isinstance(record, dict) else [type(record).__name__]
                found.add(where, f"expected the fields of a record, found other or missing ones: {', '.join(odd[:5])}")
            elif type(index := record["index"]) is not int or index < 0:
                found.add(where, f"expected an index from 0 up, found {index!r}")
            elif index in records:
                found.add(where, f"image {index} occurs twice")
            else:
                records[index] = record
    return records


def _check_images(records: dict[int, dict[str, Any]], experiment: dict[str, Any], found: Verification) -> None:
    """Every image of the data once, with the names and labels that the data's fingerprint is of."""
    n, path = experiment["data"]["images"], "records"
    beyond = [index for index in records if index >= n]
    absent = n - (len(records) - len(beyond))
    if absent:
        first = next(index for index in count() if index not in records)
        found.add(path, f"lack image {first}" + (f" and {absent - 1} more" if absent > 1 else "") + f" of {n}")
    if beyond:
        found.add(path, f"hold image {min(beyond)} of only {n}")
    digest = hashlib.sha256()
    for index in sorted(records):
        digest.update(f"{records[index]['name']}\0{records[index]['label']}\n".encode(errors="surrogateescape"))
    if not absent and not beyond and digest.hexdigest() != experiment["data"]["fingerprint"]:
        found.add(path, "names or labels are not those of the data (data.fingerprint)")


def _check_record(index: int, record: dict[str, Any], experiment: dict[str, Any], found: Verification) -> bool:
    """What follows from what within one record. True if all of it does."""
    before = len(found.findings)
    masks, classes = len(experiment["masks"]["windows"]), experiment["model"]["num_classes"]
    most = 1 + masks * (masks + 1) // 2
    challenged = "inference" in experiment
    where = f"image {index} ({record['name']!r})"[:120]
    label = record["label"]

    def is_class(value: Any) -> bool:
        return type(value) is int and 0 <= value < classes

    def expect(holds: bool, what: str) -> None:
        if not holds:
            found.add(where, what)

    expect(
        isinstance(record["name"], str) and is_class(label),
        f"expected a name and a label below {classes}, found {record['name']!r}, {label!r}"[:160],
    )
    certified = record.get("certified", False)  # of detection it follows from the threshold
    expect(type(certified) is bool, f"certified is {certified!r}")
    if record["error"] is not None:
        empty = all(value is None for key, value in record.items() if key not in ("index", "name", "label", "certified", "passes", "error"))
        no_passes = type(record["passes"]) is int and record["passes"] == 0
        expect(empty and certified is False and no_passes, "an unreadable image has no labels and no certificate")
        expect(type(record["error"]) is str and record["error"] != "", f"error {record['error']!r} is no reason"[:160])
        return len(found.findings) == before
    expect(isinstance(record["pixels"], str) and re.fullmatch("[0-9a-f]{64}", record["pixels"]) is not None, "pixels is not a sha256")
    if found.kind == "detect":
        verify_detection.check_record(record, masks, is_class, expect)
        return len(found.findings) == before
    defended, pair, wrong, margin = (record[key] for key in ("defended_label", "failing_pair", "failing_label", "margin"))
    expect(
        is_class(record["vanilla_label"]) and is_class(defended),
        f"labels {record['vanilla_label']!r}, {defended!r} are not classes below {classes}",
    )
    expect(record["case"] in CASES["challenger" if challenged else "double-masking"], f"case is {record['case']!r}")
    finite = type(margin) in (int, float) and math.isfinite(margin) and margin >= 0
    expect(finite, f"margin {margin!r} is not a finite number from 0 up")
    passes = record["passes"]
    whole = record["certified"] is True or experiment["exhaustive"] is True
    one_fails = isinstance(pair, list) and len(pair) == 2 and pair[0] == pair[1]
    limit = min(most, 2 * masks) if challenged and one_fails else most  # a mask is out after each game
    fits = type(passes) is int and (passes == most if whole else 1 + masks <= passes <= limit)
    expect(fits, f"passes {passes!r}: expected {most if whole else f'{1 + masks} to {limit}'} with {masks} masks")
    if record["certified"] is True:
        right = defended == label and record["case"] == "agreed" and pair is None and wrong is None
        expect(right, "is certified, but its other fields say it is not")
        return len(found.findings) == before
    ordered = isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair) and 0 <= pair[0] <= pair[1] < masks
    expect(ordered, f"is not certified, but failing_pair {pair!r} is not a pair of the {masks} masks")
    expect(is_class(wrong) and wrong != label, f"is not certified, but failing_label {wrong!r} is not a wrong class")
    if ordered and pair[0] < pair[1]:
        expect(defended == label and record["case"] == "agreed", "fails on two masks only, but one mask alone does not answer the label")
    if ordered and pair[0] == pair[1]:
        expect(defended == wrong or record["case"] != "agreed", "fails on one mask, but all masks agree on another label")
    return len(found.findings) == before


def _is_certified(record: dict[str, Any]) -> bool:
    agreement = record.get("agreement")
    return record.get("certified") is True or (type(agreement) is float and agreement > 0)


def _check_model(experiment: dict[str, Any], model: Given, found: Verification) -> None:
    spec, network, trained = model
    for difference in differences(experiment["model"], spec.model_dump(mode="json"))[:3]:
        found.add("manifest", f"is of another model than was given: model.{difference}")
    if (here := weights_sha256(network)) != experiment["weights_sha256"]:
        found.add(
            "manifest",
            f"is of other weights than were given: sha256 {str(experiment['weights_sha256'])[:12]}... there, {here[:12]}... here",
        )
    for difference in differences(experiment["trained"], trained)[:3]:
        found.add("manifest", f"is of another training than was given: trained{'.' if difference[0] != ':' else ''}{difference}")
