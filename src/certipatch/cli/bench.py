"""TODO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..bench.case import Case, Settings
from ..bench.certification import certified_in
from ..bench.certification import only_certified as find_certified
from ..bench.rounds import table
from ..bench.run import parse_themes, run
from ..certification.restore import as_certified
from ..errors import ConfigError
from ..training.cost import STRATEGY_NAMES
from .app import app
from .open import open_model, source_for
from .options import (
    AsJson,
    BatchSize,
    ClassMap,
    CropPct,
    Data,
    Device,
    ImageSize,
    Model,
    Precision,
    Pretrained,
    SearchEvery,
    SearchPrecision,
    Split,
    Weights,
    stdout,
)
from .parse import check_out_file, mask_set


@app.command()
def bench(
    model: Model,
    data: Data,
    patch: Annotated[str | None, typer.Option(help="as in certify; without --certified")] = None,
    masks_per_axis: Annotated[
        int | None, typer.Option(help="as in certify; without --certified; default 6")
    ] = None,
    patches: Annotated[
        int | None, typer.Option(min=1, max=2, help="as in certify; without --certified; default 1")
    ] = None,
    what: Annotated[
        str, typer.Option(help="some of certify,network,train,memory,scaling")
    ] = "certify,network",
    repeats: Annotated[int, typer.Option(min=1, help="interleaved rounds of what is compared")] = 3,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="time the published loop over all pairs of masks, and compare all images with it"
        ),
    ] = False,
    certified: Annotated[
        Path | None,
        typer.Option(help="folder that certify wrote: its masks, and of the data the images certified there"),
    ] = None,
    only_certified: Annotated[
        bool, typer.Option("--only-certified", help="find images that are certified: nothing stops early")
    ] = False,
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
    """Measure certification (against the published code), training steps, memory and processes on a model and
    data of your own."""
    from dataclasses import replace

    from ..geometry.patch import by

    themes, chosen = (
        parse_themes(what),
        list(STRATEGY_NAMES) if strategies == "all" else strategies.split(","),
    )
    if unknown := [name for name in chosen if name not in STRATEGY_NAMES]:
        raise ConfigError(f"unknown strategy {unknown[0]!r}: expected some of {', '.join(STRATEGY_NAMES)}")
    if out is not None:
        check_out_file(out)
    source = source_for(model, data, split, class_map)
    spec, network, _ = open_model(model, source, weights, pretrained, image_size, crop_pct)
    if certified is not None:
        if patch or masks_per_axis or patches or only_certified:
            raise ConfigError(
                f"certified {certified}: has its own patch, k and images; drop --patch, --patches, "
                "--masks-per-axis and --only-certified"
            )
        fine, _ = as_certified(certified, spec, network)
        source = certified_in(certified, source)
    elif patch is not None:
        fine = mask_set(patch, masks_per_axis or 6, spec.image_size, patches or 1)
    else:
        raise ConfigError("patch: expected --patch, or --certified FOLDER, found neither")
    if fine.grid is None and "train" in themes:
        raise ConfigError("bench train: expected one patch of one shape, as train takes it")
    settings = Settings(batch_size, exhaustive, precision, compile, shared_prefix)
    same = {
        "model": model, "data": data, "weights": weights, "pretrained": pretrained, "split": split, "class-map": class_map,
        "image-size": image_size, "crop-pct": crop_pct, "patch": "+".join(map(by, fine.patch_sizes)), "patches": fine.patches, "masks-per-axis": fine.masks_per_axis,
        "batch-size": batch_size, "limit": limit, "device": device, "precision": precision, "exhaustive": exhaustive,
        "compile" if compile else "no-compile": True, "shared-prefix" if shared_prefix else "no-shared-prefix": True,
    }  # fmt: skip
    options = {name: value for name, value in same.items() if value not in (None, False)}
    search = {"search_every": search_every, "search_precision": search_precision}
    case = Case(
        network,
        spec,
        source,
        fine,
        settings,
        device,
        options,
        repeats,
        full,
        chosen,
        train_batch_size,
        search,
    )
    images = find_certified(case, limit) if only_certified else source.first(limit)
    found = run(replace(case, source=images), themes)
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found)) if as_json else stdout.print(table(found))
