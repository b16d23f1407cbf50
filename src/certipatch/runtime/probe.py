"""The logits of a probe batch, by which a worker shows that it computes what the driver computes."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..config import ROUNDING
from .devices import autocast

OTHER_DEVICE = (
    10  # So many times as far rounding may move a logit where driver and worker differ in their device.
)


def probe(network: nn.Module, image_size: tuple[int, int], precision: str) -> np.ndarray:
    """(4, classes) float64: the logits of black, white and two views of noise, where the network is."""
    noise = torch.from_numpy(np.random.default_rng(11).random((2, 3, *image_size), dtype=np.float32))
    views = torch.cat([torch.zeros_like(noise[:1]), torch.ones_like(noise[:1]), noise])
    device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
    with torch.inference_mode(), autocast(precision, device):
        found: np.ndarray = network(views.to(device)).double().cpu().numpy()
    return found


def why_other(found: np.ndarray, expected: np.ndarray, precision: str, *, same_device: bool) -> str | None:
    """Why logits are not those that were expected, up to rounding; None where they are."""
    if found.shape != expected.shape:
        return f"its logits of a probe are of shape {found.shape}, expected {expected.shape}"
    most = ROUNDING[precision] * max(1.0, float(np.abs(expected).max()))
    most *= 1 if same_device else OTHER_DEVICE
    moved = float(np.abs(found - expected).max())
    if moved <= most:  # NaN is not
        return None
    return f"its logits of a probe differ by {moved:.2g} from the driver's, by rounding at most {most:.2g}"
