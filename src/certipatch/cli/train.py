"""TODO."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..config import ModelSpec
from ..errors import ConfigError
from ..geometry.patch import parse_patch
from ..runtime.devices import make_fabric
from ..runtime.processes import in_turn, launched
from ..training.config import default_lr, train_config
from ..training.cost import STRATEGY_NAMES
from ..training.train import train as fine_tune
from .app import app
from .open import _resumable, is_run, open_model
from .options import (
    AsJson,
    BatchSize,
    ClassMap,
    Compile,
    CropPct,
    Data,
    Device,
    Devices,
    ImageSize,
    Limit,
    MasksPerAxis,
    Model,
    Nodes,
    Patch,
    Precision,
    Pretrained,
    Resume,
    SearchEvery,
    SearchPrecision,
    Seed,
    Split,
    Weights,
    Workers,
    stdout,
)
from .parse import check_out, parse_devices

if TYPE_CHECKING:
    from torch import nn

    from ..data.source import Source


@app.command()
def train(
    model: Model,
    data: Data,
    strategy: Annotated[
        str, typer.Option(help=f"which pixels to hide in training: {', '.join(STRATEGY_NAMES)}")
    ],
    patch: Patch,
    out: Annotated[Path, typer.Option(help="folder to write")],
    val_data: Annotated[
        str | None, typer.Option(help="like --data; default: --data with --val-split")
    ] = None,
    masks_per_axis: MasksPerAxis = 6,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch_size: BatchSize = None,
    lr: Annotated[float | None, typer.Option(help="default: 0.01, or 0.001 for ViT and ConvNeXt")] = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    split: Split = None,
    val_split: Annotated[str | None, typer.Option(help="like --split, of the validation data")] = None,
    class_map: ClassMap = None,
    image_size: ImageSize = None,
    crop_pct: CropPct = None,
    clean_fraction: Annotated[
        float, typer.Option(min=0, max=1, help="share of each batch left unmasked")
    ] = 0.0,
    gradcam_layer: Annotated[
        str | None, typer.Option(help="module that gutout looks at; default: the last feature map")
    ] = None,
    search_every: SearchEvery = 1,
    search_precision: SearchPrecision = None,
    compile: Compile = None,
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = "auto",
    precision: Precision = "32-true",
    devices: Devices = "1",
    nodes: Nodes = 1,
    workers: Workers = 0,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="write curves into OUT/tensorboard too")
    ] = False,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on worst-case masked images."""
    from ..data.load import load_source

    check_out(out, data, val_data)
    if "+" in patch:
        raise ConfigError(
            f"patch {patch!r}: expected one shape to train with, found several; certify takes them all"
        )
    if strategy not in STRATEGY_NAMES:
        raise ConfigError(f"unknown strategy {strategy!r}: expected one of {', '.join(STRATEGY_NAMES)}")
    if val_data is None and val_split is None and data != "digits":
        raise ConfigError(
            "validation data: expected --val-data, or --val-split of the same data, found neither"
        )

    def prepare() -> tuple[Source, Source, ModelSpec, nn.Sequential]:
        source = load_source(data, split=split, class_map=class_map).first(limit)
        validation = load_source(
            val_data or data,
            split=val_split or ("test" if data == "digits" else split),
            classes=source.classes,
        )
        return (
            source,
            validation,
            *open_model(model, source, weights, pretrained, image_size, crop_pct, training=True, seed=seed)[
                :2
            ],
        )

    fab = make_fabric(device=device, precision=precision, devices=parse_devices(devices), nodes=nodes)
    with _resumable(out), launched(fab):
        source, validation, spec, network = in_turn(fab, prepare)
        config = train_config(
            strategy=strategy, patch_size=parse_patch(patch, spec.image_size), masks_per_axis=masks_per_axis, epochs=epochs,
            batch_size=batch_size or 64, lr=default_lr(spec.arch) if lr is None else lr, clean_fraction=clean_fraction,
            gradcam_layer=gradcam_layer, search_every=search_every, search_precision=search_precision, seed=seed,
        )  # fmt: skip
        last = fine_tune(
            network, spec, source, validation, config, out, fabric=fab, data=data, workers=workers, compile=compile,
            tensorboard=tensorboard, resume=resume,
        )  # fmt: skip
    if not fab.is_global_zero:
        return
    if as_json:
        print(json.dumps({"run": str(out), **last}))
        return
    right = last["validation_vanilla"]
    following = ["certipatch", "certify", "--model", str(out), "--data", val_data or data, "--patch", patch]
    following += [
        "--masks-per-axis",
        str(masks_per_axis),
        *(["--split", val_split] if val_split else []),
        "--out",
        f"{out}-certified",
    ]
    start = (
        ""
        if is_run(model) or weights or pretrained
        else " from random weights (--pretrained takes trained ones)"
    )
    stdout.print(
        f"trained {spec.arch}{start} with {strategy} for {epochs} epochs; validation vanilla accuracy "
        f"{100 * right['correct'] / right['images']:.1f} % ({right['correct']}/{right['images']})\n"
        + (
            f"curves: {shlex.join(['tensorboard', '--logdir', str(out / 'tensorboard')])}\n"
            if tensorboard
            else ""
        )
        + f"next: {shlex.join(following)}",
        soft_wrap=True,
        markup=False,
    )
