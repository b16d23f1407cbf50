"""TODO."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .masked import Look, check_logits, default_batch_size


@torch.inference_mode()
def losses(look: Look, images: Tensor, labels: Tensor, windows: Tensor) -> Tensor:
    """Cross-entropy with the true label of each image under each of its candidate masks.

    Args:
        look: (images, windows) -> logits, such as :class:`Masked`, or a ``Network`` in batches of its size.
        images, labels: (N, 3, H, W) float in [0, 1] and (N,) int64.
        windows: (N, candidates, windows, 4), or (1, candidates, windows, 4) for the same candidates
            everywhere.

    Returns:
        (N, candidates) float32 on the device of the images.
    """
    n, candidates = len(images), windows.shape[1]
    which = torch.arange(n, device=images.device).repeat_interleave(candidates)
    flat = windows.expand(n, -1, -1, -1).flatten(0, 1)
    size = getattr(look, "batch_size", None) or default_batch_size((images.shape[2], images.shape[3]))
    out = torch.empty(n * candidates, device=images.device)
    for start in range(0, len(which), size):
        part = slice(start, start + size)
        logits = check_logits(look(images[which[part]], flat[part]), len(which[part]))
        out[part] = F.cross_entropy(logits, labels[which[part]], reduction="none")
    return out.view(n, candidates)


def gradients(
    look: Look,
    images: Tensor,
    which: Tensor,
    windows: Tensor,
    objective: Callable[[Tensor, slice], Tensor],
    *,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """The gradient of an objective of the views' logits with respect to the images.

    Args:
        look: (images, windows) -> logits, such as :class:`Masked`.
        which: (V,) index of each view's image. windows: (V, windows, 4) as rows of :func:`window_tensor`.
        objective: (V,) values of a batch of logits (V, classes) and the slice of the views that they belong
            to.

    Returns:
        the gradient of the sum, of the shape of ``images``, and the values (views,).
    """
    images = images.detach().requires_grad_()
    gradient, values = torch.zeros_like(images), []
    with torch.enable_grad():
        for start in range(0, len(which), batch_size):
            part = slice(start, start + batch_size)
            value = objective(check_logits(look(images[which[part]], windows[part]), len(which[part])), part)
            gradient += torch.autograd.grad(value.sum(), images)[0]
            values.append(value.detach())
    return gradient, torch.cat(values)
