"""``verify`` finds nothing in an untouched folder of an attack, and names whatever was forged in one.

It does so even where the forger has mended the hashes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from breakable import certify
from certipatch.certification.restore import restore
from certipatch.data.source import Source
from certipatch.models.runs import Opened
from certipatch.records.read import read_folder
from certipatch.records.schema import digest
from certipatch.redteam.attack import attack
from certipatch.redteam.climb import AttackConfig
from certipatch.runtime.devices import make_fabric
from certipatch.verify import attack as restated
from certipatch.verify.check import verify
from inputs import write_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = AttackConfig(steps=1, restarts=3, certified_restarts=2)
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Opened, Source]:
    """A folder with a certification ``c`` of 32 images and an attack ``a`` on 30 of them, the model and data.

    Among them are images of every fate: certified, broken, wrong without a patch, and withstood without a
    certificate.
    """
    folder = tmp_path_factory.mktemp("attacks")
    opened, source = certify(folder / "c", mislabelled=6)
    fabric, certified = make_fabric(device="cpu"), read_folder(folder / "c")
    defense = restore(certified.manifest, opened, fabric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("certipatch.redteam.climb.STEP", 0.0)  # an attack that leaves images unbroken
        attack(opened, source, defense, certified, folder / "a", fabric=fabric, config=CONFIG, limit=30)
    lines = lines_of(folder / "a")
    fates = {(line["certified"], line["broken"], line["top"] is None) for line in lines}
    assert fates >= {(True, False, False), (False, True, False), (False, True, True), (False, False, False)}
    return folder, opened, source


def lines_of(folder: Path) -> Lines:
    return [json.loads(line) for line in (folder / "attacks.jsonl").read_text().splitlines()]


def write(folder: Path, lines: Lines, change: Callable[[dict[str, Any]], object] = lambda _: None) -> None:
    """Write the lines, and change the manifest, with all hashes mended."""
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (folder / "attacks.jsonl").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["finished"] |= {"lines": len(lines), "sha256": hashlib.sha256(data).hexdigest()}
    change(manifest)
    write_manifest(folder / "manifest.json", manifest)


@pytest.fixture
def forged(given: tuple[Path, Opened, Source], tmp_path: Path) -> Path:
    """A copy of both folders."""
    shutil.copytree(given[0], tmp_path / "forged")
    return tmp_path / "forged"


def findings(folder: Path, given: tuple[Path, Opened, Source], **options: Any) -> list[str]:
    """What is wrong with the attack beside its certification; if nothing is, every image is looked at
    again."""
    said = verify(folder / "a", certification=folder / "c").findings
    if said and not options:
        return list(map(str, said))
    _, model, source = given
    everything = {"model": model, "source": source, "sample": None, "device": "cpu"}
    found = verify(folder / "a", **everything | {"certification": folder / "c"} | options)
    return list(map(str, found.findings))


def test_an_untouched_folder(given: tuple[Path, Opened, Source]):
    folder, model, source = given
    found = verify(folder / "a", model=model, source=source, sample=None, certification=folder / "c")
    assert found.findings == []
    assert (found.kind, found.images, found.recomputed, found.undecided) == ("attack", 30, 30, 0)
    assert found.certified == sum(line["certified"] for line in lines_of(folder / "a"))
    assert f"certified, as in {folder / 'c'}" in found.text(again=True)
    alone = verify(folder / "a")
    assert alone.findings == []
    assert "as the attack states" in alone.text(again=False)
    assert verify(folder / "a", model=model, source=source, sample=4, device="cpu").recomputed == 4


def test_the_digest_is_that_of_the_records(given: tuple[Path, Opened, Source]):
    """Also of numbers that JSON can be written with in several ways."""
    records = read_folder(given[0] / "c").records
    for margin in (1e-5, 1.234e-5, 1e-7, 0.1, 1.0, 1e16, 1e22, 5e-324):
        some = [record.model_copy(update={"margin": margin, "name": "é\x7f\u2028"}) for record in records]
        assert restated.digest(one.model_dump(mode="json") for one in some) == digest(some)


# A value of each type, in place of that of a field.
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    2,
    5,
    -1,
    1.0,
    0.5,
    "0",
    "yes",
    "patched/0.png",
    [],
    {},
    [0],
)
FATES = {
    "certified": lambda line: line["certified"],
    "broken": lambda line: line["broken"] and line["top"] is not None,
    "wrong anyway": lambda line: line["top"] is None,
    "withstood": lambda line: not line["certified"] and not line["broken"],
}
FIELDS = (
    *("index", "name", "label", "certified", "ways", "broken", "top", "left", "height", "width", "row"),
    *("target", "defended_label", "vanilla_label", "attempts", "image", "pixels"),
)


def possible(line: dict[str, Any], field: str, value: Any) -> bool:
    """What nothing can tell: a broken image may have had fewer attempts, and its place and goal are where
    they are open; a picture may differ from the image on a part of the patch only."""
    within = field == "attempts" and line["broken"] and line["top"] is not None and type(value) is int
    return within and 1 <= value <= restated.most_attempts(CONFIG.restarts)


@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("field", FIELDS)
def test_each_field_of_a_line(given: tuple[Path, Opened, Source], forged: Path, field: str, fate: str):
    """Each field with a value of each type and some of its own type, on an image of each fate."""
    lines = lines_of(given[0] / "a")
    number = max(n for n, line in enumerate(lines) if FATES[fate](line))  # the later ones are clearer
    line = lines[number]
    own = [line[field] + step for step in (-1, 1)] if type(line[field]) is int else []
    others = [value for value in (*OTHERS, *own) if json.dumps(value) != json.dumps(line[field])]
    for value in others:
        if not possible(line, field, value):
            write(forged / "a", [*lines[:number], {**line, field: value}, *lines[number + 1 :]])
            assert findings(forged, given), (field, value, line)


def test_a_patch_is_where_the_picture_says(given: tuple[Path, Opened, Source], forged: Path):
    """A place beside that of the patch is found for every line: the picture differs outside it, or the goal
    is not open there."""
    lines, found = lines_of(given[0] / "a"), 0
    for number, line in enumerate(lines):
        if line["top"] is not None:
            moved = {**line, "top": (line["top"] + 2) % 5}
            write(forged / "a", [*lines[:number], moved, *lines[number + 1 :]])
            said = findings(forged, given)
            found += any("outside the patch" in one for one in said)
            assert said
    assert found > 10


@pytest.mark.parametrize("fate", ["certified", "broken", "withstood"])
def test_pictures(given: tuple[Path, Opened, Source], forged: Path, fate: str):
    lines = lines_of(given[0] / "a")
    number = max(n for n, line in enumerate(lines) if FATES[fate](line))  # the later ones are clearer
    line = lines[number]
    path = forged / "a" / line["image"]
    data = path.read_bytes()

    def repainted(change: Callable[[np.ndarray], np.ndarray]) -> list[str]:
        """What is found where the picture is another, and the line has its hash."""
        pixels = change(np.array(Image.open(given[0] / "a" / line["image"])))
        Image.fromarray(pixels).save(path)
        mended = {**line, "pixels": hashlib.sha256(pixels.transpose(2, 0, 1).tobytes()).hexdigest()}
        write(forged / "a", [*lines[:number], mended, *lines[number + 1 :]])
        return findings(forged, given)

    def elsewhere(pixels: np.ndarray) -> np.ndarray:
        pixels[(line["top"] + 3) % 6, (line["left"] + 3) % 6, 1] ^= 1
        return pixels

    assert any("outside the patch" in one for one in repainted(elsewhere))
    assert any("outside the patch" in one for one in repainted(lambda pixels: pixels[:5]))
    _, _, source = given
    clean = np.array(source.open(line["index"]))
    if line["broken"]:
        assert any("the line says" in one for one in repainted(lambda _: clean))
    write(forged / "a", lines)
    path.write_bytes(data[: len(data) // 2])
    assert any(line["image"] in one for one in findings(forged, given))
    path.unlink()
    assert any(f"{line['image']}: cannot be read" in one for one in findings(forged, given))
    path.symlink_to("/dev/zero")
    assert any(f"{line['image']}: cannot be read" in one for one in findings(forged, given))


LINES: dict[str, tuple[Callable[[Lines], object], str]] = {
    "dropped": (lambda lines: lines.pop(3), "are of 29 images, expected 30"),
    "doubled": (lambda lines: lines.append(lines[2]), "occurs twice"),
    "another image": (lambda lines: lines[-1].update(index=31), "spread evenly"),
    "field added": (lambda lines: lines[0].update(note=1), "note"),
    "field removed": (lambda lines: lines[0].pop("ways"), "ways"),
}


@pytest.mark.parametrize(("change", "words"), LINES.values(), ids=LINES)
def test_lines(
    given: tuple[Path, Opened, Source], forged: Path, change: Callable[[Lines], object], words: str
):
    lines = lines_of(forged / "a")
    change(lines)
    write(forged / "a", lines)
    found = findings(forged, given)
    assert any(words in one for one in found), found


def of_experiment(**entries: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["experiment"].update(entries)


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "hash of the records": of_experiment(records_sha256="0" * 64),
    "no hash of the records": of_experiment(records_sha256=None),
    "images": of_experiment(images=29),
    "images as a fraction": of_experiment(images=30.0),
    "precision": of_experiment(precision="bf16-mixed"),
    "device": of_experiment(device=None),
    "entry added": of_experiment(note=1),
    "no attack": of_experiment(attack=None),
    "restarts": lambda m: m["experiment"]["attack"].update(restarts=7),
    "restarts of none": lambda m: m["experiment"]["attack"].update(restarts=0),
    "certified restarts": lambda m: m["experiment"]["attack"].update(certified_restarts=3),
    "seed as a word": lambda m: m["experiment"]["attack"].update(seed="0"),
    "weights": lambda m: m["experiment"]["certification"].update(weights_sha256="0" * 64),
    "fill": lambda m: m["experiment"]["certification"].update(fill=[0.4, 0.5, 0.5]),
    "a mask less": lambda m: m["experiment"]["certification"]["masks"]["windows"].pop(),
    "a smaller patch": lambda m: m["experiment"]["certification"]["masks"].update(patch_size=[1, 1]),
    "fingerprint": lambda m: m["experiment"]["certification"]["data"].update(fingerprint="0" * 64),
    "no masks": lambda m: m["experiment"]["certification"].update(masks=None),
    "certification of words": of_experiment(certification="c"),
    "kind": lambda m: m.update(kind="train"),
    "format": lambda m: m.update(format=True),
    "not finished": lambda m: m.update(finished=None),
    "lines as a fraction": lambda m: m["finished"].update(lines=30.0),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_manifests(
    given: tuple[Path, Opened, Source], forged: Path, change: Callable[[dict[str, Any]], object]
):
    write(forged / "a", lines_of(forged / "a"), change)
    assert findings(forged, given)


@pytest.mark.parametrize("field", ["name", "label", "certified", "margin", "passes"])
def test_another_certification(given: tuple[Path, Opened, Source], forged: Path, field: str):
    """The certification was changed, with its hashes mended, and the attack was not."""
    path = forged / "c" / "records.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    line = next(line for line in lines if line["certified"])
    line[field] = {"name": "other", "label": (line["label"] + 1) % 3, "certified": False}.get(field, 3)
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(data)
    manifest = json.loads((forged / "c" / "manifest.json").read_text())
    manifest["finished"]["sha256"] = hashlib.sha256(data).hexdigest()
    write_manifest(forged / "c" / "manifest.json", manifest)
    found = findings(forged, given)
    assert any("records_sha256 is of other records" in one for one in found), found


def test_on_the_command_line(cli, given: tuple[Path, Opened, Source], forged: Path):
    done = cli("verify", forged / "a", records=forged / "c")
    assert (done.code, done.err) == (0, ""), done.out
    write(forged / "a", [{**line, "certified": True} for line in lines_of(forged / "a")])
    done = cli("verify", forged / "a")
    assert (done.code, done.err) == (1, ""), done.out
    done = cli("verify", forged / "c", records=forged / "c")
    assert (done.code, "give them with an attack" in done.err) == (2, True)
    done = cli("verify", forged / "a", records=forged / "a")
    assert (done.code, "expected a folder that certify wrote" in done.err) == (2, True)
