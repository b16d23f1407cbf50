"""TODO."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..config import ModelSpec
from ..errors import ConfigError, DataError
from ..geometry.patch import Size
from ..models.build import build, describe
from ..models.runs import load_run
from .parse import parse_size

if TYPE_CHECKING:
    from torch import nn

    from ..data.source import Source


def source_for(model: str, data: str, split: str | None, class_map: str | None) -> Source:
    """The data set with labels as the model means them: a run brings its class names."""
    from ..data.load import load_source
    from ..models.runs import load_run

    classes = load_run(Path(model))[0].classes if is_run(model) else None
    split = split or ("test" if data == "digits" else None)
    source = load_source(data, split=split, class_map=class_map, classes=classes)
    if classes is not None and source.classes != classes:
        raise DataError(
            f"data {data}: expected the classes of {model} ({', '.join(classes[:5])} ...), found "
            f"{', '.join(source.classes[:5])} ..."
        )
    return source


def open_model(
    model: str, source: Source, weights: str | None, pretrained: bool, image_size: str | None, crop_pct: float | None,
    *, training: bool = False, seed: int = 0,
) -> tuple[ModelSpec, nn.Sequential, dict[str, Any] | None]:  # fmt: skip
    """The model behind ``--model`` with its spec and, for a run, what it was trained with."""
    from ..runtime.console import stderr

    if is_run(model):
        if weights or pretrained or image_size or crop_pct:
            raise ConfigError(
                f"model {model}: a training run has its own weights and size; drop --weights, --pretrained, "
                "--image-size and --crop-pct"
            )
        spec, network, manifest = load_run(Path(model), classes=source.classes)
        return spec, network, manifest["experiment"]["train"]
    if not training and not weights and not pretrained:
        raise ConfigError(
            f"model {model}: expected a training run, or --weights or --pretrained with a timm name; random "
            "weights certify nothing"
        )
    size = parse_size(image_size) if image_size else None
    spec = describe(
        model, classes=source.classes, num_classes=len(source.classes), image_size=size, crop_pct=crop_pct
    )
    if _smaller(source, spec.image_size):
        enlarged = spec.model_copy(update={"interpolation": "bicubic", "crop_pct": crop_pct or 1.0})
        if enlarged != spec:
            spec = enlarged
            crop = "without a crop" if spec.crop_pct == 1 else f"with crop_pct {spec.crop_pct:g}"
            stderr.print(
                f"images are smaller than the model's input: resized bicubic {crop} (--crop-pct sets it)",
                markup=False,
            )
    return spec, build(spec, pretrained=pretrained, weights=weights, replace_head=training, seed=seed), None


def is_run(model: str) -> bool:
    is_path = os.sep in model or model.startswith(".")
    if is_path and not os.path.isdir(model):
        raise ConfigError(f"no training run at {model}: expected a folder that train wrote, or a timm name")
    return is_path or (os.path.isdir(model) and os.path.exists(os.path.join(model, "manifest.json")))


def _smaller(source: Source, size: Size) -> bool:
    """Whether all of some images, spread over the set, are smaller than the model's input."""
    from ..data.decode import UNREADABLE

    some, smaller = source.first(10), []
    for i in range(len(some)):
        try:
            width, height = some.open(i).size
        except UNREADABLE:
            continue
        smaller.append(height < size[0] or width < size[1])
    return bool(smaller) and all(smaller)


def _certifications(folder: Path) -> list[Path]:
    """The folder, or those in it that certify has written for several patches or k."""
    inside = sorted({path.parent for path in folder.glob("*/manifest*.json")})
    return inside if inside and not any(folder.glob("manifest*.json")) else [folder]


@contextmanager
def _resumable(out: Path, advice: str = "run the same command with --resume") -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted; what is done is kept in {out}: {advice}", file=sys.stderr)
        raise typer.Exit(130) from None
