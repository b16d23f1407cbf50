"""What a step of training minimises, one loss a name; each is what a certified defense needs of its network.

| name | for | looks at |
|---|---|---|
| ``cross-entropy`` | every strategy, Clipped BagNet too | the logits of the masked views |
| ``best-window-removed`` | PatchGuard on a BagNet | what is left of the true class without its best window |
| ``region-margin`` | BagCert | how far votes of cells lead |
| ``interval`` | IBP | bounds over all contents of a patch at random places |

Where a paper's constants are not known, ours are stated here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CertiPatchError
from ..geometry.patch import Size, Threat
from ..geometry.reach import touched
from ..views.cells import CellLogits
from ..views.intervals import bounds, layers_of
from .config import TrainConfig

PLACES = 20  # of the patch, drawn anew for each image and step: "random patch" of Chiang et al.
NATURAL, RAMP = 0.05, 0.6  # of the training: whole images only, then contents from none to all
CELLS_FIRST = 0.2  # of the training with region-margin: cross-entropy of the mean logits, before votes count
SPARE = 0.1  # by how much more than a certificate needs the votes of cells shall lead


class Objective(nn.Module):
    """A model with its loss as one module, so that processes which share a batch see one forward pass.

    ``forward`` takes views (N, 3, H, W), targets (N,) and ``done``, the share of the training that is over;
    it returns the logits (N, classes) to count right answers with, and the mean loss. Random places are drawn
    from torch's generator.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, image_size: Size) -> None:
        """Raises ConfigError, or SoundnessError, for a network that the loss is not for."""
        super().__init__()
        self.model = model
        self.loss: nn.Module = {
            None: CrossEntropy,
            "best-window-removed": BestWindowRemoved,
            "region-margin": RegionMargin,
            "interval": Interval,
        }[config.loss](model, config.patch_size, image_size)

    def forward(self, views: Tensor, targets: Tensor, done: float) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.loss(views, targets, done)
        return found


class CrossEntropy(nn.Module):
    """Of the model's logits."""

    def __init__(self, model: nn.Module, _patch_size: Size, _image_size: Size) -> None:
        super().__init__()
        self.model = model

    def forward(self, views: Tensor, targets: Tensor, _done: float) -> tuple[Tensor, Tensor]:
        logits = self.model(views)
        return logits, F.cross_entropy(logits, targets)


class _OfCells(nn.Module):
    """What losses of cells share: the logits of the cells, and which of them a patch can reach."""

    touch: Tensor  # (sets, cells)

    def __init__(self, model: nn.Module, patch_size: Size, image_size: Size) -> None:
        super().__init__()
        self.cells = CellLogits(model)
        touch = touched(self.cells.sights(image_size), image_size, Threat(patch_size)).touch
        self.register_buffer("touch", torch.from_numpy(touch).float(), persistent=False)


class BestWindowRemoved(_OfCells):
    """PatchGuard's: cross-entropy of the mean positive evidence, of the true class without the cells of that
    place of the patch which hold most of it (Xiang et al., 2021; there a fixed window of 6x6 cells)."""

    def forward(self, views: Tensor, targets: Tensor, _done: float) -> tuple[Tensor, Tensor]:
        evidence = self.cells(views).float().relu()
        logits = evidence.mean(dim=1)
        own = evidence[torch.arange(len(targets)), :, targets]
        best = (own @ self.touch.to(own).T).amax(dim=1) / evidence.shape[1]
        left = logits - F.one_hot(targets, logits.shape[1]) * best.unsqueeze(1)
        return logits, F.cross_entropy(left, targets)


class RegionMargin(_OfCells):
    """BagCert's, as we derive it from its certificate (Metzen and Yatsura, 2021, whose constants are not
    known to us): a cell votes for each class whose logit is above 0, the true class shall lead every other by
    twice the cells that a patch reaches and a little more; gradients pass the step as they pass a sigmoid.

    A step has no gradient far from 0, so the first part of the training is cross-entropy of the mean logits.
    """

    def forward(self, views: Tensor, targets: Tensor, done: float) -> tuple[Tensor, Tensor]:
        cells = self.cells(views).float()
        if done < CELLS_FIRST:
            logits = cells.mean(dim=1)
            return logits, F.cross_entropy(logits, targets)
        soft = cells.sigmoid()
        votes = ((cells > 0).float() + soft - soft.detach()).mean(dim=1)
        lead = votes.gather(1, targets.unsqueeze(1)) - votes
        needed = 2 * float(self.touch.sum(dim=1).max()) / cells.shape[1]
        missing = (min(1.0, needed + SPARE) - lead).relu()
        others = missing.masked_fill(F.one_hot(targets, votes.shape[1]).bool(), 0.0)
        return votes, others.amax(dim=1).mean()


class Interval(nn.Module):
    """Of IBP: cross-entropy of the lower bounds of z_y - z_c, of the worst of some random places (Chiang et
    al., 2020); whole images first, and contents that grow from none to all."""

    def __init__(self, model: nn.Module, patch_size: Size, image_size: Size) -> None:
        super().__init__()
        layers_of(model)
        self.model, self.patch_size, self.image_size = model, patch_size, image_size

    def forward(self, views: Tensor, targets: Tensor, done: float) -> tuple[Tensor, Tensor]:
        logits = self.model(views)
        if done < NATURAL:
            return logits, F.cross_entropy(logits, targets)
        reach = min(1.0, (done - NATURAL) / RAMP)
        here = self._places(len(views) * PLACES).to(views.device)
        every = views.repeat_interleave(PLACES, dim=0)
        lower = torch.where(here, (every - reach).clamp(min=0), every)
        upper = torch.where(here, (every + reach).clamp(max=1), every)
        with torch.autocast(views.device.type, enabled=False):
            found = bounds(self.model, lower, upper, targets.repeat_interleave(PLACES))
        worst = found.view(len(views), PLACES, -1).amin(dim=1)
        return logits, F.cross_entropy(-worst, targets)

    def _places(self, n: int) -> Tensor:
        """(n, 1, H, W) bool: a patch at a random place each."""
        along = []
        for size, side in zip(self.image_size, self.patch_size, strict=True):
            start = torch.randint(size - side + 1, (n, 1))
            pixel = torch.arange(size)
            along.append((start <= pixel) & (pixel < start + side))
        return (along[0].unsqueeze(2) & along[1].unsqueeze(1)).unsqueeze(1)


def check_loss(model: nn.Module, config: TrainConfig, image_size: Size) -> None:
    """Refuse a loss that the network is not for. Raises ConfigError or SoundnessError."""
    try:
        Objective(model, config, image_size)
    except CertiPatchError as error:
        raise type(error)(f"loss {config.loss}: {error}") from error
