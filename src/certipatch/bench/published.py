"""PatchCleanser's published loop, restated plainly: certification is compared with its answers and its time.

Source: pc_certification.py and utils/defense.py of github.com/inspire-group/PatchCleanser: all pairs of
masks, one at a time, over batches of 16 images, with masks as large as an image, in float32, with autograd
on, and no early stop.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

PUBLISHED_BATCH_SIZE = 16


def published_loop(
    network: nn.Module, images: Tensor, masks: Sequence[Tensor], pairs: Sequence[tuple[int, int]]
) -> np.ndarray:
    """The label of each image under each of ``pairs`` (i <= j) of masks, -1 for other pairs.

    Args:
        network: maps normalised images to (N, classes) logits.
        images: (N, 3, H, W) float, normalised, so that the masked pixels are 0.
        masks: each (1, 1, H, W) bool, True = visible, on the device of the images.

    Returns:
        (N, masks, masks) int64, symmetric.
    """
    table = np.full((len(images), len(masks), len(masks)), -1)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for start in range(0, len(images), PUBLISHED_BATCH_SIZE):
            batch = slice(start, start + PUBLISHED_BATCH_SIZE)
            for i, j in pairs:
                keep = torch.logical_and(masks[i], masks[j])
                views = torch.where(keep, images[batch], torch.tensor(0.0, device=images.device))
                labels = network(views).argmax(dim=1).cpu().numpy()
                table[batch, i, j] = table[batch, j, i] = labels
    return table


def published_answer(table: np.ndarray, label: int) -> tuple[bool, int]:
    """Whether an image is certified for its label (Algorithm 2), and its defended label (Algorithm 1).

    ``table`` (masks, masks) holds the image's labels under all pairs of masks. Ties of the majority go to the
    smallest label.
    """
    certified = bool((table == label).all())
    first_round = table.diagonal()
    labels, counts = np.unique(first_round, return_counts=True)
    majority = labels[counts.argmax()]
    for i, disagreer in enumerate(first_round):
        if disagreer != majority and (table[i] == disagreer).all():
            return certified, int(disagreer)
    return certified, int(majority)
