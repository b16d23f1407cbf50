"""From a folder of records back to the defended model that it is about, and to its images.

``predict``, ``attack``, the demo and a service of your own use the defense as it was certified: same weights,
masks, fill, precision and inference, or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from pydantic import ValidationError
from torch import nn

from ..config import ModelAsked, ModelSpec, differences
from ..data.source import Source
from ..defenses.contract import CertifiedDefense, check_precision
from ..errors import ConfigError, DataError, RecordsError, SoundnessError, brief
from ..geometry.masks import MaskSet
from ..geometry.patch import Threat
from ..models.build import build
from ..models.hub import describe_folder, folder_of, is_address
from ..models.named import is_function, whole
from ..models.runs import Opened, open_run, run_folder
from ..records.manifest import Manifest, read_manifest
from ..runtime.devices import make_fabric
from .methods import ANSWERING, Defended, Way, method_of


def load_defense(
    model: str | Path | nn.Module,
    certified: str | Path,
    *,
    weights: str | None = None,
    pretrained: bool = False,
    device: str = "auto",
) -> Defended:
    """The defended model, exactly as a folder of ``certify`` certified it.

    Args:
        model: as ``--model`` names it (a training run, a timm name, ``package.module:function``,
            ``hf-hub:user/name``, ``local-dir:path``), or the module itself, as :func:`certipatch.certify`
            took it.
        certified: a folder that ``certify`` wrote of this model.
        weights, pretrained: with a timm name, as for ``certify``.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        RecordsError: a folder is damaged or not of that kind. ConfigError: the device or the precision cannot
        be had, or the folder is of detection. SoundnessError: it is of another model, or the model does not
        run here in the precision that it was certified in.
    """
    manifest = read_certification(Path(certified), ANSWERING)
    fabric = make_fabric(device=device, precision=manifest.certification.precision)
    if isinstance(model, nn.Module):
        opened = Opened.of(certified_spec(manifest), whole(model))
    else:
        opened = open_certified(ModelAsked(str(model), weights, pretrained), manifest)
    return restore(manifest, opened, fabric)


def open_certified(model: ModelAsked, manifest: Manifest) -> Opened:
    """The model that ``--model`` names, with classes and preprocessing as they were certified.

    Raises ConfigError for options that the certification decides. Errors of a model that cannot be had are
    those of opening it.
    """
    if model.image_size or model.crop_pct:
        raise ConfigError(
            f"certified {manifest.folder}: has its own preprocessing; drop --image-size and --crop-pct"
        )
    if folder := run_folder(model.name):
        if not model.bare:
            raise ConfigError(f"model {folder}: a training run has its own weights; drop --weights")
        return open_run(folder)
    spec, weights = certified_spec(manifest), model.weights
    arch = model.name
    if is_address(model.name):
        size = spec.image_size
        stated, weights = describe_folder(
            folder_of(model.name), classes=spec.classes, image_size=size, crop_pct=spec.crop_pct
        )
        arch = stated.arch
    elif not (is_function(arch) or model.has_weights):
        raise ConfigError(f"model {arch}: expected --weights or --pretrained with a timm name, found neither")
    if arch != spec.arch:
        raise SoundnessError(
            f"certified {manifest.folder}: is of another model (model.arch: {spec.arch} there, {arch} here); "
            "certify this one"
        )
    return Opened.of(spec, build(spec, pretrained=model.pretrained, weights=weights))


def certified_spec(manifest: Manifest) -> ModelSpec:
    """The model that a certification is of, without its weights."""
    try:
        return ModelSpec.model_validate_json(json.dumps(manifest.stated["model"]), strict=True)
    except ValidationError as error:
        raise RecordsError(
            f"certified {manifest.folder}: its manifest does not describe a model ({brief(error)})"
        ) from error


def restore(manifest: Manifest, opened: Opened, fabric: Fabric, *, plain: bool = False) -> Defended:
    """The defense that a certification is about, around the model that it is of, on the device of ``fabric``.

    ``plain``: neither compiled nor with a shared prefix, for one that is only asked what it is.

    Raises SoundnessError if it is of another model, or does not run here in its precision.
    """
    masks = certified_masks(manifest, opened)
    method, used = method_of(manifest.defense), manifest.network
    certified = manifest.certification
    way = Way(
        precision=certified.precision,
        batch_size=used.get("batch_size"),
        compile=not plain and used.get("compiled", False),
        shared_prefix=False if plain else used.get("shared_prefix") or False,
    )
    options = {name: manifest.stated[name] for name in method.options if name in manifest.stated}
    defense: Any = method.build(opened.network.to(fabric.device).eval(), masks, way, **options)
    check_precision(defense, certified.precision)
    _check_same(manifest, defense)
    found: Defended = defense
    return found


def _check_same(manifest: Manifest, defense: CertifiedDefense) -> None:
    """Whatever can change a result, such as the fill, is what was certified. Raises SoundnessError."""
    here = json.loads(json.dumps(defense.describe()))
    differing = differences({key: value for key, value in manifest.stated.items() if key in here}, here)
    if differing:
        raise SoundnessError(
            f"certified {manifest.folder}: is of another defense than this model's "
            f"({'; '.join(differing[:3])}); certify this one"
        )


def certified_masks(manifest: Manifest, opened: Opened) -> MaskSet:
    """The masks that a certification holds for. Raises SoundnessError if it is of another model than this."""
    certified, where = manifest.certification, f"certified {manifest.folder}"
    size = certified.against.image_size
    if tuple(size) != opened.spec.image_size:
        raise SoundnessError(
            f"{where}: is of images of {size} pixels, the model's are {opened.spec.image_size}; certify this "
            "one"
        )
    masks = MaskSet.covering(
        **Threat.of(certified.against.model_dump()),
        image_size=(size[0], size[1]),
        masks_per_axis=certified.masks_per_axis or 1,
    )
    same: dict[str, Any] = {"model": opened.spec.model_dump(mode="json")}
    if certified.masks is not None:
        same["masks"] = json.loads(json.dumps(masks.to_json()))
    differing = differences({key: manifest.stated[key] for key in same}, same)
    if certified.weights_sha256 != opened.weights_sha256:
        hashes = certified.weights_sha256[:12], opened.weights_sha256[:12]
        differing.append(f"weights of sha256 {hashes[0]}... there, {hashes[1]}... here")
    if differing:
        raise SoundnessError(f"{where}: is of another model ({'; '.join(differing[:3])}); certify this one")
    return masks


def read_certification(folder: Path, defenses: Sequence[str] = ANSWERING[:1]) -> Manifest:
    """The manifest of a folder of ``certify`` with one of some defenses; by default PatchCleanser.

    Raises ConfigError if it is of another kind or defense.
    """
    manifest = read_manifest(folder)
    if manifest.kind != "certify":
        raise ConfigError(f"certified {folder}: expected records of certify, found those of {manifest.kind}")
    if manifest.defense not in defenses:
        *some, last = defenses
        known = f"{', '.join(some)} or {last}" if some else last
        raise ConfigError(
            f"certified {folder}: expected a certification of {known}, found one of {manifest.defense}"
        )
    return manifest


def images_as_certified(manifest: Manifest, source: Source) -> Source:
    """Those images of the data that a certification is of. Raises DataError if they are others."""
    there = manifest.stated["data"]
    source = source.first(there["images"])
    differing = differences(there, source.describe())
    if differing:
        raise DataError(
            f"data: expected the images of {manifest.folder}, found others ({'; '.join(differing[:3])}); "
            "give its --data, --split and --class-map"
        )
    return source
