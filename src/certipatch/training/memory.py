"""What a training step will take of the memory, said before it starts where that is much."""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..geometry.patch import Size
from ..runtime.console import say
from ..runtime.devices import autocast, precision_of
from ..views.masked import frozen

MUCH = 3e9  # bytes, from which on it is said


def step_bytes(model: nn.Module, image_size: Size, views: int, precision: str) -> int:
    """About how many bytes a gradient step on so many views (masked copies) holds at once.

    They are what the forward pass keeps for the backward pass, as a pass of one view has it, for each weight
    its gradient and its momentum, and a tenth more for the buffers of the kernels: of EfficientNet-Lite0 with
    64 views of 224 pixels in float32 this is 5.7 GB, and a step was measured to take 5.6.
    """
    parameters = list(model.parameters())
    weights = {each.untyped_storage().data_ptr() for each in (*parameters, *model.buffers())}
    kept: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    device = parameters[0].device
    image = torch.full((1, 3, *image_size), 0.5, device=device).contiguous(memory_format=torch.channels_last)
    with frozen(model), autocast(precision, device), saved_tensors_hooks(note, lambda saved: saved):
        held = model(image)  # keeps alive what was saved, so that no storage is counted for another
    del held
    of_weights = 3 * sum(each.nbytes for each in parameters)
    return int(1.1 * (views * (sum(kept.values()) + image.nbytes) + of_weights))


def say_memory(model: nn.Module, image_size: Size, views: int, fabric: Fabric) -> None:
    """A line on stderr if a step takes more than 3 GB on a CPU."""
    if fabric.device.type != "cpu":
        return
    needed = step_bytes(model, image_size, views, precision_of(fabric))
    if needed > MUCH:
        what = f"{views} views of {'x'.join(map(str, image_size))} pixels"
        say(
            f"a step will take about {needed / 1e9:.1f} GB of memory for its {what}; a smaller --batch-size "
            "takes less"
        )
