"""Masked views of images: the one place where a network sees them.

A *view* is an image with the windows of zero, one or two masks filled. Views are built on the device from their
windows, batch by batch, so that memory depends on the batch size and not on the number of masks or images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import SoundnessError
from .masks import MaskSet, Size
from .patchcleanser import UNKNOWN

Model = Callable[[Tensor], Tensor]  # (N, 3, H, W) float in [0, 1] -> (N, classes) logits; normalisation inside


def default_batch_size(image_size: Size, *, pixels: int = 2**21) -> int:
    """Views in one forward pass when nothing else is asked for: about ``pixels`` in all, 16 to 512 views."""
    return max(16, min(512, pixels // (image_size[0] * image_size[1]) // 8 * 8))


def window_tensor(masks: MaskSet, device: torch.device) -> Tensor:
    """(masks, windows, 4) int64: top, left, bottom, right of each window; masks with fewer windows are padded by empty ones."""
    most = max(len(mask) for mask in masks.windows)
    rows = [[(w.top, w.left, w.top + w.height, w.left + w.width) for w in mask] for mask in masks.windows]
    return torch.tensor([row + [(0, 0, 0, 0)] * (most - len(row)) for row in rows], device=device)


def fill_tensor(fill: float | Tensor, images: Tensor) -> Tensor:
    """The colour of masked pixels as (channels or 1, 1, 1), on the device and in the type of the images."""
    return torch.as_tensor(fill, device=images.device, dtype=images.dtype).reshape(-1, 1, 1)


def mask_images(images: Tensor, keep: Tensor, fill: float | Tensor) -> Tensor:
    """``x.m``: (N, 3, H, W) images with the pixels where ``keep`` (N, H, W) is False replaced by ``fill``."""
    images = images.contiguous(memory_format=torch.channels_last)  # the layout in which convolutions are fastest
    return torch.where(keep.unsqueeze(1), images, fill_tensor(fill, images))


def visible(windows: Tensor, image_size: Size) -> Tensor:
    """The ``keep`` masks (V, H, W) of V views whose windows are (V, windows, 4): True where no window lies."""
    top, left, bottom, right = windows[..., None].unbind(2)  # each (V, windows, 1)
    y = torch.arange(image_size[0], device=windows.device)
    x = torch.arange(image_size[1], device=windows.device)
    rows, columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
    return ~(rows.unsqueeze(3) & columns.unsqueeze(2)).any(dim=1)


def _logits(
    model: Model, images: Tensor, which: Tensor, windows: Tensor, *, fill: float | Tensor, batch_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the float32 logits of views ``images[which]`` under ``windows``, a batch at a time."""
    for start in range(0, len(which), batch_size):
        part = slice(start, start + batch_size)
        keep = visible(windows[part], (images.shape[2], images.shape[3]))
        logits = model(mask_images(images[which[part]], keep, fill)).float()
        if logits.ndim != 2 or len(logits) != len(keep) or logits.shape[1] < 2:
            raise SoundnessError(f"model output: expected (views, classes) = ({len(keep)}, 2 or more), found {tuple(logits.shape)}")
        if not torch.isfinite(logits).all():
            raise SoundnessError("model output: expected finite logits, found NaN or infinity; check the weights and the precision")
        yield part, logits


@torch.inference_mode()
def predictions(
    model: Model, images: Tensor, which: Tensor, windows: Tensor, *, fill: float | Tensor, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Labels and margins of V views.

    Args:
        model: maps (N, 3, H, W) in [0, 1] to (N, classes) logits.
        images: (N, 3, H, W) float in [0, 1].
        which: (V,) index of each view's image.
        windows: (V, windows, 4) as rows of :func:`window_tensor`, those of two masks side by side.
        fill: colour of masked pixels, a number or (3,).
        batch_size: views in one forward pass.

    Returns:
        labels (V,) int64 and margins (V,) float32 (best minus second-best logit, >= 0), on the CPU.

    Raises:
        SoundnessError: logits that are not finite or not (views, classes).
    """
    labels = torch.full((len(which),), UNKNOWN)  # what is not computed certifies nothing
    margins = torch.zeros(len(which))
    for part, logits in _logits(model, images, which, windows, fill=fill, batch_size=batch_size):
        best = logits.topk(2, dim=1).values
        labels[part] = logits.argmax(dim=1).cpu()  # the first of equals, which topk does not promise
        margins[part] = (best[:, 0] - best[:, 1]).cpu()
    return labels, margins


@torch.no_grad()
def losses(
    model: Model,
    images: Tensor,
    labels: Tensor,
    windows: Tensor,
    *,
    fill: float | Tensor,
    batch_size: int | None = None,
) -> Tensor:
    """Cross-entropy with the true label of each image under each of its candidate masks.

    Args:
        images, labels: (N, 3, H, W) float in [0, 1] and (N,) int64.
        windows: (N, candidates, windows, 4), or (1, candidates, windows, 4) for the same candidates everywhere.

    Returns:
        (N, candidates) float32 on the device of the images.
    """
    n, candidates = len(images), windows.shape[1]
    which = torch.arange(n, device=images.device).repeat_interleave(candidates)
    flat = windows.expand(n, -1, -1, -1).flatten(0, 1)
    size = batch_size or default_batch_size((images.shape[2], images.shape[3]))
    out = torch.empty(n * candidates, device=images.device)
    for part, logits in _logits(model, images, which, flat, fill=fill, batch_size=size):
        out[part] = F.cross_entropy(logits, labels[which[part]], reduction="none")
    return out.view(n, candidates)


def gradients(
    model: Model,
    images: Tensor,
    which: Tensor,
    windows: Tensor,
    objective: Callable[[Tensor, slice], Tensor],
    *,
    fill: float | Tensor,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """The gradient of an objective of the views' logits with respect to the images.

    Args:
        which, windows: the views, as for :func:`predictions`.
        objective: (V,) values of a batch of logits (V, classes) and the slice of the views that they belong to.

    Returns:
        the gradient of the sum, of the shape of ``images``, and the values (views,).
    """
    images = images.detach().requires_grad_()
    gradient, values = torch.zeros_like(images), []
    with torch.enable_grad():
        for part, logits in _logits(model, images, which, windows, fill=fill, batch_size=batch_size):
            value = objective(logits, part)
            gradient += torch.autograd.grad(value.sum(), images)[0]
            values.append(value.detach())
    return gradient, torch.cat(values)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within, every module's own mode and the random state as they were found after.

    In evaluation mode BatchNorm leaves its buffers alone, and :func:`losses` computes no gradient, so a search
    inside leaves no trace on the model.
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
