"""``certipatch train``: fine-tune a model on masked images."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import DataAsked, ModelAsked
from ..errors import ConfigError
from ..geometry.patch import parse_patch
from ..runtime.console import stdout
from ..training.config import LOSSES
from ..training.strategies import STRATEGIES
from . import options as ask
from .like import Like
from .open import is_run, open_to_train, remark, resumable
from .parse import check_out, parse_devices

if TYPE_CHECKING:
    from ..data.source import Source
    from ..models.runs import Opened
    from ..training.config import TrainConfig

# The options that are part of a training configuration as they were typed.
RECIPE = (
    *("strategy", "masks_per_axis", "epochs", "batch_size", "lr", "optimizer", "schedule", "weight_decay"),
    *("momentum", "augment", "ema", "keep", "clean_fraction", "gradcam_layer", "search_every"),
    *("search_precision", "windows", "loss", "compile_step", "seed"),
)


def train(
    model: ask.Model,
    data: ask.Data,
    strategy: ask.Strategy,
    patch: ask.Patch,
    out: ask.Out,
    val_data: ask.ValData = None,
    masks_per_axis: ask.MasksPerAxis = 6,
    loss: ask.Loss = LOSSES[0],
    epochs: ask.Epochs = 10,
    batch_size: ask.BatchSize = None,
    lr: ask.Lr = None,
    optimizer: ask.Optimizer = "momentum",
    schedule: ask.Schedule = "step",
    weight_decay: ask.WeightDecay = 0.0,
    momentum: ask.Momentum = 0.9,
    augment: ask.Augment = "none",
    ema: ask.Ema = None,
    keep: ask.Keep = "last",
    weights: ask.Weights = None,
    pretrained: ask.Pretrained = False,
    split: ask.Split = None,
    val_split: ask.ValSplit = None,
    class_map: ask.ClassMap = None,
    image_size: ask.ImageSize = None,
    crop_pct: ask.CropPct = None,
    clean_fraction: ask.CleanFraction = 0.0,
    gradcam_layer: ask.GradcamLayer = None,
    windows: ask.WindowsToTrain = None,
    search_every: ask.SearchEvery = 1,
    search_precision: ask.SearchPrecision = None,
    compile: ask.Compile = None,
    compile_step: ask.CompileStep = False,
    limit: ask.Limit = None,
    seed: ask.Seed = 0,
    device: ask.Device = "auto",
    precision: ask.Precision = "32-true",
    devices: ask.Devices = "1",
    nodes: ask.Nodes = 1,
    workers: ask.WorkersOfDevice = None,
    log: ask.Log = None,
    tensorboard: ask.Tensorboard = False,
    resume: ask.Resume = False,
    like: Like = None,
    as_json: ask.AsJson = False,
) -> None:
    """Fine-tune a model on worst-case masked images."""
    given = dict(locals())
    check_out(out, data, val_data)
    _check_asked(patch, strategy)
    asked = TrainingAsked(
        model=ModelAsked(model, weights, pretrained, image_size, crop_pct),
        data=DataAsked(data, split, class_map),
        validation=_validation(DataAsked(data, split, class_map), val_data, val_split),
        limit=limit,
        patch=patch,
        recipe={name: given[name] for name in RECIPE},
        out=out,
    )
    _train(asked, *_machine_and_way(given), as_json)


@dataclass(frozen=True)
class TrainingAsked:
    """What ``train`` was asked for.

    Attributes:
        data, validation: where the images to train on and those to validate on are.
        patch: as it was typed. recipe: the rest of a training configuration, as far as it was given.
    """

    model: ModelAsked
    data: DataAsked
    validation: DataAsked
    limit: int | None
    patch: str
    recipe: dict[str, Any]
    out: Path


def _check_asked(patch: str, strategy: str) -> None:
    if "+" in patch:
        raise ConfigError(
            f"patch {patch!r}: expected one shape to train with, found several; certify takes them all"
        )
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown strategy {strategy!r}: expected one of {', '.join(STRATEGIES)}")


def _validation(data: DataAsked, val_data: str | None, val_split: str | None) -> DataAsked:
    """Where the validation images are: the digits have their own, other data must be named."""
    if val_data is None and val_split is None and data.place != "digits":
        raise ConfigError(
            "validation data: expected --val-data, or --val-split of the same data, found neither"
        )
    own_split = None if data.place == "digits" else data.split
    return DataAsked(val_data or data.place, val_split or own_split)


def _machine_and_way(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of all options those that are arguments of ``make_fabric``, and those that are of ``train``."""
    machine = {name: given[name] for name in ("device", "precision", "nodes")}
    how = {name: given[name] for name in ("workers", "compile", "resume")}
    log = given["log"] or ("tensorboard" if given["tensorboard"] else None)
    return {**machine, "devices": parse_devices(given["devices"])}, {**how, "log": log}


