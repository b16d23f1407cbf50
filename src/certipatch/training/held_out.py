"""Training images that are held out, so that the epoch whose weights certify most of them can be kept."""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from torch import nn

from ..data.source import Images, Source
from ..geometry.masks import MaskSet
from ..runtime.processes import together, total
from ..views.masked import Masked, check_logits, find_mean, frozen, window_tensor
from .batches import load, spread

SHARE, MOST = 0.1, 200  # of the training images, so much is held out, and so many at most


def hold_out(source: Source) -> tuple[Source, Source]:
    """The images to train on, and those that are held out of them: a tenth, at most 200, spread over the set.

    Raises DataError if a class is left without an image to train on.
    """
    n = max(1, min(MOST, int(SHARE * len(source))))
    held = [i * len(source) // n for i in range(n)]
    out = set(held)
    rest = source.take([i for i in range(len(source)) if i not in out])
    rest.refuse_missing_classes(f"training data without the {n} images that --keep best holds out")
    return rest, source.take(held)


@torch.inference_mode()
def certified(
    model: nn.Module, images: Images, masks: MaskSet, fabric: Fabric, workers: int = 0
) -> tuple[dict[str, int], int]:
    """How many images keep their label under every pair of the coarse masks, and the passes that this took.

    Source: PatchCleanser, Algorithm 2. The coarse masks (45 pairs at k=6) cost a fifteenth of the fine ones.
    An image with a wrong pair is not looked at again.
    """
    coarse = masks.coarsen()[0]
    windows = window_tensor(coarse, fabric.device)
    look = Masked(model, find_mean(model)).to(fabric.device)
    right = passes = 0
    batches = spread(len(images), 64, fabric)
    with together(fabric), frozen(model), fabric.autocast():
        for loaded in load(images, batches, fabric, workers):
            x, y = loaded.on(fabric.device)
            for pair in torch.triu_indices(len(coarse), len(coarse)).T:
                if not len(x):
                    break
                passes += len(x)
                hidden = windows[pair].flatten(0, 1).expand(len(x), -1, -1)
                keeps = check_logits(look(x, hidden), len(x)).argmax(1) == y
                x, y = x[keeps], y[keeps]
            right += len(x)
    done = total(fabric, {"correct": right, "passes": passes})
    return {"correct": int(done["correct"]), "images": len(images)}, int(done["passes"])
