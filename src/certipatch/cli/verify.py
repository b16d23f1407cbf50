"""TODO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .app import app
from .open import _certifications, is_run, open_model, source_for
from .options import AsJson, ClassMap, CropPct, Device, ImageSize, Pretrained, Split, Weights, stdout


@app.command()
def verify(
    certified: Annotated[Path, typer.Argument(help="folder that certify or detect wrote")],
    model: Annotated[str | None, typer.Option(help="compare its weights; as in certify")] = None,
    data: Annotated[
        str | None, typer.Option(help="compare its images; as in certify. With --model: look at some again")
    ] = None,
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
    """Check records with independent code: hashes, masks, flags, and images looked at again. Exit code 2 if
    anything is wrong."""
    from ..models.runs import load_run
    from ..verify.check import verify as check

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
            stdout.print(
                one.text(again=given is not None and source is not None), markup=False, soft_wrap=True
            )
    if any(one.findings for one in found):
        raise typer.Exit(2)