def _train(asked: TrainingAsked, machine: dict[str, Any], how: dict[str, Any], as_json: bool) -> None:
    """Train, and say what came out. ``machine`` and ``how`` are arguments of ``make_fabric`` and of
    ``train``."""
    from ..runtime.devices import default_workers, make_fabric
    from ..runtime.processes import in_turn, launched
    from ..training.train import train as fine_tune

    fab = make_fabric(**machine)
    how["workers"] = default_workers(fab) if how["workers"] is None else how["workers"]
    with resumable(asked.out), launched(fab):
        source, validation, opened = in_turn(fab, lambda: _open(asked))
        config = _config(asked, opened)
        last = fine_tune(
            opened.network,
            opened.spec,
            source,
            validation,
            config,
            asked.out,
            fabric=fab,
            data=asked.data.place,
            **how,
        )
    if not fab.is_global_zero:
        return
    if as_json:
        print(json.dumps({"run": str(asked.out), **last}))
    else:
        _show(asked, opened.spec.arch, last, how["log"])


def _open(asked: TrainingAsked) -> tuple[Source, Source, Opened]:
    from ..data.load import judged_split, load_source

    data, judged = asked.data, asked.validation
    whole = load_source(data.place, split=data.split, class_map=data.class_map)
    split = judged_split(judged.place, judged.split)
    validation = load_source(judged.place, split=split, classes=whole.classes)
    for found in (whole, validation) if validation.remarks != whole.remarks else (whole,):
        remark(found)
    opened = open_to_train(asked.model, whole, seed=asked.recipe["seed"])
    return whole.first(asked.limit), validation, opened


def _config(asked: TrainingAsked, opened: Opened) -> TrainConfig:
    """The recipe with what depends on the model: the patch in pixels, and the paper's learning rate."""
    from ..training.config import default_lr, train_config

    recipe = asked.recipe
    lr = recipe["lr"]
    if lr is None:
        lr = default_lr(opened.spec.arch, recipe["optimizer"])
    size = parse_patch(asked.patch, opened.spec.image_size)
    return train_config(**{**recipe, "lr": lr, "batch_size": recipe["batch_size"] or 64}, patch_size=size)


def _show(asked: TrainingAsked, arch: str, last: dict[str, Any], log: str | None) -> None:
    from ..runtime.progress import percent

    say = partial(stdout.print, soft_wrap=True, markup=False)
    right, recipe = last["validation_vanilla"], asked.recipe
    from_something = is_run(asked.model.name) or asked.model.has_weights
    start = "" if from_something else " from random weights (--pretrained takes trained ones)"
    best = f", of which {last['epoch']} was the best" if recipe["keep"] == "best" else ""
    say(
        f"trained {arch}{start} with {recipe['strategy']} for {recipe['epochs']} epochs{best}; validation "
        f"vanilla accuracy {percent(right['correct'], right['images'])}"
    )
    if log == "tensorboard":
        say(f"curves: {shlex.join(['tensorboard', '--logdir', str(asked.out / 'tensorboard')])}")
    say(f"next: {shlex.join(_following(asked))}")


def _following(asked: TrainingAsked) -> list[str]:
    """The command that certifies what was trained."""
    judged = asked.validation
    return [
        *("certipatch", "certify", "--model", str(asked.out), "--data", judged.place, "--patch", asked.patch),
        *("--masks-per-axis", str(asked.recipe["masks_per_axis"])),
        *(["--split", judged.split] if judged.split else []),
        *("--out", f"{asked.out}-certified"),
    ]
