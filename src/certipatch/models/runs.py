"""A training run on disk back to the model that it ended with, read and hashed once."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn

from ..config import ModelSpec, is_path
from ..errors import ConfigError, DataError, RecordsError, SoundnessError, brief
from ..records.manifest import Manifest, holds_manifest, read_manifest
from .build import build
from .hub import folder_of, is_address
from .weights import weights_sha256


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be looked at, with all that is known of it.

    Attributes:
        spec: everything but the weights that makes a file of images into labels.
        network: ``Sequential(Normalize, network)`` in evaluation mode.
        trained: the configuration of the training run that it is from, if any.
        weights_sha256: the hash of the weights as they were when the model was opened.
    """

    spec: ModelSpec
    network: nn.Sequential
    trained: dict[str, Any] | None
    weights_sha256: str

    @classmethod
    def of(cls, spec: ModelSpec, network: nn.Sequential, trained: dict[str, Any] | None = None) -> Opened:
        """A model that is in memory already; its weights are hashed now."""
        return cls(spec, network, trained, weights_sha256(network))


def run_folder(model: str) -> Path | None:
    """The folder of the training run that a model's name stands for; None for another kind of model.

    Raises ConfigError for a path where there is no folder, and ModelError for an address that cannot be
    reached.
    """
    if is_address(model):
        folder = folder_of(model)
        return folder if holds_manifest(folder) else None
    names_path = is_path(model) or model.startswith(".")
    if names_path and not os.path.isdir(model):
        raise ConfigError(f"no training run at {model}: expected a folder that train wrote, or a timm name")
    return Path(model) if names_path or (os.path.isdir(model) and holds_manifest(Path(model))) else None


def load_run(
    folder: Path, *, classes: tuple[str, ...] | None = None
) -> tuple[ModelSpec, nn.Sequential, dict[str, Any]]:
    """The model that a training run ended with, its spec and the run's manifest as JSON.

    Args:
        classes: refuse the run if it tells other classes apart.

    Raises:
        RecordsError: not a folder of a finished training run. DataError: its classes are not ``classes``.
        SoundnessError: the weights are not the ones that were trained.
    """
    manifest = read_manifest(folder)
    opened = _opened(manifest, classes)
    return opened.spec, opened.network, manifest.written


def open_run(folder: Path, *, classes: tuple[str, ...] | None = None) -> Opened:
    """The model that a training run ended with. Arguments and errors are those of :func:`load_run`."""
    return _opened(read_manifest(folder), classes)


def _opened(manifest: Manifest, classes: tuple[str, ...] | None) -> Opened:
    folder, expected = manifest.folder, _trained_weights(manifest)
    spec = _spec(manifest)
    if classes is not None and classes != spec.classes:
        raise DataError(
            f"data: expected the classes of {folder} ({', '.join(spec.classes[:5])} ...), found "
            f"{', '.join(classes[:5])} ..."
        )
    model = build(spec, weights=str(folder / "model.safetensors"))
    found = weights_sha256(model)
    if found != expected:
        raise SoundnessError(
            f"model {folder}: expected weights of sha256 {str(expected)[:12]}..., found {found[:12]}...; "
            "model.safetensors is not the one that was trained: restore it or train again"
        )
    return Opened(spec, model, manifest.stated["train"], found)


def _trained_weights(manifest: Manifest) -> str:
    """The hash of the weights that the run ended with."""
    folder = manifest.folder
    if manifest.kind != "train":
        raise RecordsError(f"model {folder}: expected a training run, found records of {manifest.kind}")
    finished = manifest.finished
    if not isinstance(finished, dict) or "weights_sha256" not in finished:
        raise RecordsError(
            f"model {folder}: expected a finished training run, found one under way; run train --resume first"
        )
    return str(finished["weights_sha256"])


def _spec(manifest: Manifest) -> ModelSpec:
    try:
        return ModelSpec.model_validate_json(json.dumps(manifest.training.model), strict=True)
    except ValidationError as error:
        raise RecordsError(
            f"model {manifest.folder}: its manifest does not describe a model ({brief(error)})"
        ) from error
