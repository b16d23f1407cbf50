"""The demo: what Greedy Cutout does to certified robust accuracy, on scikit-learn's handwritten digits.

One small network, fine-tuned in four ways, certified against every 5x5 patch in 32x32 pixels.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from rich import box
from rich.markup import escape
from rich.table import Table

from .certification.certify import certify
from .certification.restore import restore
from .config import ModelSpec
from .data.load import load_source
from .data.source import Images, Source
from .geometry.masks import MaskSet
from .geometry.patch import Size, by
from .models.build import build, describe
from .models.runs import Opened, open_run
from .models.small import SMALL_CNN
from .records.read import Folder, read_folder
from .records.schema import PatchCleanserRecord
from .redteam.attack import attack
from .redteam.climb import AttackConfig
from .report.certification import Summary, summarize, training_cost
from .report.compared import compare
from .report.figures.failing import failing_masks
from .report.page.html import write_page
from .runtime.console import print_table, stderr, stdout
from .runtime.devices import make_fabric
from .training.config import TrainConfig
from .training.strategies import forward_equivalents
from .training.train import train

PATCH = (5, 5)
OTHER_PATCHES = ((3, 3), (7, 7))  # for the curve of the page, at k=3
ATTACKED = 50  # images
EPOCHS = 10
MASKS = MaskSet.covering(image_size=(32, 32), patch_size=PATCH, masks_per_axis=6)

# This many epochs of random-cutout cost what 10 of greedy-multisize do.
EQUAL_COMPUTE_EPOCHS = round(
    EPOCHS * forward_equivalents("greedy-multisize", MASKS) / forward_equivalents("random-cutout", MASKS)
)
CAPTION = (
    "500 held-out digits, any 5x5 patch in 32x32 pixels (2.4 %); %, fraction, 95 % interval. vanilla: the "
    "undefended model is right; clean: the defended model is right (k=6); certified robust: it stays right "
    "under every patch, proven. cost: forward passes worth of fine-tuning for one image, over all epochs, a "
    "backward pass counted as two.\n"
    "certified share of places: where a patch can do nothing, proven, if its place is not the attacker's "
    "choice; the mean over the images.\n"
    "On a set this easy greedy wins by epoch; given its compute, plain random cutout draws level."
)


@dataclass(frozen=True)
class Row:
    """A way of fine-tuning that the table compares."""

    name: str
    strategy: str
    epochs: int

    @property
    def folder(self) -> str:
        """The name as that of a folder."""
        return self.name.replace(", ", "-").replace(" ", "-")


ROWS = (
    Row("vanilla", "vanilla", EPOCHS),
    Row("random-cutout", "random-cutout", EPOCHS),
    Row("random-cutout, equal compute", "random-cutout", EQUAL_COMPUTE_EPOCHS),
    Row("greedy-multisize", "greedy-multisize", EPOCHS),
)


@dataclass(frozen=True)
class Digits:
    """What all trainings and certifications of the demo share."""

    train: Source
    test: Source
    spec: ModelSpec
    fabric: Fabric
    seed: int


@dataclass(frozen=True)
class Result:
    """What became of one row of the table.

    Attributes:
        cost: forward-equivalents of the fine-tuning for one image.
        opened: the fine-tuned model.
        certified: its certifications against the 5x5 patch, by k.
        others: those against other patches, at k=3.
    """

    row: Row
    cost: float
    opened: Opened
    certified: dict[int, Folder[Any]]
    others: list[Folder[Any]]

    @property
    def summaries(self) -> dict[int, Summary]:
        """What the certifications against the 5x5 patch say, by k."""
        return {k: summarize(folder) for k, folder in self.certified.items()}


def run(out: Path, *, seed: int = 0, as_json: bool = False) -> None:
    """Train, certify and compare into the folder ``out``.

    What is there from an earlier run is not done again.
    """
    train_digits, test_digits = load_source("digits", split="train"), load_source("digits", split="test")
    fabric = make_fabric(device="cpu")
    spec = describe(SMALL_CNN, classes=train_digits.classes, num_classes=10)
    digits = Digits(train_digits, test_digits, spec, fabric, seed)

    network = Row("base", "vanilla", 10)
    _fine_tune(digits, network, out, start=None, lr=0.05)
    results = [_result(digits, row, out) for row in ROWS]

    picture, page = out / "failing-masks.png", out / "report.html"
    _draw(digits, results, picture)
    _attack(digits, results[-1], out / "attack")
    _write_page(results, out / "attack", page)

    if as_json:
        print(json.dumps([_to_json(result) for result in results]))
    else:
        written = f"picture: {escape(str(picture))}\npage to open and to send: {escape(str(page))}"
        print_table(_table(results))
        stdout.print(written)


def _fine_tune(digits: Digits, row: Row, out: Path, *, start: Path | None, lr: float) -> None:
    """Train into ``out``/row: from the run in the folder ``start``, or from random weights."""
    network = open_run(start).network if start else build(digits.spec, seed=digits.seed)
    config = TrainConfig(
        strategy=row.strategy,
        patch_size=PATCH,
        masks_per_axis=6,
        epochs=row.epochs,
        batch_size=32,
        lr=lr,
        seed=digits.seed,
    )
    stderr.print(f"{row.folder}: {row.epochs} epochs", markup=False)
    train(
        network,
        digits.spec,
        digits.train,
        digits.test,
        config,
        out / row.folder,
        fabric=digits.fabric,
        data="digits",
        resume=True,
    )


def _result(digits: Digits, row: Row, out: Path) -> Result:
    """Fine-tune a row of the table, and certify it."""
    _fine_tune(digits, row, out, start=out / "base", lr=0.03)
    opened = open_run(out / row.folder)
    certified = {k: _certify(digits, opened, out / f"{row.folder}-k{k}", PATCH, k) for k in (3, 6)}
    others = []
    if row.epochs == EPOCHS:
        for patch in OTHER_PATCHES:
            others.append(_certify(digits, opened, out / f"{row.folder}-{by(patch)}-k3", patch, 3))
    return Result(row, training_cost(out / row.folder), opened, certified, others)


def _certify(digits: Digits, opened: Opened, to: Path, patch: Size, k: int) -> Folder[Any]:
    masks = MaskSet.covering(image_size=opened.spec.image_size, patch_size=patch, masks_per_axis=k)
    by_place = patch == PATCH
    certify(opened, digits.test, masks, to, fabric=digits.fabric, data="digits", resume=True, places=by_place)
    return read_folder(to)


def _draw(digits: Digits, results: list[Result], picture: Path) -> None:
    """Some images, and the masks under which each model is wrong about them."""
    folders = {result.row.name: result.certified[6] for result in results}
    images = Images(digits.test, digits.spec)
    shown = {i: images[i].readable().numpy() for i in _telling_images([*folders.values()])}
    failing_masks(picture, shown, folders)


def _telling_images(folders: list[Folder[PatchCleanserRecord]]) -> list[int]:
    """Six images: the first one of each of the commonest patterns of which model is certified on it."""
    patterns: dict[tuple[bool, ...], list[int]] = {}
    for i, of_image in enumerate(zip(*(folder.records for folder in folders), strict=True)):
        patterns.setdefault(tuple(record.certified for record in of_image), []).append(i)
    return [images[0] for images in sorted(patterns.values(), key=len, reverse=True)[:6]]


def _attack(digits: Digits, result: Result, to: Path) -> None:
    """Attack the certification at k=6 of one row."""
    certified = result.certified[6]
    defense = restore(certified.manifest, result.opened, digits.fabric)
    config = AttackConfig(seed=digits.seed)
    attack(
        result.opened,
        digits.test,
        defense,
        certified,
        to,
        fabric=digits.fabric,
        config=config,
        limit=ATTACKED,
        resume=True,
    )


def _write_page(results: list[Result], attacked: Path, page: Path) -> None:
    """The page of all certifications; it is about the last row at k=6, which was attacked."""
    folders = [result.certified[k] for result in reversed(results) for k in (6, 3)]
    folders += [folder for result in results for folder in result.others]
    write_page(page, compare([*folders, read_folder(attacked)]))


def _to_json(result: Result) -> dict[str, object]:
    """A row of the table as ``certipatch demo --json`` prints it."""
    certified = {f"k{k}": summary.to_json() for k, summary in result.summaries.items()}
    return {"row": result.row.name, "forward_equivalents_per_image": result.cost, **certified}


def _table(results: list[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left", caption=CAPTION)
    table.add_column("fine-tuned with\nepochs (cost)", overflow="fold", min_width=16)
    robust = ("certified\nrobust\nk=3", "certified\nrobust\nk=6", "certified\nshare of\nplaces k=6")
    for heading in ("vanilla", "clean", *robust):
        table.add_column(heading, justify="right", vertical="bottom")
    for result in results:
        small, large = result.summaries[3], result.summaries[6]
        shares = (
            large.vanilla_accuracy,
            large.clean_accuracy,
            small.certified_robust_accuracy,
            large.certified_robust_accuracy,
        )
        name = "\n".join([*result.row.name.split(", "), f"{result.row.epochs} ({result.cost:.0f})"])
        places = large.certified_share_of_places
        stacked = [share.stacked() for share in (*shares, places) if share is not None]
        table.add_row(name, *stacked)
    return table
