"""TODO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..certification.detect import detect as detect_on_source
from ..runtime.devices import make_fabric
from .app import app
from .open import _resumable, open_model, source_for
from .options import (
    AsJson,
    BatchSize,
    ClassMap,
    Compile,
    CropPct,
    Data,
    Device,
    ImageSize,
    Limit,
    Model,
    Patches,
    Precision,
    Pretrained,
    Resume,
    Split,
    Thresholds,
    Weights,
    stdout,
)
from .parse import check_out, geometries


@app.command()
def detect(
    model: Model,
    data: Data,
    patch: Annotated[
        str, typer.Option(help="the largest patch: 3% of the area, 39 or 39x20 pixels; several: 1%,2%,3%")
    ],
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
    """Certify detection: under every patch the undefended model is right, or an alarm is raised. One record
    an image."""
    from ..report.detection import detection_table as table
    from ..report.detection import parse_thresholds
    from ..report.detection import summarize_detection as summarize

    check_out(out, data)
    shown = parse_thresholds(thresholds)
    source = source_for(model, data, split, class_map).first(limit)
    spec, network, trained = open_model(model, source, weights, pretrained, image_size, crop_pct)
    folders = geometries(patch, masks_per_axis, spec.image_size, out, patches)
    fab = make_fabric(device=device, precision=precision)
    with _resumable(out):
        for folder, fine in folders.items():
            detect_on_source(
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
        stdout.print(
            f"{summaries[0].unreadable} unreadable images count as wrong; they are named in the records",
            markup=False,
        )
    for folder in folders:
        stdout.print(f"records: {folder}/records.jsonl", markup=False, soft_wrap=True)
