"""Models of one's own: a function by its name, or a module in memory.

``package.module:function`` is imported (from the current folder too) and called. What it returns is the whole
model: (N, 3, H, W) floats in [0, 1] to logits, its normalisation inside. Its weights are hashed as those of
any model; its code is not, so that a certificate says which weights it is of, and ``verify`` whether they
answer as recorded.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ..config import ModelSpec
from ..errors import ConfigError, ModelError, brief

PREPROCESSING = ("image_size", "crop_pct", "crop_mode", "interpolation")


def is_function(name: str) -> bool:
    """Whether ``--model`` names a function: ``package.module:function``."""
    return re.fullmatch(r"[^\W\d][\w.]*:[^\W\d][\w.]*", name) is not None


def module_of(name: str) -> nn.Module:
    """The module that a function returns. Raises ConfigError where there is no such function, and ModelError
    for one that fails or returns something else."""
    place, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the command's own folder is there instead
    try:
        found: Any = importlib.import_module(place)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"model {name}: expected a function in a module that can be imported here, found none "
            f"({brief(error)}); type package.module:function"
        ) from error
    try:
        module = found()
    except Exception as error:  # a stranger's function may fail in any way
        raise ModelError(
            f"model {name}: its function failed ({type(error).__name__}: {brief(error)})"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"model {name}: expected a function that returns a torch.nn.Module, found "
            f"{type(module).__name__}; return the model itself"
        )
    return module


def describe_module(
    module: nn.Module,
    name: str,
    *,
    classes: tuple[str, ...],
    image_size: tuple[int, int] | None = None,
    crop_pct: float | None = None,
) -> ModelSpec:
    """The spec of a whole model: mean and deviation of its Normalize layer, the rest as it states it.

    A module may have a dict ``preprocessing`` with any of ``image_size`` (a number or height and width),
    ``crop_pct``, ``crop_mode`` and ``interpolation``, as of :class:`certipatch.config.ModelSpec`. Raises
    ConfigError without a size, or for other entries.
    """
    stated = getattr(module, "preprocessing", {})
    if not isinstance(stated, dict) or set(stated) - set(PREPROCESSING):
        raise ConfigError(
            f"model {name}: expected preprocessing to be a dict of {', '.join(PREPROCESSING)}, found "
            f"{stated!r}"
        )
    size = image_size or stated.get("image_size")
    if size is None:
        raise ConfigError(
            f"model {name}: expected --image-size, or model.preprocessing = {{'image_size': 224}}, found none"
        )
    asked: dict[str, Any] = {"image_size": (size, size) if isinstance(size, int) else tuple(size)}
    asked |= {"crop_pct": crop_pct} if crop_pct else {}
    try:
        return ModelSpec(
            arch=name,
            num_classes=max(len(classes), 2),
            classes=classes,
            **{**_normalisation(module), **stated, **asked},
        )
    except (ValidationError, TypeError) as error:
        raise ConfigError(f"model {name}: its preprocessing cannot be used ({brief(error)})") from error


def _normalisation(module: nn.Module) -> dict[str, tuple[float, ...]]:
    """Mean and deviation of the first Normalize layer; a half and 1 for a model without one."""
    for layer in module.modules():
        if type(layer).__name__ == "Normalize" and hasattr(layer, "mean") and hasattr(layer, "std"):
            both = (torch.as_tensor(each, dtype=torch.float32).flatten() for each in (layer.mean, layer.std))
            mean, std = (tuple(each.expand(3).tolist() if len(each) == 1 else each.tolist()) for each in both)
            return {"mean": mean, "std": std}
    return {"mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0)}


def whole(module: nn.Module) -> nn.Sequential:
    """A whole model in the shape that every model has here: normalisation, then network."""
    return nn.Sequential(nn.Identity(), module).eval()


def check_outputs(model: nn.Module, spec: ModelSpec) -> None:
    """Raises ModelError for a model that does not answer images of its spec with logits of its classes."""
    parameter = next(model.parameters(), torch.zeros(()))
    try:
        with torch.inference_mode():
            out = model(torch.zeros(2, 3, *spec.image_size, device=parameter.device))
    except Exception as error:  # what networks demand of a size they say in any way
        height, width = spec.image_size
        raise ModelError(
            f"model {spec.arch}: does not take images of {height}x{width} pixels ({brief(error)}); choose "
            "another --image-size"
        ) from error
    if not isinstance(out, Tensor) or out.ndim != 2:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ModelError(
            f"model {spec.arch}: expected logits (images, classes), found {found}; wrap it so that its "
            "forward returns them"
        )
    if out.shape[1] != len(spec.classes):
        raise ModelError(
            f"model {spec.arch}: tells {out.shape[1]} classes apart, the data has {len(spec.classes)}; give "
            "--class-map, or train a new head first"
        )
