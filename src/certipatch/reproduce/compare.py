"""Run a comparison of certified defenses: train the networks, choose options, certify, and tabulate.

What is finished is not done again; what was interrupted is continued.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.utils.flop_counter import FlopCounterMode

from ..certification.certify import certify
from ..certification.methods import check_options
from ..data.source import Source
from ..errors import CertiPatchError, ConfigError, DataError, brief
from ..geometry.masks import MaskSet
from ..geometry.patch import parse_patch
from ..models.build import build, describe
from ..models.own import network_of
from ..models.runs import open_run
from ..records.files import write_atomically
from ..records.read import read_folder
from ..report.certification import Summary, summarize
from ..training.config import TrainConfig, train_config
from ..training.losses import PLACES
from ..training.strategies import BACKWARD, FORWARD, forward_equivalents
from ..training.train import train
from .comparison import Comparison, Row
from .done import finished
from .recipe import Recipe
from .run import load, say
from .tables import mean


@dataclass(frozen=True)
class Compared:
    """One row with one seed, at a share of the images."""

    comparison: Comparison
    row: Row
    seed: int
    scale: float

    @property
    def place(self) -> str:
        """The folder of the comparison, relative to ``--out``."""
        return f"{self.comparison.data}-compared" + (f"-x{self.scale:g}" if self.scale != 1 else "")

    @property
    def name(self) -> str:
        """The folder of the training, relative to ``--out``."""
        return f"{self.place}/{self.row.trained_as or self.row.name}-seed{self.seed}"

    @property
    def certified(self) -> str:
        """The folder that the certifications are in, relative to ``--out``."""
        return f"{self.place}/{self.row.name}-seed{self.seed}"

    @property
    def trained(self) -> Row:
        """The row whose network this is."""
        other = self.row.trained_as
        return self.row if other is None else self.comparison.row(other)

    def masks(self, patch: str) -> MaskSet:
        """The masks of a patch as it is typed."""
        size = (self.comparison.image_size, self.comparison.image_size)
        patch_size = parse_patch(patch, size)
        most = size[0] - max(patch_size) + 1
        k = min(self.row.masks_per_axis, most)
        return MaskSet.covering(image_size=size, patch_size=patch_size, masks_per_axis=k)

    @property
    def passes(self) -> int:
        """Forward passes worth of one training image in one epoch of the row's own training."""
        config = self.config(1)
        if config.loss == "interval":
            return (1 + 2 * PLACES) * (FORWARD + BACKWARD)
        return forward_equivalents(config.strategy, _train_masks(config, self.comparison.image_size))

    @property
    def epochs(self) -> tuple[int, int]:
        """Epochs on whole images, and of the row's own training: together what the budget pays for."""
        each = flops(self.row.model, self.comparison.image_size) / 1e9
        budget = self.comparison.gflop
        whole = round(self.trained.whole * budget / (each * (FORWARD + BACKWARD)))
        return whole, max(1, round((1 - self.trained.whole) * budget / (each * self.passes)))

    def config(self, epochs: int, **other: Any) -> TrainConfig:
        """The row's training; ``other``: in place of what the row says. Raises ConfigError."""
        size = (self.comparison.image_size, self.comparison.image_size)
        common: dict[str, Any] = {
            "strategy": "vanilla",
            "patch_size": parse_patch(self.comparison.train_patch, size),
            "masks_per_axis": 6,
            "batch_size": self.comparison.batch_size,
            "lr": self.comparison.lr,
        }
        own = other or dict(self.trained.train)
        return train_config(**{**common, **own, "epochs": epochs, "seed": self.seed})


def _train_masks(config: TrainConfig, side: int) -> MaskSet:
    k = config.masks_per_axis
    return MaskSet.covering(image_size=(side, side), patch_size=config.patch_size, masks_per_axis=k)


@cache
def flops(model: str, side: int, classes: int = 10) -> int:
    """Floating-point operations of one forward pass, 2 a multiply-add, counted without weights."""
    spec = describe(model, classes=(), num_classes=classes, image_size=(side, side))
    with torch.device("meta"):
        network, counter = network_of(spec).eval(), FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(torch.empty(1, 3, side, side))
    return int(counter.get_total_flops())


