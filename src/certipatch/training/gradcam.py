"""Grad-CAM: which part of an image speaks for its label, for CNNs and ViTs.

Source: Selvaraju et al., "Grad-CAM" (ICCV 2017), as captum computes it: the channels of a feature map,
weighted by the mean gradient of the label's logit, summed and cut off at zero. Here is what captum leaves
open: which layer, and how its output is read as a map. The layer's output goes through an identity as a map
and back, and captum looks at that identity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric.wrappers import _FabricModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError, SoundnessError
from ..geometry.patch import Size
from ..views.masked import frozen

# A map (N, C, h, w), and the way back from it to the shape of the layer's own output.
View = tuple[Tensor, Callable[[Tensor], Tensor]]


def saliency(model: nn.Module, images: Tensor, labels: Tensor, layer: str | None = None) -> Tensor:
    """The heat of every pixel: Grad-CAM of the label's logit, upsampled bilinearly.

    It costs one forward and one backward pass. The model stays as it was found, ``.grad`` included; gradients
    are computed under ``no_grad`` too.

    Args:
        model: maps (N, 3, H, W) in [0, 1] to (N, classes) logits; a ``Sequential(Normalize, network)`` or any
            module.
        images, labels: (N, 3, H, W) float in [0, 1] and (N,) int64.
        layer: a module of the network by its name there (``layer4``, ``blocks.11.norm1``). Default: the last
            feature map, that is timm's last feature, in front of the attention of a transformer's last block:
            behind it a class token no longer listens to the others, and their gradient is zero. A model that
            timm did not make runs one image more, to see which of its modules ends with a map.

    Returns:
        (N, H, W) float32 (float64 in a model of such), not negative; zero where nothing speaks for the label.

    Raises:
        ConfigError: no such layer, or one whose output is no map of the image.
        SoundnessError: heat that is not finite.
    """
    # The hooks of these wrappers expect a backward pass down to the weights, which Grad-CAM does not make.
    while isinstance(model, DistributedDataParallel | _FabricModule):
        model = model.module
    with frozen(model):
        heat = _attribution(model, _layer(model, images[:1], layer), images, labels)
    if not torch.isfinite(heat).all():
        raise SoundnessError(
            "Grad-CAM: expected finite heat, found NaN or infinity; check the weights and the precision"
        )
    return F.interpolate(heat, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def _attribution(model: nn.Module, module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """captum's Grad-CAM at the output of ``module``: (N, 1, h, w), in the size of its map."""
    from captum.attr import LayerGradCam  # here, as it takes a second, and all but gutout-* do without it

    network, size = _network(model), (images.shape[2], images.shape[3])
    probe = nn.Identity()  # captum attributes to its output, which is the layer's output as a map

    def through_probe(_module: nn.Module, _inputs: object, output: object) -> Tensor:
        view = _as_map(output, size, getattr(network, "num_prefix_tokens", 1))
        if view is None:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigError(
                f"Grad-CAM: expected a layer whose output is a map of the {size[0]}x{size[1]} image, "
                f"found {found}; name another with --gradcam-layer, such as {_some_layers(network)}"
            )
        features, back = view
        # Half precision, as under autocast, is too coarse for the sums over a map.
        exact = torch.promote_types(features.dtype, torch.float32)
        return back(probe(features.to(exact)).to(features.dtype))

    handle = module.register_forward_hook(through_probe)
    try:
        heat: Tensor = LayerGradCam(model, probe).attribute(images, target=labels, relu_attributions=True)
    except AssertionError as error:  # captum's: the layer does not run, or the logits are not (N, classes)
        raise ConfigError(
            f"Grad-CAM: {error}; name another layer with --gradcam-layer, such as {_some_layers(network)}"
        ) from error
    finally:
        handle.remove()
    return heat.detach()


def _network(model: nn.Module) -> nn.Module:
    """The network behind a normalisation: it has the module names of timm and of the files of weights."""
    if isinstance(model, nn.Sequential) and len(model) == 2 and type(model[0]).__name__ == "Normalize":
        return model[1]
    return model


