"""From a folder of records back to the defended model that it is about, and to its images.

``predict``, ``attack``, the demo and a service of your own use the defense as it was certified: same weights,
masks, fill, precision and inference, or not at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from ..config import differences
from ..data.source import Source
from ..defenses.contract import CertifiedDefense, check_precision
from ..defenses.patchcleanser.defense import PatchCleanser
from ..errors import ConfigError, DataError, SoundnessError
from ..geometry.masks import MaskSet
from ..geometry.patch import Threat
from ..models.runs import Opened, open_run
from ..records.manifest import Manifest, read_manifest
from ..runtime.devices import make_fabric
from .methods import Way, method_of


def load_defense(run: str | Path, certified: str | Path, *, device: str = "auto") -> PatchCleanser:
    """The defended model of a training run, exactly as a folder of ``certify`` certified it.

    Args:
        run: the folder that ``train`` wrote. certified: a folder that ``certify`` wrote of this run.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        RecordsError: a folder is damaged or not of that kind. ConfigError: the device or the precision cannot
        be had, or the folder is of detection. SoundnessError: it is of another model, or the model does not
        run here in the precision that it was certified in.
    """
    manifest = read_certification(Path(certified))
    fabric = make_fabric(device=device, precision=manifest.certification.precision)
    return restore(manifest, open_run(Path(run)), fabric)


def restore(manifest: Manifest, opened: Opened, fabric: Fabric) -> PatchCleanser:
    """The defense that a certification is about, around the model that it is of, on the device of ``fabric``.

    Raises SoundnessError if it is of another model, or does not run here in its precision.
    """
    masks = certified_masks(manifest, opened)
    method, used = method_of(manifest.defense), manifest.network
    certified = manifest.certification
    way = Way(
        precision=certified.precision,
        batch_size=used.get("batch_size"),
        compile=used.get("compiled", False),
        shared_prefix=used.get("shared_prefix") or False,
    )
    options = {name: manifest.stated[name] for name in method.options if name in manifest.stated}
    defense: Any = method.build(opened.network.to(fabric.device).eval(), masks, way, **options)
    check_precision(defense, certified.precision)
    _check_same(manifest, defense)
    found: PatchCleanser = defense
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


def read_certification(folder: Path) -> Manifest:
    """The manifest of a folder of ``certify``. Raises ConfigError if it is of another kind or defense."""
    manifest = read_manifest(folder)
    if manifest.kind != "certify":
        raise ConfigError(f"certified {folder}: expected records of certify, found those of {manifest.kind}")
    if manifest.defense != PatchCleanser.name:
        raise ConfigError(
            f"certified {folder}: expected a certification of {PatchCleanser.name}, found one of "
            f"{manifest.defense}"
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