def compared(comparison: Comparison, *, only: str | None, scale: float) -> list[Compared]:
    """Every row with every seed, seed by seed. Raises ConfigError for what cannot be, or if none is left."""
    every = [Compared(comparison, row, seed, scale) for seed in comparison.seeds for row in comparison.rows]
    for one in every:
        one.config(1)
        check_options(one.row.defense, {**one.row.options, **{k: v[0] for k, v in one.row.choose.items()}})
        for patch in comparison.patches:
            one.masks(patch)
    wanted = [word.strip() for word in (only or "").split(",") if word.strip()]
    chosen = [one for one in every if set(wanted) <= {one.row.name, f"seed{one.seed}"}]
    if not chosen:
        raise ConfigError(f"--only {only!r}: expected a row and a seed such as ds,seed0; found none")
    return chosen


@dataclass(frozen=True)
class Images:
    """Images to train on, to choose options by, and to certify; no image is in two of them."""

    train: Source
    held_out: Source
    test: Source


def images_of(comparison: Comparison, locations: dict[str, str], scale: float) -> Images:
    """Raises DataError if there are fewer than the recipe says."""

    def scaled(images: int) -> int:
        return max(1, round(images * scale))

    location = locations.get(comparison.data, comparison.location)
    whole = load(location, comparison.train_split, None)
    test = load(location, comparison.test_split, whole.classes)
    n = scaled(comparison.train_images)
    held = max(scaled(comparison.held_out_images), 4 * len(whole.classes))  # of every class, at any scale
    for what, source, asked in (
        ("training", whole, n + held),
        ("test", test, scaled(comparison.test_images)),
    ):
        if len(source) < asked:
            raise DataError(
                f"data {comparison.data}: expected at least {asked} {what} images, found {len(source)}"
            )
    some = whole.first(n + held)
    out = {i * len(some) // held for i in range(held)}
    rest = [i for i in range(len(some)) if i not in out]
    return Images(some.take(rest), some.take(sorted(out)), test.first(scaled(comparison.test_images)))


def run(
    runs: list[Compared],
    out: Path,
    *,
    locations: dict[str, str],
    fabric: Fabric,
    workers: int,
    after_each: Callable[[], object],
) -> list[str]:
    """Do what is not done yet; a line for each row that failed, the others are done all the same."""
    images, failures = images_of(runs[0].comparison, locations, runs[0].scale), []
    for number, one in enumerate(runs, start=1):
        say(f"[{number}/{len(runs)}] {one.certified}")
        try:
            _train(one, out, images, fabric, workers)
            _certify(one, out, images, fabric)
        except (CertiPatchError, OSError, torch.OutOfMemoryError) as error:
            failures.append(f"{one.certified}: {brief(error, 300)}")
            say(failures[-1])
        after_each()
    return failures


def _train(one: Compared, out: Path, images: Images, fabric: Fabric, workers: int) -> None:
    """On whole images first, then as the row says; nothing where that is finished."""
    folder, (whole, own) = out / one.name, one.epochs
    if finished(folder):
        return
    side, classes = one.comparison.image_size, images.train.classes
    spec = describe(one.row.model, classes=classes, num_classes=len(classes), image_size=(side, side))
    network = build(spec, seed=one.seed)
    how: dict[str, Any] = {"fabric": fabric, "data": one.comparison.data, "workers": workers, "resume": True}
    if whole:
        before, plain = out / f"{one.name}-whole", one.config(whole, strategy="vanilla")
        train(network, spec, images.train, images.held_out, plain, before, **how)
        network = open_run(before).network
    train(network, spec, images.train, images.held_out, one.config(own), folder, **how)


def _certify(one: Compared, out: Path, images: Images, fabric: Fabric) -> None:
    """Choose the options on held-out images, then certify the test images against each patch."""
    opened, folder = open_run(out / one.name), out / one.certified

    def records(source: Source, patch: str, into: Path, options: dict[str, Any]) -> Summary:
        if not finished(into):
            how: dict[str, Any] = {"fabric": fabric, "defense": one.row.defense, "data": one.comparison.data}
            certify(opened, source, one.masks(patch), into, resume=True, **how, **options)
        return summarize(read_folder(into))

    options = dict(one.row.options)
    for option, values in one.row.choose.items():
        tried = {
            value: records(
                images.held_out,
                one.comparison.train_patch,
                folder.with_name(f"{folder.name}-chosen") / f"{option}-{value}",
                {**options, option: value},
            )
            for value in values
        }
        options[option] = max(tried, key=lambda value: tried[value].certified_robust_accuracy.count)
    for patch in one.comparison.patches:
        records(images.test, patch, folder.with_name(f"{folder.name}-certified") / patch, options)


def write(recipe: Recipe, runs: list[Compared], out: Path, stem: Path) -> str:
    """Write ``stem``.md and .json from what there is; returns the Markdown."""
    comparison, found = runs[0].comparison, list(_found(runs, out))
    lines = [f"# {recipe.title}", "", f"The claim examined: {recipe.claim}", ""]
    for patch in comparison.patches:
        lines += _table(recipe, runs, [one for one in found if one[1] == patch], patch)
    as_json = [_to_json(*one) for one in found]
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(f"{stem}.md"), "\n".join([*lines, ""]).encode())
    write_atomically(Path(f"{stem}.json"), json.dumps(as_json, indent=1).encode() + b"\n")
    return "\n".join(lines)


