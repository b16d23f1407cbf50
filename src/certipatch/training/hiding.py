"""Which windows each masking strategy hides from the training images, beside the paper's words.

Source: Greedy Cutout, whose Table 3 compares them. Each strategy is one function of a :class:`Batch`. It
returns one tensor (N, windows, 4) of int64 for each masked copy of the batch to train on: top, left, bottom
and right of the windows to hide, as :func:`certipatch.views.masked.visible` takes them. In their words x is
an image, and x.m is x under the mask m.

A search runs the current weights in evaluation mode. ``greedy-*`` and ``grid-*`` look for the highest
cross-entropy with the true label, without a gradient; ``gutout-*`` look for the most heat of Grad-CAM, with
one. Among equals they all take the lowest index.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..geometry.masks import MaskSet
from ..geometry.sights import sights_of
from ..views.ablated import Ablated
from ..views.losses import losses
from ..views.masked import Look, Masked, frozen, mask_images, visible, window_tensor
from .gradcam import saliency


class BatchPart(NamedTuple):
    """Which part of a larger batch some images are, where several processes share it."""

    start: int  # index of the part's first image
    whole: int  # images of the whole batch


@dataclass(frozen=True, eq=False)
class Batch:
    """Training images, and everything that a strategy may use to choose the windows to hide.

    Attributes:
        model: maps (N, 3, H, W) in [0, 1] to (N, classes) logits; in any mode.
        images, labels: (N, 3, H, W) float in [0, 1] and (N,) int64.
        masks: the fine set; the coarse set is its 2x2 union.
        fill: the colour of masked pixels, one value or one a channel.
        generator: what ``random-*`` draw from. They draw for the whole batch of which this may be a part.
        part: which part it is; None if it is the whole.
        look: (images, windows) -> logits, which ``greedy-*`` and ``grid-*`` ask in place of the model: its
            compiled twin.
        finite: of each pass whether its logits are finite, on the device; the strategy looks once at the end.
        layer: the module in which ``gutout-*`` look for heat; None: the last feature map.
        windows: those of ``random-band``, as ``certify --windows`` takes them; None: columns of an eighth of
            the width.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    masks: MaskSet
    fill: float | Tensor
    generator: torch.Generator | None = None
    part: BatchPart | None = None
    look: Look | None = None
    layer: str | None = None
    windows: str | None = None
    finite: list[Tensor] = field(default_factory=list)

    @property
    def coarse(self) -> MaskSet:
        """The coarse set of masks."""
        return self.masks.coarsen()[0]


def vanilla(batch: Batch) -> list[Tensor]:
    """No mask at all: ordinary fine-tuning. 0 extra passes."""
    return [torch.empty(len(batch.images), 0, 4, dtype=torch.int64, device=batch.images.device)]


def random_cutout(batch: Batch) -> list[Tensor]:
    """Two squares of 128/224 of the image side, centres uniform over the pixels, so they may leave the image.

    Source: PatchCleanser's Cutout training ("PC-Cutout"). 0 extra passes.
    """
    height, width = batch.images.shape[2:]
    h, w = round(height * 128 / 224), round(width * 128 / 224)
    top = _draw(height, batch) - h // 2
    left = _draw(width, batch) - w // 2
    return [torch.stack([top, left, top + h, left + w], dim=2).to(batch.images.device, non_blocking=True)]


def random_coarse(batch: Batch) -> list[Tensor]:
    """Two masks of the coarse set at random ("rand 3x3"). 0 extra passes."""
    return [_random_pair(batch, batch.coarse)]


def random_fine(batch: Batch) -> list[Tensor]:
    """Two masks of the fine set at random ("rand 6x6"). 0 extra passes."""
    return [_random_pair(batch, batch.masks)]


def random_both(batch: Batch) -> list[Tensor]:
    """One copy with two coarse and one with two fine masks ("rand"). 0 extra passes; the gradient batch
    doubles."""
    return [_random_pair(batch, batch.coarse), _random_pair(batch, batch.masks)]


def _random_pair(batch: Batch, masks: MaskSet) -> Tensor:
    """Two masks drawn independently and uniformly from the set (they may coincide)."""
    return _windows(masks, *_draw(len(masks), batch).to(batch.images.device, non_blocking=True).unbind(dim=1))


