"""What a worker says of the model that it was sent, and whether it computes what the driver computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from ..config import ROUNDING, differences, versions
from .devices import autocast, environment, precision_of

OTHER_DEVICE = 10  # So many times as far may rounding move a logit where driver and worker differ in device.


@dataclass(frozen=True)
class Facts:
    """What a worker says of itself before it gets work; the driver says the same of what it expects.

    Attributes:
        weights_sha256: of the model as it is there. logits: of the probe, see :func:`probe`.
        name, described, network: of the defense around the model, and how that runs its network; nothing
            where there is none.
    """

    device: str
    precision: str
    environment: dict[str, Any]
    weights_sha256: str
    logits: np.ndarray
    name: str = ""
    described: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, network: nn.Module, weights_sha256: str, image_size: tuple[int, int], fabric: Fabric
    ) -> Facts:
        """The facts of a model on the device of ``fabric``, to which it is moved."""
        precision = precision_of(fabric)
        logits = probe(network.to(fabric.device).eval(), image_size, precision)
        here = {**environment(fabric), "versions": versions()}
        return cls(fabric.device.type, precision, here, weights_sha256, logits)

    def describe(self) -> dict[str, Any]:
        """What the defense says of itself."""
        return self.described

    @property
    def noted(self) -> dict[str, Any]:
        """What a manifest says of the worker."""
        return {**self.environment, "network": self.network} if self.network else self.environment

    def why_refused(self, found: Facts) -> str | None:
        """Why a worker that says this does not compute what is expected; None if it does."""
        here, there = (one.environment["versions"]["certipatch"] for one in (self, found))
        if here != there:
            return f"it has certipatch {there}, the driver {here}"
        if found.weights_sha256 != self.weights_sha256:
            return "its weights are not those that were sent"
        other = differences(found.described, self.described) if self.described else []
        if other:
            return f"its defense is another ({'; '.join(other[:3])})"
        return why_other(found.logits, self.logits, self.precision, same_device=found.device == self.device)


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
