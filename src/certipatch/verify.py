"""Check a folder of records from what it says, with code of its own.

Nothing here uses the mask geometry, the algorithms or the schedule of the library: coverage is tried position by
position on arrays of bool, and images are looked at again one view at a time by a naive restatement of PatchCleanser's
Algorithms 1 and 2. What is found wrong is a list of :class:`Finding`; an untouched folder has none.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import runtime
from .config import ModelSpec, differences
from .data import Images, Source
from .errors import one_line
from .models import weights_sha256

# Logits of one view computed in another batch differ by less (docs/trust.md has the measurement).
TOLERANCE = {"32-true": 1e-3}
LOW_PRECISION = 0.25
MOST_PIXELS = 2**28  # of all masks together, held in memory
WILD = 8  # views within the tolerance that are tried both ways

FIELDS = {
    "index", "name", "label", "pixels", "vanilla_label", "defended_label", "case", "certified", "failing_pair", "failing_label",
    "margin", "passes", "error",
}  # fmt: skip
EXPERIMENT = {
    "model", "weights_sha256", "trained", "masks", "fill", "data", "device", "precision", "block", "exhaustive",
}  # fmt: skip


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

    ``undecided`` images differ from their record by no more than rounding in another batch can do.
    """

    folder: str
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
        verdict = f"{len(self.findings)} findings" if self.findings else "nothing wrong found"
        return "\n".join(
            [*map(str, self.findings), f"{self.folder}: {self.certified} of {self.images} certified; {looked}{unclear}; {verdict}"]
        )

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "findings": [{"where": f.where, "what": f.what} for f in self.findings]}


Given = tuple[ModelSpec, nn.Sequential, dict[str, Any] | None]  # a model as options.open_model gives it


def verify(
    folder: Path, *, model: Given | None = None, source: Source | None = None, sample: int | None = 20, seed: int = 0, device: str = "auto"
) -> Verification:
    """Check the records that ``certify`` wrote into ``folder``.

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
    experiment = next(iter(manifests.values()))["experiment"]
    for path, manifest in manifests.items():
        for difference in differences(manifest["experiment"], experiment)[:3]:
            found.add(path.name, f"is of another experiment than its neighbour ({difference})")
    if odd := sorted(EXPERIMENT ^ set(experiment)):
        found.add("manifest", f"its experiment has other entries than those of a certification: {', '.join(odd)}")
        return found
    try:
        sound = _check_geometry(experiment, found)
        records = _records(manifests, found)
        found.images, found.certified = len(records), sum(record["certified"] is True for record in records.values())
        consistent = [index for index, record in records.items() if _check_record(index, record, experiment, found)]
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
        _look_again(chosen, records, experiment, model, source, device, found)
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
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            found.add(path.name, f"is damaged ({type(error).__name__}: {' '.join(str(error).split())[:80]})")
            continue
        if kind != "certify" or manifest.get("format") != 1 or not isinstance(experiment, dict):
            found.add(path.name, f"expected format 1 of certify, found {manifest.get('format')!r} of {kind!r}")
            continue
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
    size, patch, k, windows = masks["image_size"], masks["patch_size"], masks["masks_per_axis"], masks["windows"]
    if size != experiment["model"]["image_size"]:
        found.add("manifest", f"masks.image_size {size} is not the model's {experiment['model']['image_size']}")
    if not all(type(side) is int and 1 <= side <= whole <= 10_000 for side, whole in zip(patch, size, strict=True)):
        found.add("manifest", f"masks.patch_size {patch} does not fit into {size}")
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
    expected = ([[*corner, height, width]] for corner, height, width in _covering(size, patch, k))
    if not all(mask == demanded for mask, demanded in zip_longest(windows, expected)):
        found.add("manifest", f"masks.windows are not those that a patch of {patch} and masks_per_axis {k} demand")
    hole = _uncovered(keep, *patch)
    if hole:
        found.add("manifest", f"masks: a patch of {patch} at {hole} is covered by no mask")
    if type(experiment["exhaustive"]) is not bool:
        found.add("manifest", f"exhaustive is {experiment['exhaustive']!r}")
    fill, mean = experiment["fill"], experiment["model"]["mean"]
    if not np.allclose(fill, mean, rtol=1e-6, atol=0):
        found.add("manifest", f"fill {fill} is not the model's mean {mean}")
    return len(found.findings) == before


def _covering(size: list[int], patch: list[int], k: int) -> Iterator[tuple[tuple[int, int], int, int]]:
    """Corner, height and width of each mask of PatchCleanser's R-covering set, row by row."""
    sides, starts = [], []
    for n, p in zip(size, patch, strict=True):
        stride = math.ceil((n - p + 1) / min(k, n - p + 1))
        side = min(p + stride - 1, n)
        starts.append([min(i * stride, n - side) for i in range(math.ceil((n - side) / stride) + 1)])
        sides.append(side)
    for corner in product(*starts):
        yield (corner[0], corner[1]), sides[0], sides[1]


