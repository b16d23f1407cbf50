"""Models by address: ``hf-hub:user/name``, with ``@revision`` behind it if need be, or ``local-dir:path``.

The folder there is a training run of ours, or as timm's ``save_for_hf`` writes it: ``config.json`` and
weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import ValidationError

from ..config import ModelSpec, parse_json
from ..errors import ConfigError, ModelError, brief
from ..runtime.console import stderr
from .build import describe

HUB, FOLDER = "hf-hub:", "local-dir:"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def is_address(name: str) -> bool:
    """Whether ``--model`` names a folder on a hub or here: ``hf-hub:user/name`` or ``local-dir:path``."""
    return name.startswith((HUB, FOLDER))


def folder_of(address: str) -> Path:
    """The folder behind an address, fetched from the hub if it is not here already.

    What was fetched is pinned by its commit, which a line on stderr says. Raises ModelError where there is
    none, or no network.
    """
    if address.startswith(FOLDER):
        folder = Path(address.removeprefix(FOLDER))
        if not folder.is_dir():
            raise ModelError(f"model {address}: expected a folder, found none at {folder}")
        return folder
    name, _, revision = address.removeprefix(HUB).partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ConfigError(f"model {address}: expected {HUB}user/name or {HUB}user/name@revision")
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(name, revision=revision or None)
    except Exception as error:  # no network, no such repository, no right to read it: in many words
        raise ModelError(
            f"model {address}: cannot be fetched from the hub ({brief(error)}); fetch its folder elsewhere "
            f"and type --model {FOLDER}FOLDER, or a timm name with --weights FILE"
        ) from error
    folder = Path(found)
    if revision != folder.name:
        stderr.print(f"model {HUB}{name}@{folder.name}", markup=False, soft_wrap=True)
    return folder


def describe_folder(
    folder: Path, *, classes: tuple[str, ...], image_size: tuple[int, int] | None, crop_pct: float | None
) -> tuple[ModelSpec, str]:
    """The spec of timm's model in a folder as ``save_for_hf`` writes it, and its file of weights.

    Raises ModelError for another folder, or for a model that needs more than a name to be built.
    """
    config = _config(folder)
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if weights is None:
        raise ModelError(f"model {folder}: expected {' or '.join(WEIGHT_FILES)}, found neither")
    describe(config["architecture"], classes=classes, num_classes=len(classes))  # refuses an unknown name
    other = _other_arguments(config)
    if other:
        raise ModelError(
            f"model {folder}: its config.json has model_args that differ from the architecture's "
            f"({', '.join(other)}); build it in a function and type --model package.module:function"
        )
    _check_order(folder, config.get("label_names"), classes)
    stated: dict[str, Any] = config["pretrained_cfg"]
    try:
        spec = ModelSpec(
            arch=config["architecture"],
            num_classes=max(len(classes), 2),
            classes=classes,
            image_size=image_size or tuple(stated["input_size"][1:]),
            crop_pct=crop_pct or stated["crop_pct"],
            **{key: stated[key] for key in ("mean", "std", "interpolation")},
            **({"crop_mode": stated["crop_mode"]} if "crop_mode" in stated else {}),
        )
    except (KeyError, TypeError, ValidationError) as error:
        raise ModelError(
            f"model {folder}: its config.json does not describe a model ({brief(error)})"
        ) from error
    return spec, str(weights)


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = parse_json((folder / "config.json").read_bytes())
        if not isinstance(config["architecture"], str) or not isinstance(config["pretrained_cfg"], dict):
            raise TypeError("architecture and pretrained_cfg are not as timm writes them")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model {folder}: expected a training run, or a config.json as timm's save_for_hf writes it "
            f"({brief(error)})"
        ) from error
    found: dict[str, Any] = config
    return found


def _other_arguments(config: dict[str, Any]) -> list[str]:
    """The arguments with which the model is built and that neither its name nor the images decide."""
    stated = config.get("model_args") or {}
    if not isinstance(stated, dict):
        return ["no dict"]
    with torch.device("meta"):
        usual = timm.models.get_model_args(timm.create_model(config["architecture"]))
    decided = ("num_classes", "img_size")
    return [key for key, value in stated.items() if key not in decided and usual.get(key, value) != value]


def _check_order(folder: Path, names: Any, classes: tuple[str, ...]) -> None:
    """Raises ModelError where the model's own names of its outputs are those of the data in another order."""
    if isinstance(names, list) and sorted(map(str, names)) == sorted(classes) and tuple(names) != classes:
        raise ModelError(
            f"model {folder}: its outputs are {', '.join(map(str, names[:3]))} ..., the data's classes "
            f"{', '.join(classes[:3])} ...; give --class-map FILE with one class folder a line, in the order "
            "of the model's label_names"
        )
