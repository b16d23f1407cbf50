"""TODO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..certification.restore import as_certified, images_as_certified
from ..records.schema import ATTACKS
from ..redteam.attack import PICTURES
from ..redteam.attack import attack as attack_certified
from ..report.attack import attack_text, summarize_attack
from ..runtime.devices import make_fabric
from .app import app
from .open import _resumable, open_model, source_for
from .options import (
    AsJson,
    ClassMap,
    CropPct,
    Data,
    Device,
    ImageSize,
    Limit,
    Model,
    Pretrained,
    Resume,
    Seed,
    Split,
    Weights,
    stdout,
)
from .parse import check_out


@app.command()
def attack(
    model: Model,
    records: Annotated[
        Path, typer.Option(help="folder that certify wrote: its images, patch, k and precision")
    ],
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
    certified_restarts: Annotated[
        int, typer.Option(min=1, help="starts for each certified image, which must all fail")
    ] = 2,
    seed: Seed = 0,
    device: Device = "auto",
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Attack the defended model with patches, on the images of a certification: an upper bound beside the
    proven lower one."""
    from ..redteam.climb import AttackConfig

    check_out(out, data, str(records))
    source = images_as_certified(records, source_for(model, data, split, class_map))
    spec, network, _ = open_model(model, source, weights, pretrained, image_size, crop_pct)
    fine, options = as_certified(records, spec, network)
    config = AttackConfig(steps=steps, restarts=restarts, certified_restarts=certified_restarts, seed=seed)
    with _resumable(out):
        fab = make_fabric(device=device, precision=options["precision"])
        attack_certified(
            network,
            spec,
            source,
            fine,
            records,
            out,
            fabric=fab,
            config=config,
            options=options,
            limit=limit,
            resume=resume,
        )
    found = summarize_attack(out)
    if as_json:
        print(json.dumps(found))
        return
    stdout.print(attack_text(found), markup=False, soft_wrap=True)
    stdout.print(
        f"records: {out}/{ATTACKS}; the patched images: {out}/{PICTURES}", markup=False, soft_wrap=True
    )
