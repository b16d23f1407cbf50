"""What attacks blocks of images: in this process, or held by each worker of a team."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from ..data.source import Item, Source, as_float, pixels_sha256
from ..data.travel import Block, Seen, packed
from ..defenses.contract import CertifiedDefense
from ..defenses.patchcleanser.defense import PatchCleanser
from ..errors import ConfigError, SoundnessError
from ..models.runs import Opened
from ..models.weights import weights_sha256
from ..records.schema import Record
from ..records.store import Store
from ..runtime.devices import derived_seed, environment, make_fabric, precision_of
from ..runtime.probe import Facts
from ..runtime.team import Team, Unseen
from .climb import AttackConfig, attack_images
from .found import Found
from .goals import Goal, clean_tables, goals
from .harness import Harness
from .places import attack_places
from .windows import attack_windows, by_windows

Records = Sequence[Record]
Attacked = tuple[list[Item], list[Found]]  # the images of a block, and what became of each
Restored = Callable[[Opened, Fabric], CertifiedDefense]


@dataclass
class Attacker:
    """An attack on a defense, block by block.

    Attributes:
        certified: the folder of the certification, for errors.
    """

    opened: Opened
    defense: CertifiedDefense
    certified: Path
    config: AttackConfig
    fabric: Fabric

    @property
    def device(self) -> str:
        """On what kind of device it runs."""
        return self.fabric.device.type

    @property
    def run_on(self) -> dict[str, Any]:
        """What a manifest says of where and how the network is run."""
        return {"network": self.defense.describe_network(), **environment(self.fabric)}

    def attack(self, block: Records, items: list[Item]) -> Attacked:
        """Attack the images of these records. Raises SoundnessError for one that was not certified so."""
        same = [
            _as_certified(item, record, self.certified) for item, record in zip(items, block, strict=True)
        ]
        with self.fabric.autocast():  # gradients of the function that is deployed
            return same, _attack_block(self.opened, self.defense, same, block, self.config)


class WorkingAttacker:
    """What a worker of a team holds: an attack, and the images as far as they are seen there."""

    def __init__(
        self,
        device: str,
        *,
        opened: Opened,
        restored: Restored,
        attacker: tuple[Path, AttackConfig, str],
        source: Source,
        sample: str,
    ) -> None:
        certified, config, precision = attacker
        fabric = make_fabric(device=device, precision=precision)
        self.attacker = Attacker(opened, restored(opened, fabric), certified, config, fabric)
        self.seen = Seen(source, opened.spec, sample)

    def facts(self) -> Facts:
        opened, defense = self.attacker.opened, self.attacker.defense
        size, network = opened.spec.image_size, opened.network
        return replace(
            Facts.of(network, weights_sha256(network), size, self.attacker.fabric),
            name=defense.name,
            described=defense.describe(),
            network=defense.describe_network(),
        )

    def __call__(self, task: tuple[Records, Block]) -> Attacked | Unseen:
        records, block = task
        items = self.seen.items(block)
        if items is None:
            return Unseen(always=not self.seen.sees)
        same, found = self.attacker.attack(records, items)
        return same, [one.brief() for one in found]


class AttackersOnTeam:
    """An attack on a team of workers; ``lead`` is what the first says of itself, ``device`` its kind."""

    def __init__(self, team: Team, here: Attacker, source: Source, restored: Restored) -> None:
        self.team, self.source, opened = team, source, here.opened
        expected = Facts.of(opened.network, opened.weights_sha256, opened.spec.image_size, here.fabric)
        expected = replace(expected, described=here.defense.describe())
        opened.network.cpu()  # it is sent to machines that have another device, or none
        make = partial(
            WorkingAttacker,
            opened=opened,
            restored=restored,
            attacker=(here.certified, here.config, precision_of(here.fabric)),
            source=source,
            sample=source.sample(),
        )
        self.lead: Facts = team.lead(make, expected.why_refused)
        self.device = self.lead.device

    @property
    def run_on(self) -> dict[str, Any]:
        """What a manifest says of where and how the network is run; each worker is noted when it joins."""
        return {**self.lead.noted, **self.team.noted}

    def attack(self, blocks: list[Records], store: Store) -> Iterator[Attacked]:
        """The images of each block and what became of them, in order."""
        tasks = [(block, Block([record.index for record in block])) for block in blocks]
        return self.team.map(
            tasks,
            send=lambda task: (task[0], packed(self.source, task[1])),
            joined=lambda facts: store.note_worker(facts.noted),
        )


def _as_certified(item: Item, record: Record, certified: Path) -> Item:
    """The image. Raises SoundnessError if its pixels or its label are not those that were certified."""
    pixels = None if item.pixels is None else pixels_sha256(item.pixels)
    if (pixels, item.label) != (record.pixels, record.label):
        raise SoundnessError(
            f"image {record.index} ({record.name!r}): is not the one that was certified; give the data of "
            f"{certified}"
        )
    return item


def _attack_block(
    opened: Opened, defense: CertifiedDefense, items: list[Item], records: Records, config: AttackConfig
) -> list[Found]:
    """Attack those images of a block that the defended model is right on; a block is always attacked as a
    whole."""
    found = _clean_answers(opened, defense, items)
    right = [a for a, one in enumerate(found) if one.clean and one.clean.defended_label == items[a].label]
    if not right:
        return found
    device = next(opened.network.parameters()).device
    pixels = torch.stack([items[a].readable() for a in right]).to(device)
    labels = torch.tensor([items[a].label for a in right], device=device)
    if by_windows(defense):
        seeds = [derived_seed(config.seed, records[a].index) for a in right]
        attacked = attack_windows(Harness(defense, pixels), labels, config, seeds)
        for a, (open_at, judged) in zip(right, attacked, strict=True):
            found[a] = replace(found[a], ways=open_at, results=tuple(judged))
        return found
    if not isinstance(defense, PatchCleanser):
        raise ConfigError(f"attack: expected a defense that it knows, found {defense.name}")
    some = [records[a] for a in right]
    for a, one in zip(right, _attacked(opened, Harness(defense, pixels), labels, some, config), strict=True):
        found[a] = replace(found[a], **one)
    return found


def _attacked(
    opened: Opened,
    harness: Harness[PatchCleanser],
    labels: torch.Tensor,
    records: Sequence[Any],
    config: AttackConfig,
) -> list[dict[str, Any]]:
    """What is found of images of PatchCleanser, by field of :class:`Found`; at proven places too, where the
    records have them."""
    ways = _open_ways(harness.defense, harness.pixels, labels, [record.certified for record in records])
    seeds = [derived_seed(config.seed, record.index) for record in records]
    results = attack_images(opened.network, harness, labels, ways, config, seeds)
    found: list[dict[str, Any]] = [
        {"ways": len(open_ways), "results": tuple(judged)}
        for open_ways, judged in zip(ways, results, strict=True)
    ]
    by_place = [(record.index, getattr(record, "proven", None) or "") for record in records]
    if by_place[0][1]:
        at_places = attack_places(opened.network, harness, labels, ways, config, by_place)
        found = [{**one, "places": places} for one, places in zip(found, at_places, strict=True)]
    return found


def _clean_answers(opened: Opened, defense: CertifiedDefense, items: list[Item]) -> list[Found]:
    """What the defended model answers on the clean images; nothing for those that cannot be read."""
    readable = [a for a, item in enumerate(items) if item.pixels is not None]
    found = [Found(None) for _ in items]
    if readable:
        device = next(opened.network.parameters()).device
        pixels = torch.stack([items[a].readable() for a in readable]).to(device)
        for a, verdict in zip(readable, defense.examine(as_float(pixels)), strict=True):
            found[a] = Found(verdict)
    return found


def _open_ways(
    defense: PatchCleanser, pixels: torch.Tensor, labels: torch.Tensor, certified: list[bool]
) -> list[list[Goal]]:
    """The goals of each image. The table of a certified image is in its certificate: it leaves none."""
    ways: list[list[Goal]] = [[] for _ in certified]
    uncertain = [a for a, proven in enumerate(certified) if not proven]
    if uncertain:
        tables = clean_tables(defense, as_float(pixels[uncertain]))
        for a, table in zip(uncertain, tables, strict=True):
            ways[a] = goals(defense.masks, table, int(labels[a]))
    return ways