def _uncovered(keep: np.ndarray, h: int, w: int) -> tuple[int, int] | None:
    """Brute force: the first place of an h x w patch at which every mask of ``keep`` (masks, H, W) leaves some of it visible."""

    def any_of(values: np.ndarray, n: int) -> np.ndarray:
        """True where one of ``n`` values in a row is, along the first axis: the row grows until it is as long."""
        length = 1
        while length < n:
            step = min(length, n - length)
            values = values[:-step] | values[step:]
            length += step
        return values

    hole = np.ones((keep.shape[1] - h + 1, keep.shape[2] - w + 1), dtype=bool)
    for visible in keep:
        hole &= any_of(any_of(visible, h).T, w).T
    return tuple(np.argwhere(hole)[0].tolist()) if hole.any() else None


def _records(manifests: dict[Path, dict[str, Any]], found: Verification) -> dict[int, dict[str, Any]]:
    """The lines that are objects with a place of their own, by that place."""
    records: dict[int, dict[str, Any]] = {}
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
            if not isinstance(record, dict) or set(record) != FIELDS:
                odd = sorted(set(record) ^ FIELDS) if isinstance(record, dict) else [type(record).__name__]
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
    where = f"image {index} ({record['name']!r})"[:120]
    label, defended, pair, wrong, margin = (record[key] for key in ("label", "defended_label", "failing_pair", "failing_label", "margin"))

    def is_class(value: Any) -> bool:
        return type(value) is int and 0 <= value < classes

    def expect(holds: bool, what: str) -> None:
        if not holds:
            found.add(where, what)

    expect(
        isinstance(record["name"], str) and is_class(label),
        f"expected a name and a label below {classes}, found {record['name']!r}, {label!r}"[:160],
    )
    expect(type(record["certified"]) is bool, f"certified is {record['certified']!r}")
    if record["error"] is not None:
        empty = all(record[key] is None for key in FIELDS - {"index", "name", "label", "certified", "passes", "error"})
        expect(empty and record["certified"] is False and record["passes"] == 0, "an unreadable image has no labels and no certificate")
        return len(found.findings) == before
    expect(
        is_class(record["vanilla_label"]) and is_class(defended),
        f"labels {record['vanilla_label']!r}, {defended!r} are not classes below {classes}",
    )
    expect(record["case"] in ("agreed", "disagreer", "majority"), f"case is {record['case']!r}")
    expect(isinstance(record["pixels"], str) and re.fullmatch("[0-9a-f]{64}", record["pixels"]) is not None, "pixels is not a sha256")
    finite = type(margin) in (int, float) and math.isfinite(margin) and margin >= 0
    expect(finite, f"margin {margin!r} is not a finite number from 0 up")
    passes = record["passes"]
    whole = record["certified"] is True or experiment["exhaustive"] is True
    fits = type(passes) is int and (passes == most if whole else 1 + masks <= passes <= most)
    expect(fits, f"passes {passes!r}: expected {most if whole else f'{1 + masks} to {most}'} with {masks} masks")
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


# --- What the model says ---------------------------------------------------------------------------------------------


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


def double_masking(first: list[int], second: Any) -> tuple[int, str]:
    """Algorithm 1, restated: the answer, and the case that decided. ``second(i)`` lists the labels under mask i and each mask."""
    votes = Counter(first)
    majority = min(votes, key=lambda label: (-votes[label], label))
    if len(votes) == 1:
        return majority, "agreed"
    for i, label in enumerate(first):
        if label != majority and set(second(i)) == {label}:
            return label, "disagreer"
    return majority, "majority"


