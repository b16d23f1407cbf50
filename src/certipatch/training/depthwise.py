"""Gradients of grouped convolutions in float32 where bf16 is slower, as it often is on a CPU.

oneDNN has no fast kernel in bf16 for the backward pass of strided or 5x5 depthwise convolutions and falls to
a reference. The forward pass stays as it is; which layers pay is measured at the start of a run, so that it
serves any network, machine and version of torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..geometry.patch import Size
from ..runtime.console import say
from ..runtime.devices import precision_of
from ..views.masked import frozen

FASTER = 1.5  # times, from which on float32 is taken
TRIED = 4  # images that the trial takes at most
BACKWARD = torch.ops.aten.convolution_backward.default


class Layer(NamedTuple):
    """A grouped convolution as torch runs it: the shapes of one input and of the weight, and more."""

    image: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def slow_layers(model: nn.Module, image_size: Size, views: int, fabric: Fabric) -> list[Layer]:
    """The layers whose gradient is at least 1.5 times faster in float32 than in bf16.

    Process 0 finds them, for steps of so many views, and tells the others. None but on a CPU in bf16-mixed.
    """
    if fabric.device.type != "cpu" or precision_of(fabric) != "bf16-mixed":
        return []
    found: list[Layer] = []
    if fabric.is_global_zero:
        layers = _grouped(model, image_size)
        seconds = {layer: _seconds(layer, min(views, TRIED)) for layer in dict.fromkeys(layers)}
        found = [layer for layer, (bf16, float32) in seconds.items() if bf16 >= FASTER * float32]
        if found:
            before, after = (sum(seconds[layer][i] for layer in layers if layer in found) for i in (0, 1))
            say(
                f"the gradients of {sum(layer in found for layer in layers)} of {len(layers)} grouped "
                f"convolutions in float32, {before / after:.1f} times faster here than in bf16"
            )
    return [Layer(*layer) for layer in fabric.broadcast(found)]


def in_float32(layers: Iterable[Layer]) -> AbstractContextManager[object]:
    """A block in which the backward pass of these layers computes in float32."""
    some = frozenset(layers)
    return _Float32(some) if some else nullcontext()


class _Float32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, layers: frozenset[Layer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = layers

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is BACKWARD and args[9] > 1 and args[1].dtype is torch.bfloat16:
            image, weight, (stride, padding, dilation) = args[1], args[2], args[4:7]
            if _layer(image, weight, stride, padding, dilation, args[9]) in self.layers:
                return _backward_in_float32(args)
        return function(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the grouped convolutions of a forward pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers: list[Layer] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten.convolution.default:
            image, weight, _bias, stride, padding, dilation, transposed, _more, groups = args
            if groups > 1 and not transposed:
                self.layers.append(_layer(image, weight, stride, padding, dilation, groups))
        return function(*args, **(kwargs or {}))


def _layer(image: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Layer:
    shapes = tuple(image.shape[1:]), tuple(weight.shape)
    return Layer(*shapes, tuple(stride), tuple(padding), tuple(dilation), groups)


@torch.no_grad()
def _grouped(model: nn.Module, image_size: Size) -> list[Layer]:
    """The grouped convolutions of the model, each as often as it is run."""
    recorder = _Recorder()
    with frozen(model), recorder:
        model(torch.full((1, 3, *image_size), 0.5).contiguous(memory_format=torch.channels_last))
    return recorder.layers


def _seconds(layer: Layer, images: int) -> tuple[float, float]:
    """The seconds of the layer's backward pass in bf16 and in float32.

    Without units for bf16 a processor may take a hundred times as long: then a glance at one image and a few
    channels says enough, and its times are returned.
    """
    at_a_glance = _times(_arguments(_some_groups(layer, 16), 1))
    if at_a_glance[0] > 2 * FASTER * at_a_glance[1]:
        return at_a_glance
    return _times(_arguments(layer, images))


def _some_groups(layer: Layer, most: int) -> Layer:
    """The layer with its first groups only."""
    groups = min(most, layer.groups)
    out, into = layer.weight[0] // layer.groups * groups, layer.weight[1] * groups
    return layer._replace(image=(into, *layer.image[1:]), weight=(out, *layer.weight[1:]), groups=groups)


def _times(args: tuple[Any, ...]) -> tuple[float, float]:
    return _quickest(lambda: BACKWARD(*args)), _quickest(lambda: _backward_in_float32(args))


def _quickest(run: Callable[[], object]) -> float:
    """The seconds of the better of two runs after a first."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def _arguments(layer: Layer, images: int) -> tuple[Any, ...]:
    """What the backward pass of the layer is called with, for so many images in bf16."""
    height, width = (_outgoing(layer, axis) for axis in (0, 1))
    shapes = (images, *layer.image), layer.weight, (images, layer.weight[0], height, width)
    image, weight, gradient = (
        torch.randn(shape, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        for shape in shapes
    )
    how = layer.stride, layer.padding, layer.dilation
    return gradient, image, weight, None, *how, False, (0, 0), layer.groups, (True, True, False)


def _outgoing(layer: Layer, axis: int) -> int:
    """The height or width of what the layer makes of its input."""
    side, reach = layer.image[1 + axis], layer.dilation[axis] * (layer.weight[2 + axis] - 1)
    return (side + 2 * layer.padding[axis] - reach - 1) // layer.stride[axis] + 1


def _backward_in_float32(args: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of a convolution, computed in float32 and rounded to bf16 at the end."""
    found = BACKWARD(*(each.float() if isinstance(each, Tensor) else each for each in args))
    return tuple(None if each is None else each.to(torch.bfloat16) for each in found)
