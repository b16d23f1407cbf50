"""A case: the model, data and settings that are measured, and the defense that is built of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from lightning_fabric import Fabric
from torch import Tensor, nn

from ..config import ModelSpec
from ..data.source import Images, Source, stack
from ..defenses.patchcleanser.defense import PatchCleanser
from ..geometry.masks import MaskSet
from ..runtime.devices import make_fabric
from ..views.network import fastest_batch_size


@dataclass(frozen=True)
class Settings:
    """How the defense runs its network: arguments of :class:`PatchCleanser`.

    The defaults are those of ``certify`` in a large run.
    """

    batch_size: int | None = None
    exhaustive: bool = False
    precision: str = "32-true"
    compile: bool = True
    shared_prefix: bool = True


def build_defense(network: nn.Module, masks: MaskSet, settings: Settings) -> PatchCleanser:
    """The defense as ``certify`` builds it, on the device of the network."""
    size = settings.batch_size or fastest_batch_size(network, masks, settings.precision)
    return PatchCleanser(network, masks, **{**asdict(settings), "batch_size": size})


def settings_in_effect(defense: PatchCleanser) -> str:
    """The settings of a defense, for a reader; not every network can be compiled or has a shared prefix."""
    network = defense.network
    effects = {
        "compiled": network.compiled,
        "shared prefix": network.prefix,
        "exhaustive": defense.exhaustive,
    }
    words = [word for word, on in effects.items() if on]
    return ", ".join([network.precision, f"batch {network.batch_size}", *words])


@dataclass(frozen=True)
class Case:
    """What is measured, on what, and how thoroughly.

    Attributes:
        network: ``Sequential(Normalize, network)`` as :func:`certipatch.models.build.build` gives it; it is
            moved to the device.
        options: the options of ``certipatch certify`` that say the same, for what is measured in a process of
            its own.
        repeats: the number of rounds.
        full: compare all images with the published loop, and time it over all pairs of masks.
        strategies, train_batch_size: of training steps.
        search: ``search_every`` and ``search_precision`` of
            :class:`~certipatch.training.config.TrainConfig`, for strategies that search by loss.
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

    @property
    def exact(self) -> bool:
        """Whether the defense computes in float32, as the published loop does."""
        return self.settings.precision == "32-true"

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) float in [0, 1] on the device, and labels (N,)."""
        return self.load(range(len(self.source)))

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The images of these indices, as in ``data``. Raises DataError for one that cannot be read."""
        images = Images(self.source, self.spec)
        loaded = stack([images[index] for index in indices])
        images_there, labels = loaded.on(self.fabric.device)
        return images_there, labels.cpu()

    def defense(self, **changed: Any) -> PatchCleanser:
        """The defense that is measured, with some of its settings changed."""
        return build_defense(self.network, self.masks, replace(self.settings, **changed))
