"""Interval bounds through a network: what its logits can be for any image of a box.

Source: interval bound propagation, as Chiang et al. (ICLR 2020) use it against patches. A box is a lower and
an upper image. Each layer maps it to a box that holds whatever the layer makes of images in it: an affine
layer takes the centre along and spreads the radius by the absolute values of its weights, which is exact for
each of its outputs, because an affine value is extreme at a corner; a monotone layer maps both ends. The last
layer is merged with the differences z_y - z_c, so that what the two logits share is not counted twice.

Only layers of the table below are known. The published converter drops others in silence, and the bounds are
then those of another network; here they are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SoundnessError

Box = tuple[Tensor, Tensor]  # the lower and the upper end, of one shape


def bounds(network: nn.Module, lower: Tensor, upper: Tensor, label: Tensor) -> Tensor:
    """Lower bounds (N, classes) of z_y - z_c over all images between ``lower`` and ``upper``; 0 for c = y.

    Computed in the type of the boxes: float64 for a certificate, whose rounding is then some 1e-13; the
    gradients of training go through it.

    Args:
        network: layers in a row, nested or not, of which the last is linear; in evaluation mode.
        lower, upper: (N, 3, H, W), the ends of N boxes.
        label: (N,) int64, the classes y.

    Raises SoundnessError for a layer that bounds do not go through.
    """
    *body, last = layers_of(network)
    if type(last) is not nn.Linear:
        raise SoundnessError(f"bounds: expected a Linear layer at the end, found {type(last).__name__}")
    for layer in body:
        lower, upper = _step(layer)(layer, lower, upper)
    weight = last.weight.to(lower.dtype)
    differences = weight[label].unsqueeze(1) - weight  # (N, classes, inputs)
    centre, radius = ((upper + lower) / 2).unsqueeze(2), ((upper - lower) / 2).unsqueeze(2)
    found = (differences @ centre - differences.abs() @ radius).squeeze(2)
    if last.bias is not None:
        bias = last.bias.to(lower.dtype)
        found = found + bias[label].unsqueeze(1) - bias
    return found


def layers_of(network: nn.Module) -> list[nn.Module]:
    """The layers of a network one after the other, those of nested sequences in their place.

    Raises SoundnessError for a layer that is not known, or that something is hooked to.
    """
    if type(network) is nn.Sequential or _is_plain_sequence(network):
        layers = [layer for part in network.children() for layer in layers_of(part)]
    else:
        layers = [network]
        if not isinstance(network, nn.Linear):
            _step(network)  # refuses what is not known
    for part in (network, *layers):
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            raise SoundnessError(
                f"bounds: expected layers without hooks and as their type has them, found others at {part}; "
                "remove its hooks, or the forward that was set on it"
            )
    return layers


def _is_plain_sequence(network: nn.Module) -> bool:
    """Whether a module is a subclass of Sequential that does nothing else."""
    return isinstance(network, nn.Sequential) and type(network).forward is nn.Sequential.forward


def _conv(layer: nn.Conv2d, lower: Tensor, upper: Tensor) -> Box:
    if layer.padding_mode != "zeros":
        raise SoundnessError(f"bounds: expected a convolution padded with zeros, found {layer.padding_mode}")

    def through(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(values, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    return _affine(through, layer.weight, layer.bias, lower, upper)


def _linear(layer: nn.Linear, lower: Tensor, upper: Tensor) -> Box:
    return _affine(F.linear, layer.weight, layer.bias, lower, upper)


def _affine(
    through: Callable[..., Tensor], weight: Tensor, bias: Tensor | None, lower: Tensor, upper: Tensor
) -> Box:
    weight = weight.to(lower.dtype)
    centre = through((upper + lower) / 2, weight, None if bias is None else bias.to(lower.dtype))
    radius = through((upper - lower) / 2, weight.abs(), None)
    return centre - radius, centre + radius


def _batch_norm(layer: nn.BatchNorm2d, lower: Tensor, upper: Tensor) -> Box:
    if layer.training or layer.running_mean is None or layer.running_var is None:
        raise SoundnessError(
            "bounds: expected BatchNorm in evaluation mode with running statistics, found one that looks at "
            "the batch; call model.eval()"
        )
    scale = (layer.running_var.to(lower.dtype) + layer.eps).rsqrt()
    if layer.weight is not None:
        scale = scale * layer.weight.to(lower.dtype)
    shift = -layer.running_mean.to(lower.dtype) * scale
    if layer.bias is not None:
        shift = shift + layer.bias.to(lower.dtype)
    return _scaled(scale.view(-1, 1, 1), shift.view(-1, 1, 1), lower, upper)


def _normalize(layer: Any, lower: Tensor, upper: Tensor) -> Box:
    mean, std = (torch.as_tensor(each).to(lower).view(-1, 1, 1) for each in (layer.mean, layer.std))
    return _scaled(1 / std, -mean / std, lower, upper)


def _scaled(scale: Tensor, shift: Tensor, lower: Tensor, upper: Tensor) -> Box:
    """Each channel times a number, which may be negative, and shifted."""
    one, other = lower * scale + shift, upper * scale + shift
    return torch.minimum(one, other), torch.maximum(one, other)


def _monotone(layer: nn.Module, lower: Tensor, upper: Tensor) -> Box:
    """Both ends; in order, for a pooling may be asked to divide by a negative number."""
    one, other = layer(lower), layer(upper)
    return torch.minimum(one, other), torch.maximum(one, other)


STEPS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Box]] = {
    nn.Conv2d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: lambda _, lower, upper: (lower.relu(), upper.relu()),
    nn.Flatten: _monotone,
    nn.AvgPool2d: _monotone,
    nn.AdaptiveAvgPool2d: _monotone,
    nn.Identity: _monotone,
}


def _step(layer: nn.Module) -> Callable[[Any, Tensor, Tensor], Box]:
    """How a box goes through a layer. Raises SoundnessError for a layer of another kind, a subclass too."""
    if type(layer).__name__ == "Normalize" and hasattr(layer, "mean") and hasattr(layer, "std"):
        return _normalize
    if type(layer) not in STEPS:
        known = ", ".join(kind.__name__ for kind in STEPS)
        raise SoundnessError(
            f"bounds: expected layers of Normalize, {known}, found {type(layer).__name__}; choose a network "
            "of these alone, such as ibp-small"
        )
    return STEPS[type(layer)]
