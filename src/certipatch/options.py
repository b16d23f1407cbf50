"""From what is typed to what is meant: the command line's options as sizes, masks, images and models.

Bad input is refused here, in one line. What needs torch is imported where it is used, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ModelSpec, differences
from .errors import ConfigError, DataError, RecordsError, SoundnessError
from .masks import MaskSet, Size, parse_patches, threat_of
from .patchcleanser import INFERENCES, Inference

if TYPE_CHECKING:
    from torch import nn

    from .data import Source


def parse_size(text: str) -> Size:
    try:
        sides = [int(side) for side in text.lower().split("x")]
        if len(sides) > 2 or min(sides) < 1:
            raise ValueError
    except ValueError:
        raise ConfigError(f"image size {text!r}: expected 224 or 224x192 (height x width)") from None
    return sides[0], sides[-1]


def parse_devices(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise ConfigError(f"devices {text!r}: expected a number of 1 or more, or auto")
    return text if text == "auto" else int(text)


def parse_inference(name: str | None) -> Inference:
    for known in INFERENCES:
        if name in (None, known):
            return known
    raise ConfigError(f"inference {name!r}: expected {' or '.join(INFERENCES)}")


def parse_shard(text: str) -> tuple[int, int]:
    number, slash, shards = text.partition("/")
    if not (slash and number.isdecimal() and shards.isdecimal() and 1 <= int(number) <= int(shards)):
        raise ConfigError(f"shard {text!r}: expected i/n with 1 <= i <= n, such as 1/8")
    return int(number), int(shards)


def parse_locations(data: list[str], runs: list[Any]) -> dict[str, str]:
    names = sorted({run.setup.data for run in runs})
    found = {}
    for entry in data:
        name, equals, place = entry.partition("=")
        if not equals or name not in names:
            raise ConfigError(f"--data {entry!r}: expected NAME=PLACE with a name out of {', '.join(names)}")
        found[name] = place
    return found


def check_out(out: Path, *data: str | None) -> None:
    """Refuse to write into the current folder by an empty name, or among the images."""
    if out == Path():
        raise ConfigError("out '': expected a folder to write, found no name")
    for place in data:
        if place and os.path.isdir(place) and out.resolve().is_relative_to(Path(place).resolve()):
            raise ConfigError(f"out {out}: expected a folder outside of the data {place}; choose another --out")


def check_out_file(out: Path) -> None:
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise ConfigError(f"out {out}: expected a file to write in a folder that exists")


def mask_set(patch: str, masks_per_axis: int, size: Size, patches: int = 1) -> MaskSet:
    """The masks for ``--patch`` (one shape, or several as in 39x20+20x39), ``--masks-per-axis`` and ``--patches``."""
    first, *others = parse_patches(patch, size)
    return MaskSet.covering(image_size=size, patch_size=first, other_patch_sizes=others, masks_per_axis=masks_per_axis, patches=patches)


def geometries(patch: str, masks_per_axis: str, size: Size, out: Path, patches: int = 1) -> dict[Path, MaskSet]:
    """The mask set for each patch and k, by the folder its records go to."""
    try:
        ks = [int(k) for k in masks_per_axis.split(",")]
    except ValueError:
        raise ConfigError(f"masks per axis {masks_per_axis!r}: expected a whole number, or several like 3,6") from None
    sets = {fine.name: fine for each in patch.split(",") for k in ks for fine in [mask_set(each, k, size, patches)]}
    return {out / name if len(sets) > 1 else out: fine for name, fine in sets.items()}


def source_for(model: str, data: str, split: str | None, class_map: str | None) -> Source:
    """The data set with labels as the model means them: a run brings its class names."""
    from .data import load_source
    from .models import load_run

    classes = load_run(Path(model))[0].classes if is_run(model) else None
    split = split or ("test" if data == "digits" else None)
    source = load_source(data, split=split, class_map=class_map, classes=classes)
    if classes is not None and source.classes != classes:
        raise DataError(
            f"data {data}: expected the classes of {model} ({', '.join(classes[:5])} ...), found {', '.join(source.classes[:5])} ..."
        )
    return source


def open_model(
    model: str, source: Source, weights: str | None, pretrained: bool, image_size: str | None, crop_pct: float | None,
    *, training: bool = False, seed: int = 0,
) -> tuple[ModelSpec, nn.Sequential, dict[str, Any] | None]:  # fmt: skip
    """The model behind ``--model`` with its spec and, for a run, what it was trained with."""
    from . import models
    from .runtime import stderr

    if is_run(model):
        if weights or pretrained or image_size or crop_pct:
            raise ConfigError(
                f"model {model}: a training run has its own weights and size; drop --weights, --pretrained, --image-size and --crop-pct"
            )
        spec, network, manifest = models.load_run(Path(model), classes=source.classes)
        return spec, network, manifest["experiment"]["train"]
    if not training and not weights and not pretrained:
        raise ConfigError(
            f"model {model}: expected a training run, or --weights or --pretrained with a timm name; random weights certify nothing"
        )
    size = parse_size(image_size) if image_size else None
    spec = models.describe(model, classes=source.classes, num_classes=len(source.classes), image_size=size, crop_pct=crop_pct)
    if _smaller(source, spec.image_size):
        enlarged = spec.model_copy(update={"interpolation": "bicubic", "crop_pct": crop_pct or 1.0})
        if enlarged != spec:
            spec = enlarged
            crop = "without a crop" if spec.crop_pct == 1 else f"with crop_pct {spec.crop_pct:g}"
            stderr.print(f"images are smaller than the model's input: resized bicubic {crop} (--crop-pct sets it)", markup=False)
    return spec, models.build(spec, pretrained=pretrained, weights=weights, replace_head=training, seed=seed), None


def as_certified(folder: Path, spec: ModelSpec, network: nn.Sequential) -> tuple[MaskSet, dict[str, Any]]:
    """The masks that a certification holds for, and the options of :class:`PatchCleanser` it was made with.

    Raises SoundnessError if it is of another model.
    """
    from .models import weights_sha256
    from .records import network_of

    manifest = _certification(folder)
    try:
        there = manifest["experiment"]
        masks, weights = there["masks"], there["weights_sha256"]
        if tuple(masks["image_size"]) != spec.image_size:
            raise SoundnessError(
                f"certified {folder}: is of images of {masks['image_size']} pixels, the model's are {spec.image_size}; certify this one"
            )
        way = network_of(manifest, folder)
        options = {
            "precision": str(there["precision"]),
            "batch_size": way.get("batch_size"),
            "compile": way.get("compiled", False),
            "shared_prefix": way.get("shared_prefix") or False,
            "inference": there.get("inference", "double-masking"),
        }
        fine = MaskSet.covering(**threat_of(masks), image_size=tuple(masks["image_size"]), masks_per_axis=masks["masks_per_axis"])
        same = {"model": spec.model_dump(mode="json"), "masks": json.loads(json.dumps(fine.to_json()))}
        differing = differences({key: there[key] for key in same}, same)
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordsError(f"{folder}: its manifest lacks {error}; restore it or certify again") from error
    if differing or weights != weights_sha256(network):
        what = "; ".join(differing[:3]) or f"weights of sha256 {str(weights)[:12]}... there, {weights_sha256(network)[:12]}... here"
        raise SoundnessError(f"certified {folder}: is of another model ({what}); certify this one")
    return fine, options


def _certification(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of ``certify``, which is checked as such. Raises ConfigError if it is of another kind."""
    from .records import read_manifest

    manifest = read_manifest(folder)
    if manifest["kind"] != "certify":
        raise ConfigError(f"certified {folder}: expected records of certify, found those of {manifest['kind']}")
    return manifest


def images_as_certified(folder: Path, source: Source) -> Source:
    """Those images of the data that a certification is of. Raises DataError if they are others."""
    there = _certification(folder)["experiment"]["data"]
    source = source.first(there["images"])
    differing = differences(there, source.describe())
    if differing:
        raise DataError(
            f"data: expected the images of {folder}, found others ({'; '.join(differing[:3])}); give its --data, --split and --class-map"
        )
    return source


def is_run(model: str) -> bool:
    is_path = os.sep in model or model.startswith(".")
    if is_path and not os.path.isdir(model):
        raise ConfigError(f"no training run at {model}: expected a folder that train wrote, or a timm name")
    return is_path or (os.path.isdir(model) and os.path.exists(os.path.join(model, "manifest.json")))


def _smaller(source: Source, size: Size) -> bool:
    """Whether all of some images, spread over the set, are smaller than the model's input."""
    from .data import UNREADABLE

    some, smaller = source.first(10), []
    for i in range(len(some)):
        try:
            width, height = some.open(i).size
        except UNREADABLE:
            continue
        smaller.append(height < size[0] or width < size[1])
    return bool(smaller) and all(smaller)