def _layer(model: nn.Module, image: Tensor, name: str | None) -> nn.Module:
    """The module whose output captum attributes to: the one named, else timm's last feature, else the last
    that gives a map of the image."""
    network = _network(model)
    if name is not None:
        return _named(network, name)
    features: Any = getattr(network, "feature_info", None)
    if not features:
        return _last_map(model, image, network)
    last: Any = dict(network.named_modules()).get(features[-1]["module"])
    if last is None:
        raise ConfigError(
            "Grad-CAM: this model's last feature map is not known; name a layer with --gradcam-layer, "
            f"such as {_some_layers(network)}"
        )
    return getattr(last, "norm1", last)


def _named(network: nn.Module, name: str) -> nn.Module:
    modules = dict(network.named_modules())
    if not name or name not in modules:  # "" is the name of the network itself
        raise ConfigError(
            f"Grad-CAM: no layer {name!r} in the model; expected a module's name, such as "
            f"{_some_layers(network)}"
        )
    return modules[name]


def _last_map(model: nn.Module, image: Tensor, network: nn.Module) -> nn.Module:
    """The module that is the last, in the order of execution, to give a map."""
    size = (image.shape[2], image.shape[3])
    found: list[nn.Module] = []

    def note(module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and _as_map(output, size, 0) is not None:
            found.append(module)

    handles = [module.register_forward_hook(note) for module in network.modules()]
    try:
        with torch.no_grad():
            model.forward(image)  # not model(image): this pass is not one of the search
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ConfigError(
            "Grad-CAM: expected a model with a feature map, found none of more than one position in "
            f"{type(network).__name__}; choose a greedy strategy"
        )
    return found[-1]


def _as_map(output: object, size: Size, prefix_tokens: int) -> View | None:
    """Read (N, C, h, w), (N, h, w, C) or tokens (N, prefix + h*w, C) as a map (N, C, h, w), or None if it is
    none.

    A map has the image's proportions, up to a row, and more than one position.
    """
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 3:
        # The model's own count of prefix tokens, and none: CaiT adds its class token only behind the blocks.
        views = (_tokens_as_map(output, prefix, size) for prefix in (prefix_tokens, 0))
        return next((view for view in views if view), None)
    return _channels_as_map(output, size) if output.ndim == 4 else None


def _channels_as_map(output: Tensor, size: Size) -> View | None:
    """A map with its channels first, or last as Swin has them."""
    _, a, b, c = output.shape
    if _fits(b, c, size):
        return output, lambda features: features
    if _fits(a, b, size):
        return output.permute(0, 3, 1, 2), lambda features: features.permute(0, 2, 3, 1)
    return None


def _fits(h: int, w: int, size: Size) -> bool:
    return h * w > 1 and abs(h - w * size[0] / size[1]) <= 1


def _tokens_as_map(output: Tensor, prefix: int, size: Size) -> View | None:
    """The tokens behind the first ``prefix`` as a map, or None if they fill no grid of the image's
    proportions."""
    first, patches = output[:, :prefix], output[:, prefix:]
    tokens = patches.shape[1]
    h = max(round((tokens * size[0] / size[1]) ** 0.5), 1)
    if tokens % h or not _fits(h, tokens // h, size):
        return None
    return patches.mT.reshape(len(output), -1, h, tokens // h), lambda features: torch.cat(
        [first, features.flatten(2).mT], dim=1
    )


def _some_layers(network: nn.Module) -> str:
    """The names of a few modules that may be meant: timm's features, or some from the end of the network."""
    # A list of modules gives no output.
    modules = {name: m for name, m in network.named_modules() if not isinstance(m, nn.ModuleList)}
    modules.pop("", None)  # the network itself
    outer = [name for name in modules if name.count(".") < 2]
    return ", ".join(_timm_features(network, modules)[-4:] or outer[-8::2]) or "none"


def _timm_features(network: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """timm's features that are among the modules, those of transformers in front of their attention."""
    features: Any = getattr(network, "feature_info", None) or ()
    names = [feature["module"] for feature in features if feature["module"] in modules]
    return [f"{name}.norm1" if hasattr(modules[name], "norm1") else name for name in names]