Result = tuple[Compared, str, Summary]


def _found(runs: list[Compared], out: Path) -> Iterator[Result]:
    for one, patch in product(runs, runs[0].comparison.patches):
        folder = out / f"{one.certified}-certified" / patch
        if finished(folder):
            yield one, patch, summarize(read_folder(folder))


def _to_json(one: Compared, patch: str, summary: Summary) -> dict[str, Any]:
    return {"row": one.row.name, "seed": one.seed, "patch": patch, "epochs": one.epochs, **summary.to_json()}


def _table(recipe: Recipe, runs: list[Compared], found: list[Result], patch: str) -> list[str]:
    comparison = runs[0].comparison
    heads = ["defense", "network", "trained with", "epochs", "seeds", "chosen", "vanilla", "clean"]
    heads += ["certified robust", "paper", "passes/image", "patch size known"]
    lines = [heads]
    for row in comparison.rows:
        of_row = [(one, summary) for one, _, summary in found if one.row.name == row.name]
        lines.append(_line(recipe, next(one for one in runs if one.row == row), of_row, patch))
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    side = comparison.image_size
    about = (
        f"{comparison.train_images} training images, {comparison.test_images} test images, at scale "
        f"{runs[0].scale:g}; {comparison.gflop:g} GFLOP of training an image for every network. "
    )
    title = f"## Every {patch}x{patch} patch in {side}x{side} pixels"
    return [title, "", about + comparison.note, "", head, "|" + "---|" * len(heads), *body, ""]


def _line(recipe: Recipe, one: Compared, found: list[tuple[Compared, Summary]], patch: str) -> list[str]:
    """A row of the table; empty cells where nothing was run."""
    row, (whole, own) = one.row, one.epochs
    config = one.config(1)
    summaries = [summary for _, summary in found]
    shares = [
        mean([getattr(summary, name) for summary in summaries])
        for name in ("vanilla_accuracy", "clean_accuracy", "certified_robust_accuracy")
    ]
    as_printed = one.comparison.published.get(patch, patch)
    printed = recipe.published.get((row.name, "cifar10", "", "", as_printed, None))
    return [
        *(row.name, row.model, config.loss or config.strategy, f"{whole} + {own}"),
        *(", ".join(str(each.seed) for each, _ in found), _chosen(row, summaries), *shares),
        *(str(printed or ""), *_of_first(row, summaries)),
    ]


def _chosen(row: Row, summaries: list[Summary]) -> str:
    """The options that each seed has chosen."""
    stated = [summary.folder.manifest.stated for summary in summaries]
    return "; ".join(f"{key} {there[key]}" for there in stated for key in row.choose)


def _of_first(row: Row, summaries: list[Summary]) -> tuple[str, str]:
    """Passes an image, and whether the defense answers by the size of the patch; empty without a result."""
    if not summaries:
        return "", ""
    first = summaries[0]
    of_windows = first.folder.manifest.stated.get("patch_size_known")
    known = row.defense == "patchcleanser" if of_windows is None else of_windows
    return f"{first.passes / first.images:.0f}", "yes" if known else "no"


def plan_lines(runs: list[Compared]) -> list[str]:
    """What ``--dry-run`` says of each row: epochs, and operations for one training image."""
    lines = []
    for one in runs:
        whole, own = one.epochs
        each = flops(one.row.model, one.comparison.image_size) / 1e9
        spent = each * (whole * (FORWARD + BACKWARD) + own * one.passes)
        as_other = one.row.trained_as
        what = f"as {as_other}" if as_other else f"{whole} + {own} epochs"
        lines.append(f"{one.certified}: {one.row.model}, {what}, {spent:.2f} GFLOP an image")
    return lines
