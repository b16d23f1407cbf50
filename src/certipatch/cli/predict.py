"""``certipatch predict``: classify images with the defended model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from ..config import ModelAsked
from ..errors import ConfigError, DataError
from . import options as ask
from .open import is_run, open_deployed, open_run_asked, place_of
from .parse import mask_set, parse_inference

if TYPE_CHECKING:
    from PIL import Image

    from ..certification.methods import Defended
    from ..defenses.patchcleanser.defense import PatchCleanser
    from ..models.runs import Opened

T = TypeVar("T")
Answer = Callable[[Sequence[T]], list[dict[str, Any]]]


def predict(
    images: Annotated[list[Path], typer.Argument(help="image files")],
    model: ask.Model,
    certified: ask.CertifiedFolder = None,
    weights: ask.Weights = None,
    pretrained: ask.Pretrained = False,
    patch: ask.PatchWithout = None,
    masks_per_axis: ask.MasksPerAxisWithout = None,
    patches: ask.PatchesWithout = None,
    device: ask.Device = "auto",
    precision: ask.PrecisionWithout = None,
    inference: ask.Inference = None,
    prove: ask.Prove = False,
    places: ask.ProvenPlaces = False,
    class_names: ask.ClassNames = None,
) -> None:
    """Classify images with the defended model: one JSON line an image."""
    if places and not prove:
        raise ConfigError("--places: expected --prove with it")
    asked = ModelAsked(model, weights, pretrained)
    if deployed := open_deployed(asked, device):
        given = (certified, patch, masks_per_axis, patches, precision, inference, class_names)
        if any(given):
            raise ConfigError(
                f"model {model}: an export has all of its own; drop the options but --prove, --places"
            )
        answers = partial(deployed.prove, places=places) if prove else deployed.answer
        failed = print_answers(images, deployed.preprocess, answers, at_once=1)
    else:
        opened, defense, least = _opened(
            asked,
            certified,
            (patch, masks_per_axis, patches),
            device,
            {"precision": precision, "inference": inference},
        )
        failed = _answers(images, Asked(opened, defense, least, class_names), prove=prove, places=places)
    if failed:
        raise DataError(f"{failed} of {len(images)} images cannot be read; they are named in the output")


@dataclass(frozen=True)
class Asked:
    """A defended model, the least margin of a proof, and the file with words for its classes."""

    opened: Opened
    defense: Defended
    least: float
    class_names: Path | None


def _answers(images: Sequence[Path], asked: Asked, *, prove: bool, places: bool) -> int:
    """Print the answers of a model in torch; how many images cannot be read."""
    from ..data.source import evaluation_transform
    from ..data.words import read_class_names
    from ..defenses.patchcleanser.defense import PatchCleanser
    from ..deploy.predictor import Predictor
    from ..deploy.windows import WindowPredictor
    from ..records.store import BLOCK

    named = read_class_names(asked.class_names) if asked.class_names else None
    kind = Predictor if isinstance(asked.defense, PatchCleanser) else WindowPredictor
    predictor: Any = cast(Any, kind).of(asked.opened.spec, asked.defense, asked.least, named)
    answer = partial(predictor.prove, places=places) if prove else predictor.answer
    transform = evaluation_transform(asked.opened.spec)
    return print_answers(images, transform, answer, at_once=BLOCK if prove else 1)


def _opened(
    asked: ModelAsked,
    certified: Path | None,
    geometry: tuple[str | None, int | None, int | None],
    device: str,
    way: dict[str, str | None],
) -> tuple[Opened, Defended, float]:
    """The model, its defense as it was certified or as it is asked for, and the least margin of a proof."""
    patch, masks_per_axis, patches = geometry
    if certified is not None:
        _refuse_besides(certified, any((*geometry, way["precision"])), way["inference"])
        return as_certified(certified, asked, device, answering=True)
    if patch is None:
        raise ConfigError(
            "patch: expected --certified FOLDER, or --patch with the --masks-per-axis and --precision of "
            "certify"
        )
    if not is_run(asked.name):
        raise ConfigError(f"model {asked.name}: expected --certified FOLDER with it, or a training run")
    opened = open_run_asked(asked)
    options = {
        "precision": way["precision"] or "32-true",
        "inference": parse_inference(way["inference"]),
    }
    return opened, _as_asked(opened, (patch, masks_per_axis or 6, patches or 1), device, options), 0.0


def _refuse_besides(certified: Path, geometry: bool, inference: str | None) -> None:
    if geometry:
        raise ConfigError(
            f"certified {certified}: has its own patch, k and precision; drop --patch, --patches, "
            "--masks-per-axis and --precision"
        )
    if inference:
        raise ConfigError(f"certified {certified}: has its own inference; drop --inference")


def as_certified(
    certified: Path, asked: ModelAsked, device: str, *, answering: bool = False
) -> tuple[Opened, Defended, float]:
    """The model, the defense that was certified, and the least margin of what is proven with it.

    ``answering``: take any defense that answers, not PatchCleanser alone.
    """
    from ..certification.methods import ANSWERING
    from ..certification.restore import open_certified, read_certification, restore
    from ..report.certification import in_other_environments
    from ..runtime.devices import make_fabric

    manifest = read_certification(place_of(certified), ANSWERING if answering else ANSWERING[:1])
    for line in in_other_environments([manifest]):
        print(f"{line} This runs as the first part did.", file=sys.stderr)
    opened = open_certified(asked, manifest)
    fabric = make_fabric(device=device, precision=manifest.certification.precision)
    return opened, restore(manifest, opened, fabric), manifest.rounding


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


def print_answers(
    images: Sequence[Path], transform: Callable[[Image.Image], T], answer: Answer[T], *, at_once: int
) -> int:
    """Print a line of JSON for each image, so many examined together; how many cannot be read."""
    from ..data.decode import UNREADABLE, decode, open_image, why_unreadable

    failed = 0
    for start in range(0, len(images), at_once):
        pixels: dict[int, T] = {}
        errors: dict[int, str] = {}
        block = range(start, min(start + at_once, len(images)))
        for i in block:
            try:
                pixels[i] = transform(decode(open_image(images[i])))
            except UNREADABLE as error:
                errors[i] = why_unreadable(error)
        answers = dict(zip(pixels, answer([*pixels.values()]) if pixels else [], strict=True))
        for i in block:
            print(json.dumps({"image": str(images[i]), **answers.get(i, {"error": errors.get(i)})}))
        failed += len(errors)
    return failed