def random_band(batch: Batch) -> list[Tensor]:
    """All but one window of limited sight, drawn for each image: of the bands or blocks in ``windows``.

    Sources: De-randomized Smoothing (Levine and Feizi, 2020) and Smoothed ViT (Salman et al., 2022), which
    draw one window for all images of a step. 0 extra passes.
    """
    height, width = batch.images.shape[2:]
    windows = batch.windows or f"columns:{max(1, width // 8)}"
    sights = sights_of(windows, (height, width))
    hidden = window_tensor(Ablated.but(sights, (height, width)), torch.device("cpu"))
    return [hidden[_draw(len(hidden), batch)[:, 0]].to(batch.images.device)]


def _draw(below: int, batch: Batch) -> Tensor:
    """(N, 2) uniform integers for the images: their part of what is drawn for the whole batch."""
    if batch.generator is None:
        raise ConfigError("random masks: expected a generator to draw from, found none; pass generator=")
    start, whole = batch.part or BatchPart(0, len(batch.images))
    return torch.randint(below, (whole, 2), generator=batch.generator)[start : start + len(batch.images)]


def gutout_coarse(batch: Batch) -> list[Tensor]:
    """Gutout with the coarse set ("gutout 3x3"): 2 forward and 2 backward passes, which the paper counts as
    4.

    Source: Gutout ("Grad-CAM based Cutout") as the Greedy Cutout paper compares it.
    """
    return [_gutout(batch, batch.coarse)]


def gutout_fine(batch: Batch) -> list[Tensor]:
    """Gutout with the fine set ("gutout 6x6"): 2 forward and 2 backward passes."""
    return [_gutout(batch, batch.masks)]


def gutout_both(batch: Batch) -> list[Tensor]:
    """One copy of each of the two ("gutout"): 4 forward and 4 backward passes; the gradient batch doubles."""
    return [_gutout(batch, batch.coarse), _gutout(batch, batch.masks)]


def _gutout(batch: Batch, masks: MaskSet) -> Tensor:
    """Round 1: m1, the mask over the most Grad-CAM heat on x. Round 2: m2 != m1 likewise on x.m1."""
    m1 = _heat_under(batch, batch.images, masks).argmax(dim=1)
    heat = _heat_under(batch, _masked(batch, masks, m1), masks)
    # -1 is less than any heat, so the second mask is m1 again only if there is no other.
    m2 = heat.scatter(1, m1[:, None], -1).argmax(dim=1)
    return _windows(masks, m1, m2)


def _heat_under(batch: Batch, images: Tensor, masks: MaskSet) -> Tensor:
    """(N, masks) int64: the heat of Grad-CAM summed over the pixels of each mask, in 2^-20ths of the image's
    hottest pixel.

    Whole units add up exactly, whatever the order: equals tie, and a GPU finds what a CPU finds.
    """
    heat = saliency(batch.model, images, batch.labels, batch.layer)
    hidden = ~visible(window_tensor(masks, heat.device), masks.image_size)
    hottest = heat.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
    units = (heat / hottest * 2**20).round()
    if heat.device.type == "mps":  # knows no double precision
        units, hidden = units.cpu(), hidden.cpu()
    return (units.double().flatten(1) @ hidden.double().flatten(1).T).to(heat.device, torch.int64)


def greedy_coarse(batch: Batch) -> list[Tensor]:
    """Greedy Cutout with the coarse set ("greedy 3x3"): 2K-1 = 17 extra passes."""
    return [_greedy(batch, batch.coarse)]


def greedy_fine(batch: Batch) -> list[Tensor]:
    """Greedy Cutout with the fine set ("greedy 6x6"): 2K-1 = 71 extra passes."""
    return [_greedy(batch, batch.masks)]


def _greedy(batch: Batch, masks: MaskSet) -> Tensor:
    """Round 1: the worst single mask m1. Round 2: the worst m2 != m1 on x.m1."""
    m1, _ = _worst(batch, batch.images, masks, _all(batch, masks))
    if len(masks) == 1:
        return _windows(masks, m1, m1)
    m2, _ = _worst(batch, _masked(batch, masks, m1), masks, _all_but(m1, masks))
    return _windows(masks, m1, m2)


