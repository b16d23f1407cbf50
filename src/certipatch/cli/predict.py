"""TODO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..certification.restore import as_certified
from ..errors import ConfigError, DataError
from ..runtime.devices import make_fabric
from .app import app
from .options import Device, Inference
from .parse import mask_set, parse_inference


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="image files")],
    model: Annotated[str, typer.Option(help="a training run (folder)")],
    certified: Annotated[
        Path | None,
        typer.Option(help="folder that certify wrote: its patch, k and precision, for its weights only"),
    ] = None,
    patch: Annotated[str | None, typer.Option(help="without --certified: as in certify")] = None,
    masks_per_axis: Annotated[
        int | None, typer.Option(help="without --certified: as in certify; default 6")
    ] = None,
    patches: Annotated[
        int | None, typer.Option(min=1, max=2, help="without --certified: as in certify; default 1")
    ] = None,
    device: Device = "auto",
    precision: Annotated[
        str | None, typer.Option(help="without --certified: as in certify; default 32-true")
    ] = None,
    inference: Inference = None,
) -> None:
    """Classify images with the defended model: one JSON line an image."""
    import torch

    from ..data.decode import UNREADABLE, decode, open_image, why_unreadable
    from ..data.source import as_float, evaluation_transform
    from ..defenses.patchcleanser.defense import PatchCleanser
    from ..models.runs import load_run

    spec, network, _ = load_run(Path(model))
    if certified is not None:
        if patch or masks_per_axis or patches or precision:
            raise ConfigError(
                f"certified {certified}: has its own patch, k and precision; drop --patch, --patches, "
                "--masks-per-axis and --precision"
            )
        if inference:
            raise ConfigError(f"certified {certified}: has its own inference; drop --inference")
        fine, options = as_certified(certified, spec, network)
    elif patch is not None:
        fine = mask_set(patch, masks_per_axis or 6, spec.image_size, patches or 1)
        options = {"precision": precision or "32-true", "inference": parse_inference(inference)}
    else:
        raise ConfigError(
            "patch: expected --certified FOLDER, or --patch with the --masks-per-axis and --precision of "
            "certify"
        )
    fab = make_fabric(device=device, precision=options["precision"])
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
