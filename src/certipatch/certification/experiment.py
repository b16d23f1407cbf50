"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from ..config import ModelSpec
from ..data.source import Source
from ..defenses.masked import MaskedClassifier
from ..models.weights import weights_sha256
from ..records.manifest import network_of, read_manifests
from .blocks import BLOCK


def _experiment(
    network: nn.Module,
    spec: ModelSpec,
    source: Source,
    defense: MaskedClassifier,
    trained: dict[str, Any] | None,
    fabric: Fabric,
) -> dict[str, Any]:
    """What can change a result, and is common to all that is certified."""
    return {
        "model": spec.model_dump(mode="json"),
        "weights_sha256": weights_sha256(network),
        "trained": trained,
        "masks": defense.masks.to_json(),
        "fill": defense.fill.tolist(),
        "data": source.describe(),
        "device": fabric.device.type,
        "precision": defense.network.precision,
        "block": BLOCK,
    }


def _network_of(out: Path, shard: str) -> dict[str, Any]:
    """How the network was run by the attempt that is resumed, if there is one."""
    for path, found in read_manifests(out).items():
        if path.stem.removeprefix("manifest").lstrip("-") == shard:
            return network_of(found, path)
    return {}
