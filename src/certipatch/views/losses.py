"""What a search minimises or maximises over masked views: the loss under each mask, and gradients.

The searches of fine-tuning use :func:`losses`, the attack uses :func:`gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.progress import seen
from .masked import Look, Masked, are_finite, check_finite, check_logits, check_shape, default_batch_size


@torch.inference_mode()
def losses(
    look: Look, images: Tensor, labels: Tensor, windows: Tensor, *, finite: list[Tensor] | None = None
) -> Tensor:
    """Cross-entropy with the true label of each image under each of its candidate masks.

    Args:
        look: (images, windows) -> logits: a :class:`~certipatch.views.masked.Masked`, which is given as few
            equal batches as its own size allows, or a :class:`~certipatch.views.network.Network`, which is
            given batches of its size.
        images, labels: (N, 3, H, W) float in [0, 1] and (N,) int64.
        windows: (N, candidates, windows, 4), or (1, candidates, windows, 4) if all images have the same
            candidates.
        finite: gets what :func:`~certipatch.views.masked.check_finite` has to look at; without it that is
            looked at here, which waits for the device.

    Returns:
        the losses, (N, candidates) float32 on the device of the images.
    """
    n, candidates = len(images), windows.shape[1]
    which = torch.arange(n, device=images.device).repeat_interleave(candidates)
    flat = windows.expand(n, -1, -1, -1).flatten(0, 1)
    size = getattr(look, "batch_size", None) or default_batch_size((images.shape[2], images.shape[3]))
    if isinstance(look, Masked) and look.batch_size:
        size = ceil(len(which) / ceil(len(which) / size))
    out, found = torch.empty(n * candidates, device=images.device), [] if finite is None else finite
    for start in range(0, len(which), size):
        part = slice(start, start + size)
        logits = check_shape(look(images[which[part]], flat[part]), len(which[part])).float()
        found.append(are_finite(logits))
        out[part] = F.cross_entropy(logits, labels[which[part]], reduction="none")
        seen(views=len(logits))
    if finite is None:
        check_finite(found)
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
    """The gradient, with respect to the images, of an objective of the views' logits.

    Args:
        look: (images, windows) -> logits, such as a :class:`~certipatch.views.masked.Masked`.
        which: (V,) index of the image that each view shows.
        windows: (V, windows, 4) of each view, as rows of :func:`~certipatch.views.masked.window_tensor`.
        objective: takes the logits of a batch of views, and the slice of all views which that batch is; gives
            one value for each view of the batch.

    Returns:
        the gradient of the sum of all values, in the shape of ``images``, and the values (V,).
    """
    images = images.detach().requires_grad_()
    gradient, values = torch.zeros_like(images), []
    with torch.enable_grad():
        for start in range(0, len(which), batch_size):
            part = slice(start, start + batch_size)
            value = objective(check_logits(look(images[which[part]], windows[part]), len(which[part])), part)
            gradient += torch.autograd.grad(value.sum(), images)[0]
            values.append(value.detach())
            seen(views=len(value))
    return gradient, torch.cat(values)