def greedy_multisize(batch: Batch) -> list[Tensor]:
    """Multi-size Greedy Cutout ("greedy (ours)"): 9+4+8+4 = 25 extra passes; the gradient batch doubles.

    Round 1: M1 = the worst coarse mask on x, M11 = the worst of M1's fine masks on the *clean* x.
    Round 2: m3 = the worst coarse mask on x.M11, m6 = the worst of m3's fine masks on x.M11.
    Train on both x.M1.m3 and x.M11.m6.

    The paper counts 9+4+9+4 = 26. One of them is known: M1 contains M11, so x.M11.M1 is x.M1.
    """
    x, fine = batch.images, batch.masks
    coarse, children = fine.coarsen()
    fine_of = _indices(children, x.device)  # (coarse masks, 4): each one's fine masks

    M1, loss = _worst(batch, x, coarse, _all(batch, coarse))
    M11, _ = _worst(batch, x, fine, fine_of[M1])
    x_M11 = _masked(batch, fine, M11)
    m3, _ = _worst(batch, x_M11, coarse, _all_but(M1, coarse), known=(M1, loss))
    m6, _ = _worst(batch, x_M11, fine, fine_of[m3])
    return [_windows(coarse, M1, m3), _windows(fine, M11, m6)]


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _indices(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Kept, for to bring it to an accelerator is to wait for it."""
    return torch.tensor(rows, device=device)


def _all(batch: Batch, masks: MaskSet) -> Tensor:
    """(N, masks): every mask is a candidate for every image."""
    return torch.arange(len(masks), device=batch.images.device).expand(len(batch.images), -1)


def _all_but(mask: Tensor, masks: MaskSet) -> Tensor:
    """(N, masks - 1): every mask but the image's own (N,); indices from it on move up by one."""
    some = torch.arange(len(masks) - 1, device=mask.device)
    return some + (some >= mask[:, None])


def _worst(
    batch: Batch,
    images: Tensor,
    masks: MaskSet,
    candidates: Tensor,
    *,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Index (N,) and loss (N,) of the mask with the highest loss on each image; ``images`` are the batch's,
    masked or not.

    Each of the ``candidates`` (N, C) costs one pass. ``known`` are the index (N,) and the loss (N,) of one
    more candidate for each image, whose loss needs no pass.
    """
    look = batch.look or Masked(batch.model, batch.fill)
    with frozen(batch.model):
        windows = window_tensor(masks, images.device)[candidates]
        found = losses(look, images, batch.labels, windows, finite=batch.finite)
    # Losses stand at the index of their mask, the known one too, as argmax takes the lowest among equals.
    by_mask = found.new_full((len(images), len(masks)), -torch.inf).scatter(1, candidates, found)
    if known:
        by_mask = by_mask.scatter(1, known[0][:, None], known[1][:, None])
    worst = by_mask.argmax(dim=1)
    return worst, by_mask.gather(1, worst[:, None])[:, 0]


def grid_coarse(batch: Batch) -> list[Tensor]:
    """The worst of all pairs of the coarse set ("grid 3x3"): K(K+1)/2 = 45 extra passes."""
    return [_grid(batch, batch.coarse)]


def grid_fine(batch: Batch) -> list[Tensor]:
    """The worst of all pairs of the fine set ("grid 6x6"): K(K+1)/2 = 666 extra passes."""
    return [_grid(batch, batch.masks)]


def _grid(batch: Batch, masks: MaskSet) -> Tensor:
    """The pair of masks (each with itself among them) with the highest loss."""
    device = batch.images.device
    pairs = torch.triu_indices(len(masks), len(masks), device=device).T
    windows = window_tensor(masks, device)[pairs].flatten(1, 2)
    look = batch.look or Masked(batch.model, batch.fill)
    with frozen(batch.model):
        found = losses(look, batch.images, batch.labels, windows[None], finite=batch.finite)
        worst = found.argmax(dim=1)
    return windows[worst]


def _windows(masks: MaskSet, *chosen: Tensor) -> Tensor:
    """(N, windows, 4): the windows of each image's ``chosen`` masks, side by side, given as indices (N,)."""
    return window_tensor(masks, chosen[0].device)[torch.stack(chosen, dim=1)].flatten(1, 2)


def _masked(batch: Batch, masks: MaskSet, chosen: Tensor) -> Tensor:
    """``x.m``: the batch's images, each under its chosen mask (N,)."""
    return mask_images(batch.images, visible(_windows(masks, chosen), masks.image_size), batch.fill)
