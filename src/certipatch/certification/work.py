"""What certifies blocks of images: in this process, or held by each worker of a team."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from ..config import differences
from ..data.source import Item, Source
from ..data.travel import Block, Seen, packed
from ..defenses.contract import CertifiedDefense
from ..geometry.masks import MaskSet
from ..models.runs import Opened
from ..models.weights import weights_sha256
from ..records.manifest import versions
from ..records.schema import Line
from ..records.store import Store
from ..runtime.devices import environment, make_fabric
from ..runtime.probe import probe, why_other
from ..runtime.team import Team, Unseen
from ..views.network import fastest_batch_size, usable_precision
from .blocks import look
from .methods import Way, method_of


@dataclass(frozen=True)
class WayAsked:
    """How the network shall be run. None: as in the run that is resumed, or else what is fastest.

    That is: in a large run compiled and with a shared prefix, with the batch size that a quick trial finds
    best; in a small one neither. All of this changes rounding only; the manifest states it.
    """

    batch_size: int | None = None
    compile: bool | None = None
    shared_prefix: bool | None = None


@dataclass(frozen=True)
class Work:
    """All that decides on a certification but the images.

    Attributes:
        asked: how the network shall be run; ``earlier``: how an earlier attempt ran it.
        large: whether it pays to look for the fastest way.
    """

    opened: Opened
    masks: MaskSet
    defense: str
    options: dict[str, Any]
    precision: str
    asked: WayAsked = field(default_factory=WayAsked)
    earlier: dict[str, Any] = field(default_factory=dict)
    large: bool = False

    def build(self, model: nn.Module) -> CertifiedDefense:
        """The defense around the model where it is. Raises SoundnessError if a premise fails."""
        return method_of(self.defense).build(model, self.masks, self._way(model), **self.options)

    def _way(self, model: nn.Module) -> Way:
        """What was asked for; else what an earlier attempt of the run did; else what is fastest."""
        asked, earlier, large = self.asked, self.earlier, self.large
        precision = usable_precision(model, self.masks, self.precision)
        batch_size = asked.batch_size or earlier.get("batch_size")
        if batch_size is None and large:
            batch_size = fastest_batch_size(model, self.masks, precision)
        prefix = asked.shared_prefix
        return Way(
            precision=precision,
            batch_size=batch_size,
            compile=earlier.get("compiled", large) if asked.compile is None else asked.compile,
            shared_prefix=earlier.get("shared_prefix", large) or False if prefix is None else prefix,
        )


@dataclass(frozen=True)
class Facts:
    """What a certification says of where it is computed.

    Attributes:
        name, described: of the defense. network: how it runs its network. environment: the machine.
        weights_sha256, logits: of the model as it is there, and of its probe; only of a worker.
    """

    name: str
    described: dict[str, Any]
    network: dict[str, Any]
    environment: dict[str, Any]
    device: str
    weights_sha256: str | None = None
    logits: np.ndarray | None = None

    def describe(self) -> dict[str, Any]:
        """What the defense says of itself."""
        return self.described


class Examiner:
    """A defense on a device, which looks at blocks of images."""

    def __init__(self, work: Work, fabric: Fabric) -> None:
        self.work, self.fabric = work, fabric
        self.defense = work.build(work.opened.network.to(fabric.device).eval())

    def facts(self) -> Facts:
        return Facts(
            name=self.defense.name,
            described=self.defense.describe(),
            network=self.defense.describe_network(),
            environment=environment(self.fabric),
            device=self.fabric.device.type,
        )

    def look(self, items: list[Item]) -> list[Line]:
        return look(self.defense, self.fabric.device, items)


class WorkingExaminer(Examiner):
    """What a worker of a team holds: an examiner, and the images as far as they are seen there."""

    def __init__(self, work: Work, device: str, source: Source, sample: str) -> None:
        super().__init__(work, make_fabric(device=device, precision=work.precision))
        self.seen = Seen(source, work.opened.spec, sample)

    def facts(self) -> Facts:
        network, size = self.work.opened.network, self.work.masks.image_size
        return replace(
            super().facts(),
            environment={**environment(self.fabric), "versions": versions()},
            weights_sha256=weights_sha256(network),
            logits=probe(network, size, self.work.precision),
        )

    def __call__(self, block: Block) -> list[Line] | Unseen:
        items = self.seen.items(block)
        return Unseen(always=not self.seen.sees) if items is None else self.look(items)


@dataclass
class OnTeam:
    """A certification on a team of workers, of which the first decides how all run the network.

    The model is loaded, compiled, and its premises are checked, once on each device.
    """

    team: Team
    work: Work
    source: Source
    device: torch.device

    def lead(self) -> Facts:
        """Let the first worker build the defense; what it says is true of all."""
        network = self.work.opened.network
        sample, size = self.source.sample(), self.work.masks.image_size
        logits = probe(network.to(self.device).eval(), size, self.work.precision)
        network.cpu()  # it is sent to machines that have another device, or none
        self._expected = Facts("", {}, {}, {}, self.device.type, self.work.opened.weights_sha256, logits)
        held = partial(WorkingExaminer, source=self.source, sample=sample)
        lead: Facts = self.team.lead(partial(held, self.work), self._refuse)
        self._expected = replace(self._expected, described=lead.described)
        self.team.others(partial(held, replace(self.work, asked=WayAsked(), earlier=lead.network)))
        return lead

    def _refuse(self, found: Facts) -> str | None:
        """Why a worker does not compute what the driver would; None if it does."""
        expected = self._expected
        assert found.logits is not None  # those of a worker are there
        assert expected.logits is not None
        here, there = versions()["certipatch"], found.environment["versions"]["certipatch"]
        if here != there:
            return f"it has certipatch {there}, the driver {here}"
        if found.weights_sha256 != expected.weights_sha256:
            return "its weights are not those that were sent"
        other = differences(found.described, expected.described) if expected.described else []
        if other:
            return f"its defense is another ({'; '.join(other[:3])})"
        same = found.device == expected.device
        return why_other(found.logits, expected.logits, self.work.precision, same_device=same)

    def lines(self, blocks: list[range], store: Store) -> Iterator[list[Line]]:
        """The lines of each block, in order; the environment of each worker is noted in the manifest."""
        return self.team.map(
            [Block(block) for block in blocks],
            send=partial(packed, self.source),
            joined=lambda facts: store.note_worker({**facts.environment, "network": facts.network}),
        )