def _look_again(
    chosen: list[int], records: dict[int, dict[str, Any]], experiment: dict[str, Any],
    model: Given, source: Source, device: str, found: Verification,
) -> None:  # fmt: skip
    """Every view of the chosen images, one at a time."""
    spec, network, _ = model
    fabric = runtime.fabric(device=device, precision=experiment["precision"])
    images, function = Images(source, spec), fabric.setup_module(network).eval()
    tolerance = TOLERANCE.get(experiment["precision"], LOW_PRECISION)
    fill = torch.tensor(experiment["fill"], dtype=torch.float32).reshape(3, 1, 1)
    windows = experiment["masks"]["windows"]
    with torch.inference_mode(), runtime.progress_bar(len(chosen), "verify") as advance:
        for index in chosen:
            item, record = images[index], records[index]
            where = f"image {index} ({item.name!r})"[:120]
            advance(1, f"findings so far {len(found.findings)}")
            found.recomputed += 1
            if (item.name, item.label) != (record["name"], record["label"]):
                found.add(where, f"the record has {record['name']!r} with label {record['label']!r}, the data label {item.label}"[:160])
            if item.pixels is None or record["error"] is not None:
                if (item.error is None) != (record["error"] is None):
                    found.add(where, f"can be read: {item.error is None}, which the record says otherwise")
                continue
            if hashlib.sha256(item.pixels.numpy().tobytes()).hexdigest() != record["pixels"]:
                found.add(where, "its pixels are not those that were certified (sha256)")
                continue
            image = item.pixels.float() / 255

            def look(i: int | None, j: int | None, image: torch.Tensor = image) -> tuple[int, int, float]:
                """Best and second label of one view, and the margin between them."""
                view = image.clone()
                for mask in (i, j):
                    for top, left, height, width in windows[mask] if mask is not None else []:
                        view[:, top : top + height, left : left + width] = fill
                logits = function(view[None].to(fabric.device))[0].float().cpu().numpy()
                order = np.argsort(-logits, kind="stable")
                return int(order[0]), int(order[1]), float(logits[order[0]] - logits[order[1]])

            views = {(i, j): look(i, j) for i in range(len(windows)) for j in range(i, len(windows))}
            undecided = _compare(where, record, look(None, None), views, len(windows), tolerance, found)
            found.undecided += undecided


def _compare(
    where: str, record: dict[str, Any], vanilla: tuple[int, int, float], views: dict[tuple[int, int], tuple[int, int, float]],
    n: int, tolerance: float, found: Verification,
) -> bool:  # fmt: skip
    """Compare a record with all views of its image. True if they differ by no more than rounding can do."""
    label, before, undecided = record["label"], len(found.findings), False

    def differs(what: str, sure: bool) -> None:
        nonlocal undecided
        if sure:
            found.add(where, what)
        else:
            undecided = True

    if record["vanilla_label"] != vanilla[0]:
        differs(
            f"vanilla_label {record['vanilla_label']!r}, found {vanilla[0]}",
            vanilla[2] > tolerance or record["vanilla_label"] != vanilla[1],
        )

    wrong = {pair: view for pair, view in views.items() if view[0] != label}
    if record["certified"] is True and wrong:
        pair, view = max(wrong.items(), key=lambda entry: entry[1][2])
        differs(f"is not certified: masks {pair} answer {view[0]} with a margin of {view[2]:.3g}", view[2] > tolerance)
    if record["certified"] is not True and not wrong:
        differs("is certified, which the record says it is not", min(view[2] for view in views.values()) > tolerance)
    if record["failing_pair"] is not None:
        best, second, margin = views[tuple(record["failing_pair"])]  # type: ignore[index]
        if best != record["failing_label"]:
            differs(
                f"masks {record['failing_pair']} answer {best}, the record says {record['failing_label']!r}",
                margin > tolerance or second != record["failing_label"],
            )

    # Algorithm 1 on the labels, and on those that rounding could have made of them.
    wild = [pair for pair in sorted(views) if views[pair][2] <= tolerance]
    answers = set()
    for flipped in product((0, 1), repeat=len(wild)) if len(wild) <= WILD else [(0,) * len(wild)]:
        labels = {pair: view[0] for pair, view in views.items()}
        for pair, second_best in zip(wild, flipped, strict=True):
            labels[pair] = views[pair][1] if second_best else views[pair][0]
        answer = double_masking([labels[i, i] for i in range(n)], lambda i, labels=labels: [labels[min(i, j), max(i, j)] for j in range(n)])
        answers.add(answer)
        if not any(flipped) and answer != (record["defended_label"], record["case"]):
            undecided = True
    if (record["defended_label"], record["case"]) not in answers:
        differs(f"answers {sorted(answers)[0]}, the record says {(record['defended_label'], record['case'])}", len(wild) <= WILD)

    low, high = min(view[2] for view in views.values()), min(views[i, i][2] for i in range(n))
    if record["passes"] == 1 + len(views):
        high = low
    if not low - tolerance <= record["margin"] <= high + tolerance:
        span = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
        found.add(where, f"margin {record['margin']!r}, found {span}")
    return undecided and len(found.findings) == before
