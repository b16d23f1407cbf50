"""TODO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from ..config import ModelSpec
from ..errors import DataError, RecordsError, SoundnessError
from ..records.manifest import read_manifest
from .build import build
from .weights import _line, weights_sha256


def load_run(
    folder: Path, *, classes: tuple[str, ...] | None = None
) -> tuple[ModelSpec, nn.Sequential, dict[str, Any]]:
    """The model that a training run ended with, its spec and the run's manifest.

    Raises:
        RecordsError: not a folder of a finished training run. DataError: its classes are not ``classes``.
        SoundnessError: the weights are not the ones that were trained.
    """
    manifest = read_manifest(folder)
    if manifest["kind"] != "train":
        raise RecordsError(f"model {folder}: expected a training run, found records of {manifest['kind']}")
    if not isinstance(manifest["finished"], dict) or "weights_sha256" not in manifest["finished"]:
        raise RecordsError(
            f"model {folder}: expected a finished training run, found one under way; run train --resume first"
        )
    try:
        spec = ModelSpec.model_validate_json(json.dumps(manifest["experiment"]["model"]))
    except (KeyError, ValidationError) as error:
        raise RecordsError(
            f"model {folder}: its manifest does not describe a model ({_line(error)})"
        ) from error
    if classes is not None and classes != spec.classes:
        raise DataError(
            f"data: expected the classes of {folder} ({', '.join(spec.classes[:5])} ...), found "
            f"{', '.join(classes[:5])} ..."
        )
    model = build(spec, weights=str(folder / "model.safetensors"))
    found, expected = weights_sha256(model), manifest["finished"]["weights_sha256"]
    if found != expected:
        raise SoundnessError(
            f"model {folder}: expected weights of sha256 {str(expected)[:12]}..., found {found[:12]}...; "
            "model.safetensors is not the one that was trained: restore it or train again"
        )
    return spec, model, manifest
