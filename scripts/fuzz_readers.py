"""Feed damaged and malicious files to everything that reads one: only a clear refusal may come of it.

    python scripts/fuzz_readers.py --inputs 1000000

Each input has a seed of its own; from it a valid file (made here) is damaged: entries of JSON and TOML trees
are removed, exchanged or replaced by odd values, and bytes are flipped, cut out and repeated. A reader may
answer or raise a CertiPatchError; an image may be unreadable. Anything else stops the script with the input
in a file.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import random
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from rich.console import Console

from certipatch.certification.certify import certify
from certipatch.certification.restore import (
    certified_masks,
    images_as_certified,
    read_certification,
    restore,
)
from certipatch.data.decode import UNREADABLE, decode, open_image
from certipatch.data.load import load_source
from certipatch.data.source import Images
from certipatch.errors import CertiPatchError, DataError
from certipatch.geometry.masks import MaskSet
from certipatch.models.build import build, describe
from certipatch.models.runs import open_run
from certipatch.models.small import SMALL_CNN
from certipatch.models.weights import read_weights
from certipatch.records.manifest import MANIFEST, read_manifest
from certipatch.records.read import read_folder, read_lines
from certipatch.records.schema import ATTACKS, RECORDS
from certipatch.records.seals import LineHashes, seal, sha256
from certipatch.redteam.attack import attack
from certipatch.redteam.climb import AttackConfig
from certipatch.report.attack import attack_text, summarize_attack
from certipatch.report.certification import summarize, table
from certipatch.report.detection import detection_table, summarize_detection
from certipatch.reproduce.plan import plan
from certipatch.reproduce.recipe import FOLDER, NAMES, read_recipe
from certipatch.runtime.console import stderr
from certipatch.runtime.devices import make_fabric
from certipatch.training.config import TrainConfig
from certipatch.training.train import train
from certipatch.verify.check import verify

WORDS = "0 1 a NaN null ../x /dev/zero [red] [/red] [ \\ %s {} $\\x$ 3% 1e9% 1/0% 32x32"
NUMBERS = "0 1 -1 2 3 7 255 0.5 -0.0 1e308 -1e308 1e-320 NaN Infinity"
LARGE = [2**31, 2**63, 2**64, -(2**63), 10**40]
TEXTS = ["", "\x00", "\x1b[2J", "\n", "\ud800", "é" * 3, "a" * 3000, "9" * 5000]
TREES: list[Any] = [[], [[]], [None], [0] * 50, {}, {"a": 1}, {"": {}}]
ODD: list[Any] = [
    *(None, True, False),
    *map(json.loads, NUMBERS.split()),
    *LARGE,
    *WORDS.split(),
    *TEXTS,
    *TREES,
]
INSERTED = [b"\x00", b"\n", b"\xff", b"{", b"[" * 2000, b'"', b"\\ud800", b"1e999", b"-", b"9" * 5000]
INSERTED.append(b"\xed\xa0\x80")  # a lone surrogate in what would be UTF-8


def damaged_tree(value: Any, rng: random.Random) -> Any:
    """A JSON tree with one to four places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 4)):
        places = _places(value)
        if not places:
            return copy.deepcopy(rng.choice(ODD))
        parent, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                del parent[key]
            case 1:
                other, its_key = rng.choice(places)
                parent[key] = copy.deepcopy(other[its_key]) if its_key in _keys(other) else None
            case 2 if isinstance(parent, dict):
                parent[rng.choice(["", "extra", "index", "\n[/b]"])] = copy.deepcopy(rng.choice(ODD))
            case 3 if isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
                parent[key] += rng.choice([-1, 1, 0.5, 100, -1000])
            case _:
                parent[key] = copy.deepcopy(rng.choice(ODD))
    return value


