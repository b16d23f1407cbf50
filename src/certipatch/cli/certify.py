"""TODO."""

from __future__ import annotations

import json
import shlex
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..certification.blocks import BLOCK, blocks_of
from ..certification.certify import certify as certify_source
from ..config import ModelSpec
from ..runtime.devices import make_fabric
from ..runtime.processes import alone, in_turn, launched, together
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
    Devices,
    ImageSize,
    Inference,
    Limit,
    Model,
    Nodes,
    Patches,
    Precision,
    Pretrained,
    Resume,
    Split,
    Weights,
    stdout,
)
from .parse import check_out, geometries, parse_devices, parse_inference, parse_shard

if TYPE_CHECKING:
    from torch import nn

    from ..data.source import Source


@app.command()
def certify(
    model: Model,
    data: Data,
    patch: Annotated[
        str,
        typer.Option(
            help="the largest patch: 3% of the area, 39 or 39x20 pixels; any of several shapes: "
            "39x20+20x39; one by one: 1%,2%,3%"
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder to write; of several patches or k a sub-folder each")],
    masks_per_axis: Annotated[
        str, typer.Option(help="k: more masks, more certified images, more passes; several: 3,6")
    ] = "6",
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
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="compute every pair, also where settled")
    ] = False,
    inference: Inference = None,
    compile: Compile = None,
    shared_prefix: Annotated[
        bool | None,
        typer.Option(
            "--shared-prefix/--no-shared-prefix", help="share a CNN's local layers; default: in large runs"
        ),
    ] = None,
    shard: Annotated[
        str, typer.Option(help="i/n: only the i-th of n parts, into files of its own in the same folder")
    ] = "1/1",
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Certify a model on labelled images, one record each."""
    from ..report.certification import summarize, table

    check_out(out, data)
    part = parse_shard(shard)

    def prepare() -> tuple[Source, ModelSpec, nn.Sequential, dict[str, Any] | None]:
        source = source_for(model, data, split, class_map).first(limit)
        return source, *open_model(model, source, weights, pretrained, image_size, crop_pct)

    # Processes that certify meet at the end only: who is first must not give up on the others.
    fab = make_fabric(
        device=device,
        precision=precision,
        devices=parse_devices(devices),
        nodes=nodes,
        patience=timedelta(days=30),
    )
    with _resumable(out), launched(fab):
        source, spec, network, trained = in_turn(fab, prepare)
        folders = geometries(patch, masks_per_axis, spec.image_size, out, patches)
        # Each process is a shard: together they need to agree on nothing but the end.
        mine = (part[0] - 1) * fab.world_size + fab.global_rank + 1, part[1] * fab.world_size
        with together(fab):
            for folder, fine in folders.items():
                certify_source(
                    network, spec, source, fine, folder,
                    fabric=alone(fab), data=data, trained=trained, batch_size=batch_size, exhaustive=exhaustive,
                    inference=parse_inference(inference), compile=compile, shared_prefix=shared_prefix, shard=mine, resume=resume,
                )  # fmt: skip
    if not fab.is_global_zero:
        return
    begun = [
        folder for folder in folders if any(path.stat().st_size for path in folder.glob("records*.jsonl"))
    ]
    summaries = [summarize(folder) for folder in begun]  # a shard may have no image
    if as_json:
        found = [summary.to_json() for summary in summaries]
        print(json.dumps(found[0] if len(folders) == len(found) == 1 else found))
        return
    if summaries:
        stdout.print(table(summaries))
    if mine[1] > 1 and not blocks_of(len(source), mine):
        stdout.print(f"shard {mine[0]}/{mine[1]} holds no images: they are dealt in blocks of {BLOCK}")
    if summaries and summaries[0].unreadable:
        stdout.print(
            f"{summaries[0].unreadable} unreadable images count as not certified; they are named in the "
            "records",
            markup=False,
        )
    for folder in folders:
        stdout.print(
            f"records: {folder}/records{'*' if mine[1] > 1 else ''}.jsonl", markup=False, soft_wrap=True
        )
    if len(summaries) == len(folders) and all(summary.complete for summary in summaries):
        following = ["certipatch", "report", str(out), "--html", f"{out}.html"]
        stdout.print(f"next: {shlex.join(following)}", markup=False, soft_wrap=True)
