"""TODO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from lightning_fabric import Fabric
from torch import Tensor, nn

from ..config import ModelSpec
from ..data.source import Images, Source, as_float, collate
from ..defenses.patchcleanser.defense import PatchCleanser
from ..geometry.masks import MaskSet
from ..runtime.devices import make_fabric
from ..views.network import fastest_batch_size


@dataclass(frozen=True)
class Settings:
    """How the defense runs its network: arguments of :class:`PatchCleanser`, as ``certify`` chooses them in a
    large run."""

    batch_size: int | None = None
    exhaustive: bool = False
    precision: str = "32-true"
    compile: bool = True
    shared_prefix: bool = True


def build_defense(network: nn.Module, masks: MaskSet, settings: Settings) -> PatchCleanser:
    """The defense as ``certify`` builds it, on the device of the network: the one place here that knows
    how."""
    size = settings.batch_size or fastest_batch_size(network, masks, settings.precision)
    return PatchCleanser(network, masks, **{**asdict(settings), "batch_size": size})


@dataclass(frozen=True)
class Case:
    """What is measured, on what, and how thoroughly.

    Attributes:
        network: ``Sequential(Normalize, network)`` as :func:`certipatch.models.build` gives it; moved to the
            device.
        options: those of ``certipatch certify`` that say the same, for what is measured in a fresh process.
        repeats: rounds. full: compare all images with the published loop, and time it over all pairs.
        strategies, train_batch_size, search: of training steps; ``search`` are ``search_every`` and
            ``search_precision`` of :class:`TrainConfig`, for those that search by loss.
    """

    network: nn.Sequential
    spec: ModelSpec
    source: Source
    masks: MaskSet
    settings: Settings
    device: str
    options: dict[str, Any]
    repeats: int = 3
    full: bool = False
    strategies: Sequence[str] = ()
    train_batch_size: int = 64
    search: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network.to(self.fabric.device)

    @cached_property
    def fabric(self) -> Fabric:
        return make_fabric(device=self.device, precision=self.settings.precision)

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) float in [0, 1] on the device, and labels (N,)."""
        return self.load(range(len(self.source)))

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Raises DataError for an image that cannot be read."""
        images = Images(self.source, self.spec)
        pixels, labels = collate([images[index] for index in indices])
        return as_float(pixels.to(self.fabric.device)), labels

    def defense(self, **changed: Any) -> PatchCleanser:
        return build_defense(self.network, self.masks, replace(self.settings, **changed))
