"""TODO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ModelSpec, differences
from ..errors import ConfigError, DataError, RecordsError, SoundnessError
from ..geometry.masks import MaskSet
from ..geometry.patch import threat_of

if TYPE_CHECKING:
    from torch import nn

    from ..data.source import Source


def as_certified(folder: Path, spec: ModelSpec, network: nn.Sequential) -> tuple[MaskSet, dict[str, Any]]:
    """The masks that a certification holds for, and the options of :class:`PatchCleanser` it was made with.

    Raises SoundnessError if it is of another model.
    """
    from ..models.weights import weights_sha256
    from ..records.manifest import network_of

    manifest = _certification(folder)
    try:
        there = manifest["experiment"]
        masks, weights = there["masks"], there["weights_sha256"]
        if tuple(masks["image_size"]) != spec.image_size:
            raise SoundnessError(
                f"certified {folder}: is of images of {masks['image_size']} pixels, the model's are "
                f"{spec.image_size}; certify this one"
            )
        way = network_of(manifest, folder)
        options = {
            "precision": str(there["precision"]),
            "batch_size": way.get("batch_size"),
            "compile": way.get("compiled", False),
            "shared_prefix": way.get("shared_prefix") or False,
            "inference": there.get("inference", "double-masking"),
        }
        fine = MaskSet.covering(
            **threat_of(masks), image_size=tuple(masks["image_size"]), masks_per_axis=masks["masks_per_axis"]
        )
        same = {"model": spec.model_dump(mode="json"), "masks": json.loads(json.dumps(fine.to_json()))}
        differing = differences({key: there[key] for key in same}, same)
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordsError(f"{folder}: its manifest lacks {error}; restore it or certify again") from error
    if differing or weights != weights_sha256(network):
        what = (
            "; ".join(differing[:3])
            or f"weights of sha256 {str(weights)[:12]}... there, {weights_sha256(network)[:12]}... here"
        )
        raise SoundnessError(f"certified {folder}: is of another model ({what}); certify this one")
    return fine, options


def _certification(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of ``certify``, which is checked as such. Raises ConfigError if it is of
    another kind."""
    from ..records.manifest import read_manifest

    manifest = read_manifest(folder)
    if manifest["kind"] != "certify":
        raise ConfigError(
            f"certified {folder}: expected records of certify, found those of {manifest['kind']}"
        )
    return manifest


def images_as_certified(folder: Path, source: Source) -> Source:
    """Those images of the data that a certification is of. Raises DataError if they are others."""
    there = _certification(folder)["experiment"]["data"]
    source = source.first(there["images"])
    differing = differences(there, source.describe())
    if differing:
        raise DataError(
            f"data: expected the images of {folder}, found others ({'; '.join(differing[:3])}); give its "
            "--data, --split and --class-map"
        )
    return source
