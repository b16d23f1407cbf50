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

from ..defenses.patchcleanser.defense import PatchCleanser
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
    harness: Harness[PatchCleanser],
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
    masks, seeds = harness.defense.masks, [derived_seed(config.seed, index, 1) for index, _ in images]
    target = _Target(model, harness, labels, seeds)
    found = [proven_places(np.array([bit == "1" for bit in proven]), masks) for _, proven in images]
    some = [
        _outvote_at(masks, where) if "0" in proven else []
        for (_, proven), where in zip(images, found, strict=True)
    ]
    at_proven = target.attack(some, config.model_copy(update={"restarts": config.certified_restarts}))
    drawn = [_drawn(where, seed) for where, seed in zip(found, seeds, strict=True)]
    there = [_at(of_image, masks, at) for of_image, at in zip(ways, drawn, strict=True)]
    return [
        AtPlaces(
            tuple(tried),
            float(np.concatenate([of_shape.reshape(-1) for of_shape in where]).mean()),
            None if at is None else (at[1], at[2], *masks.patch_sizes[at[0]]),
            any(result.broken for result in judged),
        )
        for tried, where, at, judged in zip(
            at_proven, found, drawn, target.attack(there, config), strict=True
        )
    ]


@dataclass(frozen=True)
class _Target:
    """What is attacked, as of :func:`attack_places`, and the seed of each image."""

    model: nn.Module
    harness: Harness[PatchCleanser]
    labels: Tensor
    seeds: list[int]

    def attack(self, ways: list[list[Goal]], config: AttackConfig) -> list[list[Result]]:
        """Everything that was judged of each image; nothing where no way is given, for none is open there."""
        results: list[list[Result]] = [[] for _ in ways]
        some = [a for a, goals in enumerate(ways) if goals]
        if some:
            chosen = torch.tensor(some, device=self.harness.pixels.device)
            alone, labels = Harness(self.harness.defense, self.harness.pixels[chosen]), self.labels[chosen]
            goals, seeds = [ways[a] for a in some], [self.seeds[a] for a in some]
            judged = attack_images(self.model, alone, labels, goals, config, seeds)
            for a, of_image in zip(some, judged, strict=True):
                results[a] = of_image
        return results


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


def _at(ways: list[Goal], masks: MaskSet, place: tuple[int, int, int] | None) -> list[Goal]:
    """Those of the ways that are open at this place, there alone."""
    if place is None:
        return []
    shape, *at = place
    found = []
    for way in (way for way in ways if way.patch_size == masks.patch_sizes[shape]):
        here = (way.places == at).all(axis=1)
        if here.any():
            found.append(replace(way, places=way.places[here], visibility=way.visibility[here]))
    return found
