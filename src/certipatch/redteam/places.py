"""Attacks at places that are not the attacker's choice: proven ones, and one of the others for each image.

At a proven place no attempt may succeed. The proven places, and the others where the one that was drawn
withstands, make an upper bound beside the certified share of places: its mean over the images does not depend
on what is drawn, and is never below that share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..geometry.masks import MaskSet
from ..geometry.places import proven_places
from ..runtime.devices import derived_seed
from .climb import AttackConfig, Result, attack_images
from .goals import Goal
from .harness import Harness


@dataclass(frozen=True)
class AtPlaces:
    """What became of one image at places that the attacker did not choose.

    Attributes:
        proven: everything that was judged at proven places; none of it may be broken.
        share: the share of all places, of all shapes, that are proven.
        drawn: the top, left, height and width of the patch at the place that was drawn among the others, if
            there are others.
        broken: whether a patch there made the answer wrong.
    """

    proven: tuple[Result, ...]
    share: float
    drawn: tuple[int, int, int, int] | None
    broken: bool


def attack_places(
    model: nn.Module,
    harness: Harness,
    labels: Tensor,
    ways: list[list[Goal]],
    config: AttackConfig,
    images: Sequence[tuple[int, str]],
) -> list[AtPlaces]:
    """Attack images at some of their proven places, and at one of the others, drawn evenly.

    Args:
        model, harness, labels, ways: as of :func:`~certipatch.redteam.climb.attack_images`.
        images: the index of each image and its ``proven``. Certified ones are attacked at proven places
            elsewhere, for every place of theirs is such.
    """
    masks = harness.defense.masks
    found = [proven_places(np.array([bit == "1" for bit in proven]), masks) for _, proven in images]
    seeds = [derived_seed(config.seed, index, 1) for index, _ in images]
    some = [_outvote_at(masks, proven) for proven in found]
    tried = [a for a, goals in enumerate(some) if goals and "0" in images[a][1]]
    few = config.model_copy(update={"restarts": config.certified_restarts})
    at_proven = dict(zip(tried, _attack(model, harness, labels, some, few, seeds, tried), strict=True))
    drawn = [_drawn(proven, seed) for proven, seed in zip(found, seeds, strict=True)]
    there = [_at(of_image, masks, *at) if at else [] for of_image, at in zip(ways, drawn, strict=True)]
    open_there = [a for a, goals in enumerate(there) if goals]  # elsewhere no patch can win
    judged = dict(
        zip(open_there, _attack(model, harness, labels, there, config, seeds, open_there), strict=True)
    )
    return [
        AtPlaces(
            tuple(at_proven.get(a, ())),
            float(np.concatenate([where.reshape(-1) for where in found[a]]).mean()),
            None if at is None else (at[1], at[2], *masks.patch_sizes[at[0]]),
            any(result.broken for result in judged.get(a, ())),
        )
        for a, at in enumerate(drawn)
    ]


def _attack(
    model: nn.Module,
    harness: Harness,
    labels: Tensor,
    ways: list[list[Goal]],
    config: AttackConfig,
    seeds: list[int],
    some: list[int],
) -> list[list[Result]]:
    """The attack on some of the images alone."""
    if not some:
        return []
    chosen = torch.tensor(some, device=harness.pixels.device)
    alone = Harness(harness.defense, harness.pixels[chosen])
    return attack_images(
        model, alone, labels[chosen], [ways[a] for a in some], config, [seeds[a] for a in some]
    )


def _outvote_at(masks: MaskSet, proven: Sequence[np.ndarray]) -> list[Goal]:
    """To outvote at any proven place, with each shape of patch."""
    places = [(size, np.argwhere(where)) for size, where in zip(masks.patch_sizes, proven, strict=True)]
    return [Goal(None, None, size, at, np.ones(len(at)), len(masks)) for size, at in places if len(at)]


def _drawn(proven: Sequence[np.ndarray], seed: int) -> tuple[int, int, int] | None:
    """One of the places that are not proven, each as likely: the number of the shape, top and left.

    None where all are proven.
    """
    at = [(shape, top, left) for shape, where in enumerate(proven) for top, left in np.argwhere(~where)]
    if not at:
        return None
    shape, top, left = at[np.random.default_rng(derived_seed(seed, 2)).integers(len(at))]
    return shape, int(top), int(left)


def _at(ways: list[Goal], masks: MaskSet, shape: int, top: int, left: int) -> list[Goal]:
    """Those of the ways that are open at this place, there alone."""
    found = []
    for way in (way for way in ways if way.patch_size == masks.patch_sizes[shape]):
        here = (way.places == (top, left)).all(axis=1)
        found.append(replace(way, places=way.places[here], visibility=way.visibility[here]))
    return [way for way in found if len(way.places)]
