"""An attack, as ``verify`` knows it: its lines, its certification, and its pictures, which are replayed.

Nothing here comes from ``redteam``, whose folders are checked by it: where the clean table leaves a way open,
what a patch may change, and how many attempts there were is stated here a second time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic_core import to_json

from ..config import differences
from ..data.decode import UNREADABLE, decode, open_image
from ..data.source import Images, Source
from ..runtime.team import Team
from .evidence import kind_of
from .findings import Experiment, Given, Record, Verification, place
from .geometry import Masks
from .goals import Goals, compare_goal
from .methods import restatement_of
from .patchcleanser import WILD, Table, View, inference_of, table_of
from .record import check_labels, is_sha256
from .restatement import Line, Restatement, Sighting
from .views import look_again
from .windows import compare_attacked

PLACE = ("top", "left", "height", "width")
PICTURE = ("image", "pixels")
GOAL = ("row", "target")


def _flaws(experiment: Experiment) -> Iterator[str]:
    """What is wrong with how an attack says that it was made, beside the experiment of its certification."""
    certification = experiment["certification"]
    restated = restatement_of("certify", certification)
    odd = restated.odd_entries(certification)
    if odd or restated.compare is None:
        yield f"certification has other entries than those of {restated.defense}: {', '.join(odd)}"
        return
    if against(certification).get("patches", 1) != 1:
        yield "certification: expected 1 patch, which is what attacks have"
    if experiment["precision"] != certification["precision"]:
        yield f"precision is {experiment['precision']!r}, certification.precision another"
    if not isinstance(experiment["device"], str):
        yield f"device is {experiment['device']!r}"
    yield from _odd_numbers(experiment, certification["data"]["images"])


def against(certification: Experiment) -> dict[str, Any]:
    """What a certification is against: its masks say it, or without masks its threat."""
    found: dict[str, Any] = certification["masks" if "masks" in certification else "threat"]
    return found


def _odd_numbers(experiment: Experiment, images: Any) -> Iterator[str]:
    n, settings = experiment["images"], experiment["attack"]
    if not (type(n) is int and type(images) is int and 1 <= n <= images):
        yield f"images is {n!r}, expected 1 to the {images!r} of the certification"
    if not is_sha256(experiment["records_sha256"]):
        yield "records_sha256 is not a sha256"
    for name in ("steps", "restarts", "certified_restarts"):
        if type(settings[name]) is not int or settings[name] < 1:
            yield f"attack.{name} is {settings[name]!r}"
    if type(settings["seed"]) is not int:
        yield f"attack.seed is {settings['seed']!r}"


def _check_line(line: Line) -> None:
    """What follows from what within one line."""
    record = line.record
    line.expect(
        isinstance(record["name"], str) and line.is_class(record["label"]),
        f"expected a name and a label below {line.classes}, found {record['name']!r}, {record['label']!r}",
    )
    for name in ("ways", "attempts"):
        whole = type(record[name]) is int and record[name] >= 0
        line.expect(whole, f"{name} {record[name]!r} is not a number from 0 up")
    for name in ("certified", "broken"):
        line.expect(type(record[name]) is bool, f"{name} is {record[name]!r}")
    wrong = record["defended_label"] != record["label"]
    line.expect(record["broken"] is wrong, f"broken is {record['broken']!r}, its labels say {wrong}")
    if record["certified"] is True:
        line.expect(not wrong, f"is certified, and its answer is {record['defended_label']!r}")
        line.expect(record["ways"] == 0, f"is certified, and yet {record['ways']!r} ways are open")
    if record["top"] is None:
        _check_without_patch(line)
    else:
        _check_patch(line)


def _check_without_patch(line: Line) -> None:
    """An image that was not attacked has a wrong answer, or cannot be read, and nothing of a patch."""
    record = line.record
    empty = all(record[name] is None for name in (*PLACE, *PICTURE, *GOAL))
    none = record["attempts"] == 0 and record["ways"] == 0
    line.expect(empty and none, "has no patch, and parts of one")
    line.expect(record["defended_label"] != record["label"], "is right without a patch, and was not attacked")
    labels = [record[name] for name in ("defended_label", "vanilla_label")]
    line.expect(labels == [None, None] or all(map(line.is_class, labels)), f"labels {labels} are no classes")


def _check_patch(line: Line) -> None:
    """There is a patch of one of the shapes within the image, with a picture, a goal, and attempts."""
    record, threat = line.record, against(line.experiment)
    size, shapes = threat["image_size"], [threat["patch_size"], *threat.get("other_patch_sizes", [])]
    check_labels(line, record["defended_label"], record["vanilla_label"])
    top, left, height, width = (record[name] for name in PLACE)
    line.expect(
        all(type(record[name]) is int for name in PLACE)
        and [height, width] in shapes
        and 0 <= top <= size[0] - height
        and 0 <= left <= size[1] - width,
        f"the patch of {height!r} x {width!r} at ({top!r}, {left!r}) is not one of {shapes} in {size}",
    )
    none_open = record["broken"] is True and record["ways"] == 0
    line.expect(not none_open, "is broken by a patch, and yet no way is open")
    named = record["image"] == f"patched/{record['index']}.png"
    line.expect(named, f"image {record['image']!r} is not the picture of image {record['index']}")
    line.expect(is_sha256(record["pixels"]), "pixels is not a sha256")
    _check_goal(line)


def _check_goal(line: Line) -> None:
    """What the patch was to do can be done against the masks, or the windows."""
    record = line.record
    row, target = (record[name] for name in GOAL)
    if "masks" not in line.experiment:
        aims = row is None and line.is_class(target) and target != record["label"]
        line.expect(aims, f"row {row!r}, target {target!r} are no goal against windows")
        return
    known = type(row) is int and 0 <= row < line.masks and line.is_class(target)
    outvotes = row is None and target is None
    line.expect(
        outvotes or (known and target != record["label"]),
        f"row {row!r}, target {target!r} are no goal with {line.masks} masks",
    )


def most_attempts(starts: int) -> int:
    """How many patches are judged on an image that is never broken: heats of 2, 4, 8 ... starts, of which
    the better half goes on."""
    judged, heat = 0, 2
    while starts > 0:
        on = min(heat, starts)
        starts, heat = starts - on, 2 * heat
        while on:
            judged, on = judged + on, on // 2
    return judged


ATTACK = Restatement(
    defense="attack",
    entries=frozenset({"certification", "records_sha256", "attack", "images", "device", "precision"}),
    optional=frozenset(),
    fields=frozenset(
        {
            "index",
            "name",
            "label",
            "certified",
            "ways",
            "broken",
            "attempts",
            "defended_label",
            "vanilla_label",
        }
        | {*PLACE, *PICTURE, *GOAL}
    ),
    flaws=_flaws,
    check_line=_check_line,
    compare=None,
    counted="certified, as the attack states (give --records)",
)


def check_lines(records: dict[int, Record], experiment: Experiment, found: Verification) -> list[int]:
    """Check each line of an attack, and that they are of the images that were to be attacked.

    Returns the images whose line does not contradict itself, in order.
    """
    consistent = []
    for index, record in sorted(records.items()):
        before = len(found.findings)
        line = Line(place(index, record["name"]), record, experiment["certification"], found)
        _check_line(line)
        _check_attempts(line, experiment["attack"])
        if len(found.findings) == before:
            consistent.append(index)
    _check_choice(records, experiment, found)
    return consistent


def _check_attempts(line: Line, settings: dict[str, Any]) -> None:
    """An image that withstood had all its attempts, a broken one at most as many."""
    record = line.record
    if record["top"] is None or type(record["attempts"]) is not int:
        return
    most = most_attempts(settings["restarts" if record["ways"] else "certified_restarts"])
    few = 1 if record["broken"] is True else most
    expected = str(most) if few == most else f"{few} to {most}"
    line.expect(few <= record["attempts"] <= most, f"attempts {record['attempts']}: expected {expected}")


def _check_choice(records: dict[int, Record], experiment: Experiment, found: Verification) -> None:
    """The images are those that are spread evenly over all that were certified."""
    n, images = experiment["images"], experiment["certification"]["data"]["images"]
    if len(records) != n:
        found.add("attacks", f"are of {len(records)} images, expected {n}")
    beyond = next((index for index in sorted(records) if not _is_chosen(index, n, images)), None)
    if beyond is not None:
        found.add("attacks", f"hold image {beyond}, which is not one of {n} spread evenly over {images}")


def _is_chosen(index: int, n: int, images: int) -> bool:
    number = (index * n + images - 1) // images
    return number < n and number * images // n == index


def check_certification(
    records: dict[int, Record],
    experiment: Experiment,
    certification: tuple[Experiment, dict[int, Record]],
    found: Verification,
) -> None:
    """What an attack says of the certification that it is on must be so of the one that was given."""
    stated, lines = certification
    for difference in differences(experiment["certification"], stated)[:3]:
        found.add("manifest", f"is of another certification than was given: {difference}")
    if digest(lines[index] for index in sorted(lines)) != experiment["records_sha256"]:
        found.add("manifest", "records_sha256 is of other records than those of the certification given")
    for index, record in sorted(records.items()):
        there = lines.get(index, {})
        for name in ("name", "label", "certified"):
            if differences(there.get(name), record[name]):
                what = f"{name} {record[name]!r}, the certification has {there.get(name)!r}"
                found.add(place(index, record["name"]), what)


def digest(lines: Iterable[Record]) -> str:
    """sha256 over the lines of a certification, as short JSON."""
    return hashlib.sha256(b"\n".join(map(to_json, lines))).hexdigest()


@dataclass(frozen=True)
class Pictures:
    """The patched pictures in a folder of an attack.

    Attributes:
        found: (3, H, W) uint8 by the index of the image, for those that are what was judged.
    """

    folder: Path
    found: dict[int, np.ndarray] = field(default_factory=dict)

    def check(self, records: dict[int, Record], indices: Iterable[int], found: Verification) -> None:
        """Each line with a patch has its picture, of these very pixels."""
        for index in indices:
            record = records[index]
            if record["top"] is None:
                continue
            path = self.folder / "patched" / f"{index}.png"
            try:
                pixels = np.asarray(decode(open_image(path))).transpose(2, 0, 1)
            except UNREADABLE as error:
                found.add(f"patched/{index}.png", f"cannot be read ({type(error).__name__})")
                continue
            if hashlib.sha256(pixels.tobytes()).hexdigest() == record["pixels"]:
                self.found[index] = pixels
            else:
                found.add(f"patched/{index}.png", "its pixels are not those that were judged (sha256)")


def replay(
    records: dict[int, Record],
    experiment: Experiment,
    pictures: Pictures,
    *,
    model: Given,
    source: Source,
    device: str,
    team: Team | None = None,
    found: Verification,
) -> None:
    """Let the defense answer again on each picture, by views that are looked at one at a time."""
    certification = experiment["certification"]
    images = Images(source, model.spec)
    kind = None if "masks" in certification else kind_of(certification["defense"], certification)
    goals = Goals(Masks.of(certification["masks"])) if kind is None else None

    def beside(index: int, record: Record) -> Record:
        """The line with what ``look_again`` compares the clean image with."""
        pixels = images[index].pixels
        unread = "it could not be read" if record["defended_label"] is None else None
        seen_as = None if pixels is None else hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        return {**record, "error": unread, "pixels": seen_as}

    def compare(sighting: Sighting) -> None:
        patched = pictures.found.get(sighting.record["index"])
        if kind is not None:
            on_patched = None if patched is None else patched_sighting(sighting, patched)
            compare_attacked(kind, sighting, on_patched)
            return
        assert goals is not None  # of masks
        clean = table_of(sighting)
        if sighting.record["top"] is None:
            _compare_answers(sighting, clean, sighting.record["defended_label"])
            return
        _compare_answers(sighting, clean, sighting.record["label"], vanilla=False)
        compare_goal(sighting, clean, goals)
        if patched is not None:
            _compare_patched(sighting, patched)

    again = {index: beside(index, record) for index, record in records.items()}
    on: dict[str, Any] = {"model": model, "source": source, "device": device, "team": team}
    look_again(again, certification, compare, **on, found=found)


def patched_sighting(sighting: Sighting, patched: np.ndarray) -> Sighting | None:
    """The picture in place of the image; None if it is not the clean image but for the patch, which is
    noted."""
    record, clean = sighting.record, (sighting.image * 255).round().to(torch.uint8).numpy()
    top, left, height, width = (record[name] for name in PLACE)
    same = patched.shape == clean.shape
    if same:
        outside = np.ones(clean.shape, dtype=bool)
        outside[:, top : top + height, left : left + width] = False
        same = np.array_equal(clean[outside], patched[outside])
    if not same:
        sighting.differs("its picture differs from the image outside the patch", surely=True)
        return None
    return replace(sighting, image=torch.from_numpy(patched.copy()).float() / 255)


def _compare_patched(sighting: Sighting, patched: np.ndarray) -> None:
    """The picture is the clean image but for the patch, and the defense answers on it what the line says."""
    on_patched = patched_sighting(sighting, patched)
    if on_patched is not None:
        _compare_answers(on_patched, table_of(on_patched), sighting.record["defended_label"])


def _compare_answers(sighting: Sighting, table: Table, stated: int, *, vanilla: bool = True) -> None:
    """The defense answers as stated, or would if rounding had moved some of the labels; the undefended model
    as the line says."""
    infer, n = inference_of(sighting.experiment).answer, sighting.masks
    labels = {pair: view.best for pair, view in table.items()}
    answer = infer(labels, n)[0]
    if answer != stated:
        wild = {pair: view for pair, view in table.items() if view.margin <= sighting.tolerance}
        either = product(*((view.best, view.second) for view in wild.values()))
        possible = len(wild) > WILD or stated in {
            infer({**labels, **dict(zip(wild, chosen, strict=True))}, n)[0] for chosen in either
        }
        sighting.differs(f"the defense answers {answer}, the line says {stated!r}", surely=not possible)
    view = View.of(sighting.under())
    if vanilla and view.best != sighting.record["vanilla_label"]:
        sighting.differs(
            f"vanilla_label {sighting.record['vanilla_label']!r}, found {view.best}",
            surely=view.margin > sighting.tolerance or view.second != sighting.record["vanilla_label"],
        )
