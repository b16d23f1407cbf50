"""What certifies blocks of images: in this process, or held by each worker of a team."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from ..data.source import Item, Source
from ..data.travel import Block, Seen, packed
from ..defenses.contract import CertifiedDefense
from ..geometry.masks import MaskSet
from ..models.runs import Opened
from ..models.weights import weights_sha256
from ..records.schema import Line
from ..records.store import Store
from ..runtime.devices import environment, make_fabric
from ..runtime.probe import Facts
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


class Examiner:
    """A defense on a device, which looks at blocks of images."""

    def __init__(self, work: Work, fabric: Fabric) -> None:
        self.work, self.fabric = work, fabric
        self.defense = work.build(work.opened.network.to(fabric.device).eval())

    @property
    def run_on(self) -> dict[str, Any]:
        """What a manifest says of where and how the network is run."""
        return {"network": self.defense.describe_network(), **environment(self.fabric)}

    def look(self, items: list[Item]) -> list[Line]:
        return look(self.defense, self.fabric.device, items)

    def looks(self, defenses: Sequence[CertifiedDefense]) -> list[Callable[[list[Item]], list[Line]]]:
        """The same with other defenses around this network: against other sizes of the patch."""
        return [partial(look, defense, self.fabric.device) for defense in defenses]


class WorkingExaminer(Examiner):
    """What a worker of a team holds: an examiner, and the images as far as they are seen there."""

    def __init__(self, work: Work, device: str, source: Source, sample: str) -> None:
        super().__init__(work, make_fabric(device=device, precision=work.precision))
        self.seen = Seen(source, work.opened.spec, sample)

    def facts(self) -> Facts:
        network, defense = self.work.opened.network, self.defense
        return replace(
            Facts.of(network, weights_sha256(network), self.work.masks.image_size, self.fabric),
            name=defense.name,
            described=defense.describe(),
            network=defense.describe_network(),
        )

    def __call__(self, block: Block) -> list[Line] | Unseen:
        items = self.seen.items(block)
        return Unseen(always=not self.seen.sees) if items is None else self.look(items)


@dataclass
class OnTeam:
    """A certification on a team of workers, of which the first decides how all run the network.

    The model is loaded, compiled, and its premises are checked, once on each device.

    Attributes:
        lead: what the first worker says, which is true of all.
    """

    team: Team
    work: Work
    source: Source
    fabric: Fabric

    def __post_init__(self) -> None:
        opened, size = self.work.opened, self.work.masks.image_size
        self._expected = Facts.of(opened.network, opened.weights_sha256, size, self.fabric)
        opened.network.cpu()  # it is sent to machines that have another device, or none
        held = partial(WorkingExaminer, source=self.source, sample=self.source.sample())
        self.lead: Facts = self.team.lead(partial(held, self.work), self._refuse)
        self._expected = replace(self._expected, described=self.lead.described)
        self.team.others(partial(held, replace(self.work, asked=WayAsked(), earlier=self.lead.network)))

    def _refuse(self, found: Facts) -> str | None:
        return self._expected.why_refused(found)

    @property
    def run_on(self) -> dict[str, Any]:
        """What a manifest says of where and how the network is run; each worker is noted when it joins."""
        return {**self.lead.noted, **self.team.noted}

    def lines(self, blocks: list[range], store: Store) -> Iterator[list[Line]]:
        """The lines of each block, in order."""
        tasks = [Block(block) for block in blocks]
        return self.team.map(
            tasks, send=partial(packed, self.source), joined=lambda facts: store.note_worker(facts.noted)
        )
