"""The attack on a network with cells: one pass with gradients for all windows that a patch reaches.

As against shown windows (``windows.py``), the rival of a place shall lead the true label in every window that
the patch reaches there; here a view is the whole image, and its logits are those of all these windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..defenses.evidence.cells import CellWindows
from ..defenses.evidence.defense import WindowDefense
from .climb import Attempt, Views

LEAD = 30.0  # By so many logits the rival shall lead where evidence grows with the logits.
SIGN = 1.0  # By so much a logit shall be on the other side of 0 where only that counts.


def look_at_cells(windows: CellWindows) -> Callable[[Tensor, Tensor], Tensor]:
    """(images (V, 3, H, W), numbers of windows (V, reached)) -> logits (V, reached x classes)."""

    def look(images: Tensor, numbers: Tensor) -> Tensor:
        cells: Tensor = windows.cells(images)
        rows = torch.arange(len(images), device=images.device).unsqueeze(1)
        return cells[rows, numbers].flatten(1)

    return look


def views_of_cells(
    defense: WindowDefense, reached: dict[Any, np.ndarray], labels: Tensor, attempts: list[Attempt]
) -> Views:
    """One view an attempt. Places that reach fewer windows than others have their last one again."""
    rows = [reached[attempt.patch_size, attempt.top, attempt.left] for attempt in attempts]
    most = max(map(len, rows))
    padded = np.array([np.pad(row, (0, most - len(row)), mode="edge") for row in rows])
    device, by_sign = labels.device, defense.evidence.name == "step"
    true = labels[torch.tensor([attempt.image for attempt in attempts], device=device)]
    rival = torch.tensor([attempt.target for attempt in attempts], device=device)

    def shortfall(logits: Tensor, part: slice) -> Tensor:
        of_windows = logits.view(len(logits), most, -1)
        own, other = (
            of_windows.gather(2, each[part].view(-1, 1, 1).expand(-1, most, 1))[..., 0]
            for each in (true, rival)
        )
        if by_sign:
            return ((own + SIGN).relu() + (SIGN - other).relu()).mean(dim=1)
        return (own - other + LEAD).relu().mean(dim=1)

    which = torch.arange(len(attempts), device=device)
    return Views(which, torch.from_numpy(padded).to(device), shortfall)
