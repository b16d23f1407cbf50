"""The masking strategies: which pixels to hide from each training image.

Source: Greedy Cutout (the paper's Table 3 compares them). Each strategy is one function

    strategy(model, images, labels, masks, *, fill, generator, place=None) -> list of (N, windows, 4) int64,

one entry for each masked copy of the batch to train on: the windows to hide, as
:func:`certipatch.views.visible` takes them. ``masks`` is the fine set; the coarse set is its 2x2 union.
Searches run the current weights in evaluation mode without gradient, maximise the cross-entropy with the true
label, and break ties by the lowest index. Only ``random-*`` draw from ``generator``; they draw for a whole
batch of which ``images`` may be a part: ``place`` is (index of its first image, images of the whole).
Searches by loss take ``look``, (images, windows) -> logits, in place of the model: its compiled twin.
``gutout-*`` look for heat instead of loss, with a gradient, in the ``layer`` that may be named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..geometry.masks import MaskSet
from ..geometry.patch import Window
from ..views.losses import losses
from ..views.masked import Look, Masked, frozen, mask_images, visible, window_tensor
from .gradcam import saliency

Strategy = Callable[..., list[Tensor]]


Worst = Callable[
    ..., tuple[Tensor, Tensor]
]  # (images, masks, candidates, known) -> indices and losses, see _worst


Place = tuple[int, int] | None  # of a part in its batch: index of the first image, images of the whole


def vanilla(model: nn.Module, images: Tensor, labels: Tensor, masks: MaskSet, **_: object) -> list[Tensor]:
    """No mask at all: ordinary fine-tuning. 0 extra passes."""
    return [torch.empty(len(images), 0, 4, dtype=torch.int64, device=images.device)]


def _draw(below: int, images: Tensor, generator: torch.Generator, place: Place) -> Tensor:
    """(N, 2) uniform integers for the images: their part of what is drawn for the whole batch."""
    start, whole = place or (0, len(images))
    return torch.randint(below, (whole, 2), generator=generator)[start : start + len(images)]


def random_cutout(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: MaskSet,
    *,
    generator: torch.Generator,
    place: Place = None,
    **_: object,
) -> list[Tensor]:
    """Two squares of 128/224 of the image side, centres uniform over the pixels, so they may leave the image.

    Source: PatchCleanser's Cutout training ("PC-Cutout"). 0 extra passes.
    """
    height, width = images.shape[2:]
    h, w = round(height * 128 / 224), round(width * 128 / 224)
    # Two squares for each image, as windows that may begin outside the image.
    top = _draw(height, images, generator, place) - h // 2
    left = _draw(width, images, generator, place) - w // 2
    return [torch.stack([top, left, top + h, left + w], dim=2).to(images.device)]


def _random_pair(images: Tensor, masks: MaskSet, generator: torch.Generator, place: Place) -> Tensor:
    """Two masks drawn independently and uniformly from the set (they may coincide)."""
    return _windows(masks, _draw(len(masks), images, generator, place).to(images.device))


def random_coarse(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: MaskSet,
    *,
    generator: torch.Generator,
    place: Place = None,
    **_: object,
) -> list[Tensor]:
    """Two masks of the coarse set at random ("rand 3x3"). 0 extra passes."""
    return [_random_pair(images, masks.coarsen()[0], generator, place)]


def random_fine(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: MaskSet,
    *,
    generator: torch.Generator,
    place: Place = None,
    **_: object,
) -> list[Tensor]:
    """Two masks of the fine set at random ("rand 6x6"). 0 extra passes."""
    return [_random_pair(images, masks, generator, place)]


def random_both(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: MaskSet,
    *,
    generator: torch.Generator,
    place: Place = None,
    **_: object,
) -> list[Tensor]:
    """One copy with two coarse and one with two fine masks ("rand"). 0 extra passes; the gradient batch
    doubles."""
    return [
        _random_pair(images, masks.coarsen()[0], generator, place),
        _random_pair(images, masks, generator, place),
    ]


def gutout_coarse(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: MaskSet,
    *,
    fill: float | Tensor,
    layer: str | None = None,
    **_: object,
) -> list[Tensor]:
    """Gutout with the coarse set ("gutout 3x3"): 2 forward and 2 backward passes, which the paper counts as
    4.

    Source: Gutout ("Grad-CAM based Cutout") as the Greedy Cutout paper compares it.
    """
    return [_gutout(model, images, labels, masks.coarsen()[0], fill, layer)]


def gutout_fine(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: MaskSet,
    *,
    fill: float | Tensor,
    layer: str | None = None,
    **_: object,
) -> list[Tensor]:
    """Gutout with the fine set ("gutout 6x6"): 2 forward and 2 backward passes."""
    return [_gutout(model, images, labels, masks, fill, layer)]


def gutout_both(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: MaskSet,
    *,
    fill: float | Tensor,
    layer: str | None = None,
    **_: object,
) -> list[Tensor]:
    """One copy of each of the two ("gutout"): 4 forward and 4 backward passes; the gradient batch doubles."""
    return [_gutout(model, images, labels, each, fill, layer) for each in (masks.coarsen()[0], masks)]


def _gutout(
    model: nn.Module, images: Tensor, labels: Tensor, masks: MaskSet, fill: float | Tensor, layer: str | None
) -> Tensor:
    """Round 1: m1, the mask over the most Grad-CAM heat on x. Round 2: m2 != m1 likewise on x.m1."""
    m1 = _heat_under(masks, saliency(model, images, labels, layer)).argmax(dim=1, keepdim=True)
    masked = _masked(images, masks, m1, fill)
    heat = _heat_under(masks, saliency(model, masked, labels, layer))
    m2 = heat.scatter(1, m1, -1).argmax(
        dim=1, keepdim=True
    )  # -1: less than any other, so m1 again only if it is alone
    return _windows(masks, torch.cat([m1, m2], dim=1))


def _heat_under(masks: MaskSet, heat: Tensor) -> Tensor:
    """(N, masks): the heat (N, H, W) summed over the pixels of each mask, in 2^-20ths of the image's hottest
    pixel.

    Whole units add up exactly, whatever the order: equals tie, and a GPU finds what a CPU finds.
    """
    hidden = ~visible(window_tensor(masks, heat.device), masks.image_size)
    hottest = heat.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(heat.dtype).tiny)
    units = (heat / hottest * 2**20).round()
    if heat.device.type == "mps":  # knows no double precision
        units, hidden = units.cpu(), hidden.cpu()
    return (units.double().flatten(1) @ hidden.double().flatten(1).T).to(heat.device, torch.int64)


def greedy_coarse(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: MaskSet,
    *,
    fill: float | Tensor,
    look: Look | None = None,
    **_: object,
) -> list[Tensor]:
    """Greedy Cutout with the coarse set ("greedy 3x3"): 2K-1 = 17 extra passes."""
    return [_greedy(model, images, labels, masks.coarsen()[0], fill, look)]


def greedy_fine(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: MaskSet,
    *,
    fill: float | Tensor,
    look: Look | None = None,
    **_: object,
) -> list[Tensor]:
    """Greedy Cutout with the fine set ("greedy 6x6"): 2K-1 = 71 extra passes."""
    return [_greedy(model, images, labels, masks, fill, look)]


def _greedy(
    model: nn.Module, images: Tensor, labels: Tensor, masks: MaskSet, fill: float | Tensor, look: Look | None
) -> Tensor:
    """Round 1: the worst single mask m1. Round 2: the worst m2 != m1 on x.m1."""
    worst: Worst = partial(_worst, model, look or Masked(model, fill), labels)
    m1 = worst(images, masks, _all(masks, images))[0]
    masked = _masked(images, masks, m1[:, None], fill)
    m2 = worst(masked, masks, _all_but(m1, masks))[0] if len(masks) > 1 else m1
    return _windows(masks, torch.stack([m1, m2], dim=1))


def greedy_multisize(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: MaskSet,
    *,
    fill: float | Tensor,
    look: Look | None = None,
    **_: object,
) -> list[Tensor]:
    """Multi-size Greedy Cutout ("greedy (ours)"): 9+4+8+4 = 25 extra passes; the gradient batch doubles.

    Round 1: M1 = the worst coarse mask on x, M11 = the worst of M1's fine masks on the *clean* x.
    Round 2: m3 = the worst coarse mask on x.M11, m6 = the worst of m3's fine masks on x.M11.
    Train on both x.M1.m3 and x.M11.m6.

    The paper counts 9+4+9+4 = 26. One of them is known: M1 contains M11, so x.M11.M1 is x.M1.
    """
    coarse, children = masks.coarsen()
    child = torch.tensor(children, device=images.device)
    worst: Worst = partial(_worst, model, look or Masked(model, fill), labels)

    M1, loss = worst(images, coarse, _all(coarse, images))
    M11 = worst(images, masks, child[M1])[0]
    masked = _masked(images, masks, M11[:, None], fill)
    m3 = worst(masked, coarse, _all_but(M1, coarse), known=(M1, loss))[0]
    m6 = worst(masked, masks, child[m3])[0]
    return [_windows(coarse, torch.stack([M1, m3], dim=1)), _windows(masks, torch.stack([M11, m6], dim=1))]


def _all(masks: MaskSet, images: Tensor) -> Tensor:
    """(N, masks): every mask is a candidate for every image."""
    return torch.arange(len(masks), device=images.device).expand(len(images), -1)


def _all_but(mask: Tensor, masks: MaskSet) -> Tensor:
    """(N, masks - 1): every mask but the image's own (N,); indices from it on move up by one."""
    some = torch.arange(len(masks) - 1, device=mask.device)
    return some + (some >= mask[:, None])


