"""``certipatch detect``: prove for each image that a patch changes nothing, or raises an alarm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import DataAsked, ModelAsked
from ..runtime.console import print_table, stdout
from . import options as ask
from .certify import CertificationAsked, run
from .parse import check_out


def detect(
    model: ask.Model,
    data: ask.Data,
    patch: ask.PatchesToDetect,
    out: ask.OutEach,
    masks_per_axis: ask.KsToDetect = "6",
    patches: ask.Patches = 1,
    thresholds: ask.Thresholds = None,
    weights: ask.Weights = None,
    pretrained: ask.Pretrained = False,
    split: ask.Split = None,
    class_map: ask.ClassMap = None,
    image_size: ask.ImageSize = None,
    crop_pct: ask.CropPct = None,
    batch_size: ask.BatchSize = None,
    limit: ask.Limit = None,
    device: ask.Device = "auto",
    precision: ask.Precision = "32-true",
    compile: ask.Compile = None,
    engine: ask.Engine = None,
    address: ask.Address = None,
    devices_per_node: ask.DevicesPerNode = None,
    resume: ask.Resume = False,
    as_json: ask.AsJson = False,
) -> None:
    """Certify detection: under every patch the undefended model is right, or an alarm is raised. One record
    an image."""
    from ..report.detection import parse_thresholds

    check_out(out, data)
    shown = parse_thresholds(thresholds)
    machine: dict[str, Any] = {"device": device, "precision": precision}
    asked = CertificationAsked(
        model=ModelAsked(model, weights, pretrained, image_size, crop_pct),
        data=DataAsked(data, split, class_map),
        limit=limit,
        geometry=(patch, masks_per_axis, patches),
        out=out,
        machine=machine,
        engine=(engine, address, devices_per_node),
        way={"batch_size": batch_size, "compile": compile},
        defense="minority-reports",
        options={},
        resume=resume,
    )
    written = run(asked)
    if written is not None:
        _show(written.folders, shown, as_json)


def _show(folders: list[Path], thresholds: tuple[float, ...], as_json: bool) -> None:
    from ..records.read import read_folder
    from ..records.schema import RECORDS
    from ..report.detection import detection_table, summarize_detection

    summaries = [summarize_detection(read_folder(folder), thresholds) for folder in folders]
    if as_json:
        found = [summary.to_json() for summary in summaries]
        print(json.dumps(found[0] if len(found) == 1 else found))
        return
    print_table(detection_table(summaries))
    if summaries[0].unreadable:
        stdout.print(
            f"{summaries[0].unreadable} unreadable images count as wrong; they are named in the records",
            markup=False,
        )
    for folder in folders:
        stdout.print(f"records: {folder}/{RECORDS}", markup=False, soft_wrap=True)
