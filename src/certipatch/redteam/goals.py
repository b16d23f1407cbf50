"""TODO."""

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
        row, target: None: outvote. Else disagree: mask ``row`` and all its pairs shall answer ``target``.
        patch_size: the shape of the patch.
        places: (positions, 2) top and left of the patch where the clean table does not rule it out.
        visibility: (positions,) the smallest share of the patch that a view shows which is still to be
            fooled.
        left: number of views that do not answer as wanted on the clean image.
    """

    row: int | None
    target: int | None
    patch_size: Size
    places: np.ndarray
    visibility: np.ndarray
    left: int


@lru_cache(maxsize=64)
def shown(masks: MaskSet, patch_size: Size, row: int | None = None) -> np.ndarray:
    """(masks, H-h+1, W-w+1): the share of a patch at each place that each mask, together with mask ``row``,
    leaves visible."""
    keep = masks.keep.numpy()
    if row is not None:
        keep = keep & keep[row]
    h, w = patch_size
    total = np.pad(keep.cumsum(1, dtype=np.int32).cumsum(2, dtype=np.int32), ((0, 0), (1, 0), (1, 0)))
    return ((total[:, h:, w:] - total[:, :-h, w:] - total[:, h:, :-w] + total[:, :-h, :-w]) / (h * w)).astype(
        np.float32
    )


def goals(masks: MaskSet, table: np.ndarray, label: int) -> list[Goal]:
    """Every way to win on an image with this clean table, the nearest first.

    None is left out: an attacker who could give the views that show some of the patch any label he likes wins
    exactly where there is a goal (with challenger masking: only where there is one). So the images without
    one bound every attack, and they are the certified ones at least.
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
            found.append(
                Goal(row, target, size, np.argwhere(open_at), to_fool.min(axis=0), int((~done).sum()))
            )
    return sorted(found, key=lambda goal: goal.left)


def clean_tables(defense: PatchCleanser, images: Tensor) -> np.ndarray:
    """(N, masks, masks): the one- and two-mask labels of (N, 3, H, W) float images, every one computed."""
    n, k = len(images), len(defense.masks)
    i, j = np.triu_indices(k)
    windows = window_tensor(defense.masks, images.device)
    pairs = torch.cat([windows[i], windows[j]], dim=1).repeat(n, 1, 1)
    which = torch.arange(n, device=images.device).repeat_interleave(len(i))
    labels = [
        check_logits(defense.network(images[some], pair), len(some)).argmax(dim=1).cpu()
        for some, pair in zip(
            torch.split(which, defense.batch_size), torch.split(pairs, defense.batch_size), strict=True
        )
    ]
    table = np.empty((n, k, k), dtype=np.int64)
    table[:, i, j] = table[:, j, i] = torch.cat(labels).view(n, -1).numpy()
    return table