def _keys(parent: Any) -> Any:
    return parent if isinstance(parent, dict) else range(len(parent))


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree; of a long list only some."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))[:6]
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(out) + 1)
        to = min(len(out), at + rng.choice([1, 1, 2, 8, 50, 1000]))
        match rng.randrange(5):
            case 0:
                del out[at:to]
            case 1:
                out[at:at] = out[at:to] * rng.choice([1, 2, 50])
            case 2:
                out[at:to] = rng.randbytes(to - at)
            case 3:
                out[at:at] = rng.choice(INSERTED)
            case _:
                if at < len(out):
                    out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def dump(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


class Targets:
    """Valid files to begin with, in a folder of their own, and what reads each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        photos = folder / "photos"
        for label, name in enumerate(("blue", "green", "red")):
            (photos / name).mkdir(parents=True)
            for i in range(4):
                colour = tuple(40 + 60 * (c == 2 - label) + 5 * i for c in range(3))
                Image.new("RGB", (32, 32), colour).save(photos / name / f"{i}.png")
        source = load_source(str(photos))
        spec = describe(SMALL_CNN, classes=source.classes, num_classes=3)
        fabric = make_fabric(device="cpu")
        config = TrainConfig(strategy="vanilla", patch_size=(5, 5), masks_per_axis=2, epochs=1, batch_size=4)
        train(build(spec), spec, source, source, config, folder / "run", fabric=fabric)
        self.opened = open_run(folder / "run")
        masks = MaskSet.covering(image_size=(32, 32), patch_size=(12, 12), masks_per_axis=2)
        certify(self.opened, source, masks, folder / "c", fabric=fabric)
        certify(self.opened, source, masks, folder / "d", fabric=fabric, defense="minority-reports")
        self.detect = {**read_manifest(folder / "d").written, "finished": None}
        self.detections = read_lines(folder / "d" / RECORDS)
        certified = read_folder(folder / "c")
        defense = restore(certified.manifest, self.opened, fabric)
        quick = AttackConfig(steps=1, restarts=1, certified_restarts=1)
        attack(self.opened, source, defense, certified, folder / "a", fabric=fabric, config=quick)
        self.manifest = certified.manifest.written
        self.records = read_lines(folder / "c" / RECORDS)
        self.run = read_manifest(folder / "run").written
        self.attack = {**read_manifest(folder / "a").written, "finished": None}
        self.attacks = read_lines(folder / "a" / ATTACKS)
        self.recipes = [(FOLDER / f"{name}.toml").read_bytes() for name in NAMES]
        self.png = (photos / "red" / "0.png").read_bytes()
        pictures = {"jpeg": "JPEG", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "webp": "WEBP"}
        self.pictures = [self.png]
        for name in pictures.values():
            data = io.BytesIO()
            Image.open(photos / "red" / "0.png").save(data, name)
            self.pictures.append(data.getvalue())
        with tarfile.open(folder / "p.tar", "w") as tar:
            tar.add(photos, arcname="photos")
        self.tar = (folder / "p.tar").read_bytes()
        self.safetensors = (folder / "run" / "model.safetensors").read_bytes()
        small = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
        self.small = safetensors.torch.save(small)
        torch.save(small, folder / "w.pth")
        self.pickle = (folder / "w.pth").read_bytes()
        self.source = source
        self.last = folder / "w.pth"

    def _show(self, folder: Path, rng: random.Random) -> None:
        """The summary; of one in five its table, which takes longer than all else."""
        found = summarize(read_folder(folder))
        if rng.random() < 0.2:
            Console(file=io.StringIO(), width=80).print(table([found]))

    def _verifier(self, folder: Path, rng: random.Random) -> Callable[[], Any]:
        """``verify``; of some folders with the model and the images, of which one is looked at again."""
        if rng.random() > 0.01:
            return lambda: verify(folder)
        return lambda: verify(folder, model=self.opened, source=self.source, sample=1, device="cpu")

    def records_lines(self, rng: random.Random) -> None:
        folder = self.folder / "c"
        (folder / MANIFEST).write_bytes(dump({**self.manifest, "finished": None}))
        share = rng.choice([0, 0.1, 0.5])
        lines = [dump(damaged_tree(line, rng) if rng.random() < share else line) for line in self.records]
        data = b"".join(lines)
        self.write_lines(folder / RECORDS, damaged_bytes(data, rng) if rng.random() < 0.5 else data, rng)
        each(self._verifier(folder, rng), lambda: self._show(folder, rng))

    def manifests(self, rng: random.Random) -> None:
        folder = self.folder / "c"
        data = dump(damaged_tree(seal(self.manifest) if rng.random() < 0.1 else self.manifest, rng))
        (folder / RECORDS).write_bytes(b"".join(map(dump, self.records)))
        self.write(folder / MANIFEST, damaged_bytes(data, rng) if rng.random() < 0.3 else data)
        each(
            self._verifier(folder, rng),
            lambda: self._show(folder, rng),
            lambda: read_certification(folder).network,
            lambda: certified_masks(read_certification(folder), self.opened),
            lambda: images_as_certified(read_certification(folder), self.source),
        )

    def runs(self, rng: random.Random) -> None:
        data = dump(damaged_tree(self.run, rng))
        path = self.folder / "run" / MANIFEST
        self.write(path, damaged_bytes(data, rng) if rng.random() < 0.3 else data)
        open_run(self.folder / "run")

    def attacks_lines(self, rng: random.Random) -> None:
        folder = self.folder / "a"
        manifest = damaged_tree(self.attack, rng) if rng.random() < 0.5 else self.attack
        (folder / MANIFEST).write_bytes(dump(manifest))
        data = b"".join(
            dump(damaged_tree(line, rng) if rng.random() < 0.2 else line) for line in self.attacks
        )
        self.write_lines(folder / ATTACKS, damaged_bytes(data, rng) if rng.random() < 0.3 else data, rng)
        attack_text(summarize_attack(read_folder(folder)))

    def detections_lines(self, rng: random.Random) -> None:
        folder = self.folder / "d"
        manifest = damaged_tree(self.detect, rng) if rng.random() < 0.3 else self.detect
        (folder / MANIFEST).write_bytes(dump(manifest))
        data = b"".join(
            dump(damaged_tree(line, rng) if rng.random() < 0.2 else line) for line in self.detections
        )
        self.write_lines(folder / RECORDS, damaged_bytes(data, rng) if rng.random() < 0.3 else data, rng)
        each(self._verifier(folder, rng), lambda: self._show_detection(folder))

    def _show_detection(self, folder: Path) -> None:
        found = summarize_detection(read_folder(folder))
        Console(file=io.StringIO(), width=80).print(detection_table([found]))

    def recipe_files(self, rng: random.Random) -> None:
        data = rng.choice(self.recipes)
        if rng.random() < 0.6:  # other values where values stand
            values = list(re.finditer(rb"= *([^\n]+)", data))
            for match in reversed(rng.sample(values, rng.randint(1, 3))):
                odd = json.dumps(copy.deepcopy(rng.choice(ODD)), ensure_ascii=True).encode()
                data = data[: match.start(1)] + odd + data[match.end(1) :]
        else:
            data = damaged_bytes(data, rng)
        self.write(self.folder / "r.toml", data)
        plan(read_recipe(str(self.folder / "r.toml")))

    def weights(self, rng: random.Random) -> None:
        name, data = rng.choice([("w.safetensors", self.small), ("w.pth", self.pickle)])
        self.write(self.folder / name, damaged_bytes(data, rng))
        read_weights(str(self.folder / name))

    def pictures_files(self, rng: random.Random) -> None:
        self.write(self.folder / "x.png", damaged_bytes(rng.choice(self.pictures), rng))
        try:
            decode(open_image(self.folder / "x.png"))
        except UNREADABLE as error:
            raise DataError("unreadable") from error

    def tars(self, rng: random.Random) -> None:
        self.write(self.folder / "x.tar", damaged_bytes(self.tar, rng))
        images = Images(load_source(str(self.folder / "x.tar")), self.opened.spec)
        images[rng.randrange(len(images))]

    def write_lines(self, path: Path, data: bytes, rng: random.Random) -> None:
        """Lines with hashes as a forger would mend them, or damaged ones."""
        hashes = b"".join(sha256(line).encode() + b"\n" for line in re.findall(rb"[^\n]*\n", data))
        LineHashes(path).path.write_bytes(hashes if rng.random() < 0.95 else damaged_bytes(hashes, rng))
        self.write(path, data)

    def write(self, path: Path, data: bytes) -> None:
        self.last = path
        path.write_bytes(data)


def each(*readers: Callable[[], Any]) -> None:
    """Let all of them read, whatever the ones before said; raises the first refusal."""
    refusals = []
    for reader in readers:
        try:
            reader()
        except CertiPatchError as refusal:
            refusals.append(refusal)
    if refusals:
        raise refusals[0]


PATIENCE = 20  # seconds of computing for one input
SHARES = {
    "records_lines": 0.25,
    "manifests": 0.17,
    "attacks_lines": 0.12,
    "detections_lines": 0.05,
    "recipe_files": 0.27,
    "runs": 0.01,
    "weights": 0.05,
    "pictures_files": 0.06,
    "tars": 0.02,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--only", help=f"one of {', '.join(SHARES)}")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    stderr.quiet = True
    signal.signal(signal.SIGVTALRM, _too_long)
    root = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    targets, total = Targets(root), 0
    try:
        for name, share in SHARES.items():
            if arguments.only in (None, name):
                inputs = round(arguments.inputs * (1 if arguments.only else share))
                total += fuzz(name, getattr(targets, name), inputs, arguments.seed)
        print(f"{'all':15} {total:>9,} inputs, no crash")
    except BaseException:
        kept = shutil.copy(targets.last, Path(tempfile.gettempdir()) / f"fuzz-{targets.last.name}")
        print(f"the input is kept in {kept}", file=sys.stderr)
        raise
    finally:
        shutil.rmtree(root)


def _too_long(*_: object) -> None:
    raise AssertionError(f"a reader took more than {PATIENCE} s")


def fuzz(name: str, attempt: Callable[[random.Random], None], inputs: int, seed: int) -> int:
    """Returns how many inputs there were."""
    counts, started = Counter[str](), time.monotonic()
    for number in range(inputs):
        signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE)
        try:
            attempt(random.Random(f"{name} {seed} {number}"))
            counts["read"] += 1
        except CertiPatchError:
            counts["refused"] += 1
        except BaseException:
            print(f"{name}: input {number} of seed {seed}", file=sys.stderr)
            raise
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    seconds = time.monotonic() - started
    print(
        f"{name:15} {inputs:>9,} inputs: {counts['read']:,} read, {counts['refused']:,} refused, "
        f"{seconds:.0f} s",
        flush=True,
    )
    return inputs


if __name__ == "__main__":
    main()
