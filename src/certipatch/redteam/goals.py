"""The goals of an attack: every way to a wrong answer that the clean two-mask table leaves open.

``climb.py`` says what these ways are, and attacks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ..defenses.patchcleanser.defense import PatchCleanser
from ..geometry.masks import MaskSet
from ..geometry.patch import Size
from ..views.masked import check_logits, window_tensor


@dataclass(frozen=True)
class Goal:
    """One way to a wrong answer, and where it is open.

    Attributes:
        row, target: to disagree, mask ``row`` and all its pairs must answer ``target``; None to outvote.
        patch_size: the shape of the patch.
        places: (places, 2) top and left of the patch where the clean table does not rule this way out.
        visibility: (places,) the smallest share of the patch that is visible in a view that must be fooled.
        left: how many views do not answer as wanted on the clean image.
    """

    row: int | None
    target: int | None
    patch_size: Size
    places: np.ndarray
    visibility: np.ndarray
    left: int


@lru_cache(maxsize=64)
def shown(masks: MaskSet, patch_size: Size, row: int | None = None) -> np.ndarray:
    """The share of a patch at each place that each mask leaves visible, (masks, H-h+1, W-w+1) float32.

    With ``row``, each mask hides together with mask ``row``.
    """
    keep = masks.keep.numpy()
    if row is not None:
        keep = keep & keep[row]
    h, w = patch_size
    total = np.pad(keep.cumsum(1, dtype=np.int32).cumsum(2, dtype=np.int32), ((0, 0), (1, 0), (1, 0)))
    pixels = total[:, h:, w:] - total[:, :-h, w:] - total[:, h:, :-w] + total[:, :-h, :-w]
    return (pixels / (h * w)).astype(np.float32)


def goals(masks: MaskSet, table: np.ndarray, label: int) -> list[Goal]:
    """Every way to win on an image with this clean table, the nearest first.

    No way is left out: an attacker who could give the views that show some of the patch any label at will
    wins exactly where there is a goal (with challenger masking: only where there is one). So no attack can
    break an image without a goal, and the certified images are among these.
    """
    ways: list[tuple[int | None, int | None, np.ndarray]] = [(None, None, table.diagonal() != label)]
    for mask, labels in enumerate(table):
        ways += [(mask, int(target), labels == target) for target in np.unique(labels) if target != label]
    overruling = (table == label).all(axis=1)
    found = []
    for size, (row, target, done) in product(masks.patch_sizes, ways):
        visible = shown(masks, size, row)
        open_at = (visible[overruling if row is None else ~done] > 0).all(axis=0)
        if open_at.any():
            to_fool = np.where((visible == 0) | done[:, None, None], 1, visible)[:, open_at]
            places, left = np.argwhere(open_at), int((~done).sum())
            found.append(Goal(row, target, size, places, to_fool.min(axis=0), left))
    return sorted(found, key=lambda goal: goal.left)


def clean_tables(defense: PatchCleanser, images: Tensor) -> np.ndarray:
    """The one- and two-mask labels (N, masks, masks) of images (N, 3, H, W) float; all of them computed."""
    n, k = len(images), len(defense.masks)
    i, j = np.triu_indices(k)
    of_mask = window_tensor(defense.masks, images.device)
    pairs = torch.cat([of_mask[i], of_mask[j]], dim=1).repeat(n, 1, 1)
    which = torch.arange(n, device=images.device).repeat_interleave(len(i))
    batches = zip(torch.split(which, defense.batch_size), torch.split(pairs, defense.batch_size), strict=True)
    labels = [
        check_logits(defense.network(images[some], windows), len(some)).argmax(dim=1).cpu()
        for some, windows in batches
    ]
    table = np.empty((n, k, k), dtype=np.int64)
    table[:, i, j] = table[:, j, i] = torch.cat(labels).view(n, -1).numpy()
    return table
