"""``certipatch predict``: classify images with the defended model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, DataError
from . import options as ask
from .parse import mask_set, parse_inference

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ..config import ModelSpec
    from ..defenses.patchcleanser.defense import PatchCleanser
    from ..models.runs import Opened


def predict(
    images: Annotated[list[Path], typer.Argument(help="image files")],
    model: Annotated[str, typer.Option(help="a training run (folder)")],
    certified: ask.CertifiedFolder = None,
    patch: ask.PatchWithout = None,
    masks_per_axis: ask.MasksPerAxisWithout = None,
    patches: ask.PatchesWithout = None,
    device: ask.Device = "auto",
    precision: ask.PrecisionWithout = None,
    inference: ask.Inference = None,
    class_names: ask.ClassNames = None,
) -> None:
    """Classify images with the defended model: one JSON line an image."""
    from ..data.source import evaluation_transform
    from ..data.words import in_words, read_class_names
    from ..models.runs import open_run

    opened = open_run(Path(model))
    if certified is not None:
        _refuse_besides(certified, bool(patch or masks_per_axis or patches or precision), inference)
        defense = _as_certified(certified, opened, device)
    elif patch is not None:
        way = {"precision": precision or "32-true", "inference": parse_inference(inference)}
        defense = _as_asked(opened, (patch, masks_per_axis or 6, patches or 1), device, way)
    else:
        raise ConfigError(
            "patch: expected --certified FOLDER, or --patch with the --masks-per-axis and --precision of "
            "certify"
        )
    transform = evaluation_transform(opened.spec)
    shown = in_words(opened.spec.classes, read_class_names(class_names) if class_names else None)
    failed = sum(not _answer(path, opened.spec, shown, defense, transform) for path in images)
    if failed:
        raise DataError(f"{failed} of {len(images)} images cannot be read; they are named in the output")


def _refuse_besides(certified: Path, geometry: bool, inference: str | None) -> None:
    if geometry:
        raise ConfigError(
            f"certified {certified}: has its own patch, k and precision; drop --patch, --patches, "
            "--masks-per-axis and --precision"
        )
    if inference:
        raise ConfigError(f"certified {certified}: has its own inference; drop --inference")


def _as_certified(certified: Path, opened: Opened, device: str) -> PatchCleanser:
    from ..certification.restore import read_certification, restore
    from ..report.certification import in_other_environments
    from ..runtime.devices import make_fabric

    manifest = read_certification(certified)
    for line in in_other_environments([manifest]):
        print(f"{line} This runs as the first part did.", file=sys.stderr)
    return restore(manifest, opened, make_fabric(device=device, precision=manifest.certification.precision))


def _as_asked(
    opened: Opened, geometry: tuple[str, int, int], device: str, way: dict[str, Any]
) -> PatchCleanser:
    """The defense against what was asked for; nothing says that it was ever certified."""
    from ..defenses.patchcleanser.defense import PatchCleanser
    from ..runtime.devices import make_fabric

    patch, masks_per_axis, patches = geometry
    fine = mask_set(patch, masks_per_axis, opened.spec.image_size, patches)
    fab = make_fabric(device=device, precision=way["precision"])
    return PatchCleanser(opened.network.to(fab.device).eval(), fine, **way)


def _answer(
    path: Path,
    spec: ModelSpec,
    shown: Sequence[str],
    defense: PatchCleanser,
    transform: Callable[[Image.Image], Tensor],
) -> bool:
    """Print the answer for one image as a line of JSON, with the class in words where it has some; False if
    it cannot be read."""
    from ..data.decode import UNREADABLE, decode, open_image, why_unreadable
    from ..data.source import as_float

    try:
        pixels = transform(decode(open_image(path)))
    except UNREADABLE as error:
        print(json.dumps({"image": str(path), "error": why_unreadable(error)}))
        return False
    device = next(defense.model.parameters()).device
    (verdict,) = defense.examine(as_float(pixels[None].to(device)))
    label, vanilla = verdict.defended_label, verdict.vanilla_label
    found = {
        **{"image": str(path), "label": label, "class": spec.classes[label], "case": verdict.case},
        **{"vanilla_label": vanilla, "vanilla_class": spec.classes[vanilla], "margin": verdict.margin},
        **defense.threat,
        **{"masks_per_axis": defense.masks.masks_per_axis, "precision": defense.network.precision},
        "inference": defense.inference,
    }
    if shown[label] != spec.classes[label]:
        found["class_in_words"] = shown[label]
    print(json.dumps(found))
    return True