def _worst(
    model: nn.Module, look: Look, labels: Tensor,
    images: Tensor, masks: MaskSet, candidates: Tensor, known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(N,) index and (N,) loss of the mask with the highest loss, out of ``candidates`` (N, C), one pass for
    each.

    ``known`` are the index and the loss of one candidate more for each image, whose loss needs no pass.
    """
    with frozen(model):
        found = losses(look, images, labels, window_tensor(masks, images.device)[candidates])
    if known:
        candidates, found = (
            torch.cat([a, b[:, None]], dim=1) for a, b in zip((candidates, found), known, strict=True)
        )
    # By index of the mask, of which argmax takes the lowest among equals: the known one is in its place.
    by_mask = found.new_full((len(images), len(masks)), -torch.inf).scatter(1, candidates, found)
    worst = by_mask.argmax(dim=1)
    return worst, by_mask.gather(1, worst[:, None])[:, 0]


def grid_coarse(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: MaskSet,
    *,
    fill: float | Tensor,
    look: Look | None = None,
    **_: object,
) -> list[Tensor]:
    """The worst of all pairs of the coarse set ("grid 3x3"): K(K+1)/2 = 45 extra passes."""
    return [_grid(model, images, labels, masks.coarsen()[0], fill, look)]


def grid_fine(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: MaskSet,
    *,
    fill: float | Tensor,
    look: Look | None = None,
    **_: object,
) -> list[Tensor]:
    """The worst of all pairs of the fine set ("grid 6x6"): K(K+1)/2 = 666 extra passes."""
    return [_grid(model, images, labels, masks, fill, look)]


def _grid(
    model: nn.Module, images: Tensor, labels: Tensor, masks: MaskSet, fill: float | Tensor, look: Look | None
) -> Tensor:
    pairs = torch.triu_indices(len(masks), len(masks), device=images.device).T
    windows = window_tensor(masks, images.device)[pairs].flatten(1, 2)
    with frozen(model):
        worst = losses(look or Masked(model, fill), images, labels, windows[None]).argmax(dim=1)
    return windows[worst]


def _windows(masks: MaskSet, chosen: Tensor) -> Tensor:
    """(N, windows, 4): those of the chosen masks (N, masks each) of every image, side by side."""
    return window_tensor(masks, chosen.device)[chosen].flatten(1, 2)


def _masked(images: Tensor, masks: MaskSet, chosen: Tensor, fill: float | Tensor) -> Tensor:
    """The images under their chosen masks (N, masks each)."""
    return mask_images(images, visible(_windows(masks, chosen), masks.image_size), fill)


STRATEGIES: dict[str, Strategy] = {
    "vanilla": vanilla,
    "random-cutout": random_cutout,
    "random-coarse": random_coarse,
    "random-fine": random_fine,
    "random-both": random_both,
    "gutout-coarse": gutout_coarse,
    "gutout-fine": gutout_fine,
    "gutout-both": gutout_both,
    "greedy-coarse": greedy_coarse,
    "greedy-fine": greedy_fine,
    "greedy-multisize": greedy_multisize,
    "grid-coarse": grid_coarse,
    "grid-fine": grid_fine,
}


def on_one_image(
    model: nn.Module, image: Tensor, label: int, masks: MaskSet, *, fill: float | Tensor, seed: int = 0
) -> Iterator[tuple[str, list[list[Window]]]]:
    """What each strategy hides in every copy of an image (3, H, W), by the strategy's name; without those
    that cannot look at the model (Gutout)."""
    for name, strategy in STRATEGIES.items():
        generator = torch.Generator().manual_seed(seed)
        try:
            copies = strategy(
                model, image[None], torch.tensor([label]), masks, fill=fill, generator=generator
            )
        except ConfigError:
            continue
        yield (
            name,
            [
                [
                    Window(top, left, bottom - top, right - left)
                    for top, left, bottom, right in copy[0].tolist()
                ]
                for copy in copies
            ],
        )
