"""An adaptive patch attack on the defended model, which finds the patches that the harness judges.

A mask that covers the patch restores the clean image, so those rows of the clean two-mask table that belong
to masks over the patch are beyond the attacker. Algorithm 1 then leaves two ways to a wrong answer:

* *outvote*: the one-mask labels become wrong. This is possible where each mask over the patch has a wrong
  entry in its row, for a row that is right throughout overrules the majority.
* *disagree*: a mask r and all its pairs answer one wrong label t. This is possible where each pair of r that
  covers the patch answers t on the clean image already.

A certified image offers neither anywhere (this is Theorem 1); the attack tries to outvote it at random places
all the same. The content is found by projected sign gradient with momentum over the views that show the
patch. Place and content of a start are the better of two random ones, one among the most visible places and
one anywhere where the goal is open; of many starts the better half goes on (successive halving), each with
the best content that it came by, as the 8 bits a pixel that are judged. The attack only proposes patches;
:class:`~certipatch.redteam.harness.Harness` pastes them, checks them, and asks the defense.

Challenger masking has no wrong answer where neither way is open: a mask over the patch whose row is right
throughout is never out. Where a way is open, challenger masking is attacked like Algorithm 1: a mask that
disagrees with all its pairs wins there too, and one that is outvoted may lose a game. So the bound of
:func:`~certipatch.redteam.goals.goals` holds for both, but is exact for Algorithm 1 only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ..config import Frozen
from ..data.source import as_float
from ..defenses.contract import Verdict
from ..defenses.patchcleanser.defense import PatchCleanser
from ..geometry.masks import MaskSet
from ..geometry.patch import Size
from ..views.losses import gradients
from ..views.masked import Look, Masked, window_tensor
from .goals import Goal, shown
from .harness import Harness, Proposal

MARGIN = 1.0  # A view that is fooled by more than this, in logits, is left alone.
STEP = 0.25  # The step of the first round, as a share of a pixel's range; each further round halves it.
CLIMB_AT_ONCE = 64  # Attempts that climb together, which bounds the memory.
PLACES_LIKE_THE_BEST = 0.8  # A place is among the most visible from this share of the greatest visibility on.
DRAWS = 2  # Places and contents that are drawn for each start.


class AttackConfig(Frozen):
    """How hard the attack tries.

    Each image has ``restarts`` starts (place, goal, random content), in heats of 2, 4, 8 ... while it is not
    broken. A start is, of two draws of place and content, the one that is nearest to its goal. In a heat,
    after each round of ``steps`` gradient steps the starts are judged and the better half goes on. Certified
    images have ``certified_restarts`` starts, since none of them can break the image.
    """

    steps: int = Field(default=8, ge=1)
    restarts: int = Field(default=62, ge=1)
    certified_restarts: int = Field(default=2, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class Attempt:
    """A patch for one image: its place, its goal, and the content that the attack has come to.

    Attributes:
        image: the number of the image.
        row, target: the goal, as in :class:`~certipatch.redteam.goals.Goal`.
        content: (3, h, w) float in [0, 1].
        shortfall: the share of the views that are not fooled yet, then by how many logits the views miss on
            average; smaller is better.
    """

    image: int
    top: int
    left: int
    row: int | None
    target: int | None
    content: Tensor
    shortfall: tuple[float, float] = (1.0, math.inf)

    @property
    def patch_size(self) -> Size:
        return self.content.shape[1], self.content.shape[2]

    @property
    def box(self) -> tuple[slice, slice]:
        """The rows and columns of the patch."""
        h, w = self.patch_size
        return slice(self.top, self.top + h), slice(self.left, self.left + w)

    def pairs_to_fool(self, masks: MaskSet) -> list[tuple[int, int]]:
        """The pairs of masks whose views show some of the patch; (i, i) is mask i alone.

        To outvote, these are the single masks; to disagree, the pairs of mask ``row``.
        """
        visibility = shown(masks, self.patch_size, self.row)[:, self.top, self.left]
        return [(i if self.row is None else self.row, i) for i in np.flatnonzero(visibility).tolist()]


@dataclass(frozen=True)
class Result:
    """An attempt, the patched image (3, H, W) uint8, and what the defense said of it.

    ``broken`` says whether the defense's answer is wrong.
    """

    attempt: Attempt
    patched: Tensor
    verdict: Verdict
    broken: bool


def attack_images(
    model: nn.Module,
    harness: Harness[PatchCleanser],
    labels: Tensor,
    ways: list[list[Goal]],
    config: AttackConfig,
    seeds: list[int],
) -> list[list[Result]]:
    """Attack every image of the harness until its answer is wrong or its starts are used up.

    Args:
        model: the undefended model, for gradients.
        labels: (N,) int64, the true labels.
        ways: the :func:`~certipatch.redteam.goals.goals` of each image; empty for a certified one.
        seeds: the seed of each image.

    Returns:
        for each image everything that was judged, in order.
    """
    defense = harness.defense
    masks, device = defense.masks, labels.device
    victim = Victim(
        harness,
        labels,
        Masked(model, defense.fill.to(device)),
        defense.batch_size,
        lambda attempts: _views_to_fool(defense, labels, attempts),
    )
    starts = [_starts(masks, image, ways[image], config, seed) for image, seed in enumerate(seeds)]
    return climb(victim, starts, config.steps)


def climb(victim: Victim, starts: list[list[list[Attempt]]], steps: int) -> list[list[Result]]:
    """Let starts climb, in heats of 2, 4, 8 ... on each image until its answer is wrong or they are used up.

    Args:
        starts: for each image and start the draws, of which the nearest climbs on.
    """
    results: list[list[Result]] = [[] for _ in starts]
    heat = 2
    while drawn := [start for image in _unbroken(results) for start in starts[image][:heat]]:
        _run_heat(victim, _nearest(victim, drawn), steps, results)
        starts, heat = [of_image[heat:] for of_image in starts], 2 * heat
    return results


@dataclass(frozen=True)
class Victim:
    """What is attacked, and how it looks at what is proposed.

    Attributes:
        harness: around the defense, with the images (N, 3, H, W).
        labels: (N,) int64, the true labels.
        look: (images, windows) -> logits of views, with gradients; ``batch_size`` views at once.
        views: the views that attempts must fool.
    """

    harness: Harness[Any]
    labels: Tensor
    look: Look
    batch_size: int
    views: Callable[[list[Attempt]], Views]

    @property
    def images(self) -> Tensor:
        """(N, 3, H, W) float in [0, 1]."""
        return as_float(self.harness.pixels)

    def judge(self, attempts: list[Attempt]) -> list[Result]:
        """What the defense says of each attempt."""
        proposals = [Proposal(each.image, each.top, each.left, each.content) for each in attempts]
        return [
            Result(attempt, patched, verdict, verdict.defended_label != int(self.labels[attempt.image]))
            for attempt, (patched, verdict) in zip(attempts, self.harness.judge(proposals), strict=True)
        ]


def _unbroken(results: list[list[Result]]) -> list[int]:
    """The images whose answer no attempt has made wrong yet."""
    return [image for image, of_image in enumerate(results) if not any(each.broken for each in of_image)]


def _run_heat(victim: Victim, attempts: list[Attempt], steps: int, results: list[list[Result]]) -> None:
    """Let attempts climb in rounds, and add what the harness says of them to the results of their images.

    After each round the better half of the attempts on each image that is not broken goes on.
    """
    step = STEP
    while attempts:
        climbed = _climb_in_parts(victim, attempts, steps, step)
        for result in victim.judge(climbed):
            results[result.attempt.image].append(result)
        attempts = []
        for image in _unbroken(results):
            attempts += _better_half([attempt for attempt in climbed if attempt.image == image])
        step /= 2


def _better_half(attempts: list[Attempt]) -> list[Attempt]:
    """Successive halving among the attempts on one image; one alone is at its end."""
    return sorted(attempts, key=lambda attempt: attempt.shortfall)[: len(attempts) // 2]


def _climb_in_parts(victim: Victim, attempts: list[Attempt], steps: int, step: float) -> list[Attempt]:
    """As :func:`_climb`, of any number of attempts."""
    parts = [attempts[start : start + CLIMB_AT_ONCE] for start in range(0, len(attempts), CLIMB_AT_ONCE)]
    return [attempt for part in parts for attempt in _climb(victim, part, steps, step)]


def _nearest(victim: Victim, drawn: list[list[Attempt]]) -> list[Attempt]:
    """Of the draws for each start the one that misses its goal by least."""
    looked_at = iter(_climb_in_parts(victim, [draw for draws in drawn for draw in draws], 1, STEP))
    return [min([next(looked_at) for _ in draws], key=lambda draw: draw.shortfall) for draws in drawn]


def _starts(
    masks: MaskSet, image: int, ways: list[Goal], config: AttackConfig, seed: int
) -> list[list[Attempt]]:
    """The draws for each start: random contents at random places, every second among the most visible.

    The starts are to outvote and to disagree in turn, where both are open, the nearest goals first. On a
    certified image no place is promising, and a hole in the masks, where most views show the patch, would
    lose against another place: there is one draw.
    """
    rng = np.random.default_rng(seed)
    starts, draws = (config.restarts, DRAWS) if ways else (config.certified_restarts, 1)
    ways = ways or _anywhere(masks, seed)
    outvote, disagree = [way for way in ways if way.row is None], [way for way in ways if way.row is not None]
    kinds = [kind for kind in (outvote, disagree) if kind]
    found = []
    for start in range(starts):
        kind = kinds[start % len(kinds)]
        way = kind[start // len(kinds) % len(kind)]
        found.append([_draw(masks, image, way, rng, draw) for draw in range(draws)])
    return found


def _draw(masks: MaskSet, image: int, way: Goal, rng: np.random.Generator, draw: int) -> Attempt:
    """A random content at a random place where the goal is open."""
    promising = way.visibility >= PLACES_LIKE_THE_BEST * way.visibility.max() * (draw % 2)
    top, left = rng.choice(way.places[promising]).tolist()
    content = torch.from_numpy(rng.random((3, *way.patch_size), dtype=np.float32))
    return Attempt(image, top, left, way.row, way.target, content)


def _anywhere(masks: MaskSet, seed: int) -> list[Goal]:
    """To outvote at any place, with each shape of patch: the goals against a certified image."""
    height, width = masks.image_size
    ways = []
    for h, w in masks.patch_sizes:
        places = np.array(list(np.ndindex(height - h + 1, width - w + 1)))
        ways.append(Goal(None, None, (h, w), places, np.ones(len(places)), len(masks)))
    first = seed % len(ways)  # with few starts, not the same shapes on every image
    return ways[first:] + ways[:first]


@dataclass(frozen=True)
class Views:
    """The views that attempts must fool.

    Attributes:
        which: (V,) the number of the attempt that each view belongs to.
        windows: (V, ...) of each view what the victim's ``look`` takes.
        shortfall: logits of some views (v, classes), and the slice of all views which they are -> (v,) how
            many logits each of them misses by.
    """

    which: Tensor
    windows: Tensor
    shortfall: Callable[[Tensor, slice], Tensor]

    def left(self, missing: Tensor) -> list[tuple[float, float]]:
        """The shortfall of each attempt, from that of each view."""
        of_attempts = torch.split(missing.cpu(), self.which.bincount().tolist())
        return [(float((each > MARGIN).float().mean()), float(each.mean())) for each in of_attempts]


def _views_to_fool(defense: PatchCleanser, labels: Tensor, attempts: list[Attempt]) -> Views:
    """A label must no longer lead to be outvoted, and must lead all others to disagree, by ``MARGIN``."""
    masks, device, none = defense.masks, labels.device, -1
    views = [
        (a, *pair, none if attempt.target is None else attempt.target)
        for a, attempt in enumerate(attempts)
        for pair in attempt.pairs_to_fool(masks)
    ]
    which, first, second, target = torch.tensor(views, device=device).T
    windows = window_tensor(masks, device)
    image = torch.tensor([attempt.image for attempt in attempts], device=device)
    label = torch.where(target == none, labels[image[which]], target)[:, None]

    def shortfall(logits: Tensor, part: slice) -> Tensor:
        its = logits.gather(1, label[part])[:, 0]
        others = logits.scatter(1, label[part], -torch.inf).amax(1)
        return torch.relu(torch.where(target[part] == none, its - others, others - its) + MARGIN)

    return Views(which, torch.cat([windows[first], windows[second]], dim=1), shortfall)


def _climb(victim: Victim, attempts: list[Attempt], steps: int, step: float) -> list[Attempt]:
    """The attempts with the best contents on their ways: projected sign gradient with momentum.

    The step falls along a cosine. What is looked at is what the harness will judge, rounded to 8 bits.
    """
    views, images = victim.views(attempts), victim.images
    device, clean = images.device, images[[attempt.image for attempt in attempts]]
    pasted = clean.clone()
    outside = torch.ones(len(pasted), 1, *pasted.shape[2:], dtype=torch.bool, device=device)
    for a, attempt in enumerate(attempts):
        outside[a, :, *attempt.box] = False
        pasted[a, :, *attempt.box] = attempt.content
    momentum = torch.zeros_like(pasted)
    best = [replace(attempt, shortfall=(1.0, math.inf)) for attempt in attempts]
    for t in range(steps):
        rounded = torch.where(outside, clean, (pasted * 255).round() / 255)
        gradient, missing = gradients(
            victim.look, rounded, views.which, views.windows, views.shortfall, batch_size=victim.batch_size
        )
        best = [
            _better(one, rounded[a], left)
            for a, (one, left) in enumerate(zip(best, views.left(missing), strict=True))
        ]
        gradient = gradient.masked_fill(outside, 0)
        momentum = 0.9 * momentum + gradient / gradient.abs().sum((1, 2, 3), keepdim=True).clamp(min=1e-12)
        moved = pasted - step * (1 + math.cos(math.pi * t / steps)) / 2 * momentum.sign()
        pasted = torch.where(outside, clean, moved.clamp(0, 1))
    return best


def _better(best: Attempt, pasted: Tensor, shortfall: tuple[float, float]) -> Attempt:
    """The attempt with the content of a pasted image (3, H, W), if that falls short by less."""
    if shortfall > best.shortfall:
        return best
    return replace(best, content=pasted[:, *best.box].clone(), shortfall=shortfall)
