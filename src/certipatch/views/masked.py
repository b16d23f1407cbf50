"""Masked views of images: the one place where masks are laid over images for a network to see.

A *view* is an image with the windows of zero, one or two masks filled. Views are built on the device from
their windows, batch by batch, so that memory depends on the batch size and not on the number of masks or
images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import SoundnessError
from ..geometry.coverage import Mask
from ..geometry.patch import Size

# (V, 3, H, W) images in [0, 1] and their windows (V, windows, 4) -> (V, classes) logits of the masked views.
Look = Callable[[Tensor, Tensor], Tensor]


class Hiding(Protocol):
    """Rectangles of images of one size that are hidden, for one view after the other: those of a
    :class:`~certipatch.MaskSet`, or all but a window (:class:`~certipatch.views.ablated.Ablated`)."""

    @property
    def image_size(self) -> Size: ...

    @property
    def windows(self) -> tuple[Mask, ...]: ...

    def __len__(self) -> int: ...


def find_mean(model: nn.Module) -> Tensor | float:
    """The mean of a model's first Normalize layer (ours, torchvision's, kornia's ...); 0.5 if it has none."""
    for module in model.modules():
        if type(module).__name__ == "Normalize" and hasattr(module, "mean"):
            return torch.as_tensor(module.mean, dtype=torch.float32).detach().cpu().flatten()
    return 0.5


def default_batch_size(image_size: Size, *, pixels: int = 2**21) -> int:
    """Views in one forward pass when no batch size is asked for: ``pixels`` worth of them, but 16 to 512."""
    return max(16, min(512, pixels // (image_size[0] * image_size[1]) // 8 * 8))


def window_tensor(masks: Hiding, device: torch.device) -> Tensor:
    """The windows of each mask as a tensor (masks, windows, 4) int64: top, left, bottom, right.

    Masks with fewer windows than others are padded with empty ones.
    """
    return _window_tensor(masks.windows, torch.device(device))


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _window_tensor(masks: tuple[Mask, ...], device: torch.device) -> Tensor:
    """Kept, for to bring it to an accelerator is to wait for it."""
    most = max(len(mask) for mask in masks)
    rows = [[(w.top, w.left, w.top + w.height, w.left + w.width) for w in mask] for mask in masks]
    return torch.tensor([row + [(0, 0, 0, 0)] * (most - len(row)) for row in rows], device=device)


def fill_tensor(fill: float | Tensor, images: Tensor) -> Tensor:
    """The colour of masked pixels as (channels or 1, 1, 1), on the device and in the type of the images."""
    return torch.as_tensor(fill, device=images.device, dtype=images.dtype).reshape(-1, 1, 1)


def mask_images(images: Tensor, keep: Tensor, fill: float | Tensor) -> Tensor:
    """``x.m``: (N, 3, H, W) images with the pixels where ``keep`` (N, H, W) is False replaced by ``fill``.

    The result is laid out channels last, in which convolutions are fastest.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    return torch.where(keep.unsqueeze(1), images, fill_tensor(fill, images))


def visible(windows: Tensor, image_size: Size) -> Tensor:
    """The ``keep`` masks (V, H, W) of views with windows (V, windows, 4): True where no window lies."""
    top, left, bottom, right = windows[..., None].unbind(2)  # each (V, windows, 1)
    y = torch.arange(image_size[0], device=windows.device)
    x = torch.arange(image_size[1], device=windows.device)
    rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
    return ~(rows.unsqueeze(3) & columns.unsqueeze(2)).any(dim=1)


class Masked(nn.Module):
    """A network behind its masking: (images, windows) -> what the network makes of the masked views.

    Masking and network are one module, so that a compiler can join masking and normalisation in one kernel.
    ``images`` are (V, 3, H, W) float in [0, 1], ``windows`` (V, windows, 4) rows of :func:`window_tensor`;
    ``fill`` is the colour of masked pixels; ``batch_size`` is how many views a search may show it at once.
    """

    fill: Tensor

    def __init__(self, network: nn.Module, fill: float | Tensor, *, batch_size: int | None = None) -> None:
        super().__init__()
        self.network, self.batch_size = network, batch_size
        self.register_buffer("fill", torch.as_tensor(fill), persistent=False)

    def forward(self, images: Tensor, windows: Tensor) -> Tensor:
        keep = visible(windows, (images.shape[2], images.shape[3]))
        out: Tensor = self.network(mask_images(images, keep, self.fill))
        return out


def check_shape(logits: Tensor, views: int) -> Tensor:
    """The same logits. Raises SoundnessError if they are not of shape (views, 2 or more classes)."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != views or logits.shape[1] < 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SoundnessError(f"model output: expected (views, classes) = ({views}, 2 or more), found {found}")
    if logits.layout != torch.strided or logits.is_complex():
        raise SoundnessError(
            f"model output: expected real numbers in a dense tensor, found {logits.dtype} ({logits.layout})"
        )
    return logits


def check_logits(logits: Tensor, views: int) -> Tensor:
    """The logits of ``views`` views as float32.

    Raises SoundnessError if they are not of shape (views, 2 or more classes), or not all finite.
    """
    logits = check_shape(logits, views).float()
    check_finite([are_finite(logits)])
    return logits


def are_finite(logits: Tensor) -> Tensor:
    """Whether all logits (views, classes) are finite: a bool that is on the device still."""
    # Margins and confidences are made of differences of logits, so the largest difference must be finite too.
    return torch.isfinite(logits.amax(1) - logits.amin(1)).all()


def check_finite(found: list[Tensor]) -> None:
    """Wait once for the device, and raise SoundnessError if :func:`are_finite` has found any false."""
    if found and not torch.stack(found).all():
        raise SoundnessError(
            "model output: expected finite logits, found NaN or infinity; check the weights and the precision"
        )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keeps the model in evaluation mode, then gives back each module's own mode and the random state.

    In evaluation mode BatchNorm leaves its buffers alone, and :func:`~certipatch.views.losses.losses`
    computes no gradient, so a search for masks inside leaves no trace on the model.
    """
    training = [module for module in model.modules() if module.training]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True
