"""An adaptive patch attack on the defended model, and the harness that does not believe it.

A mask that covers the patch restores the clean image, so those rows of the clean two-mask table that belong
to masks over the patch are beyond the attacker. Algorithm 1 then leaves two ways to a wrong answer:

* *outvote*: the one-mask labels become wrong. Possible where each mask over the patch has a wrong entry in
  its row, for a row that is right throughout overrules the majority.
* *disagree*: a mask r and all its pairs answer one wrong label t. Possible where each pair of r that covers
  the patch answers t on the clean image already.

A certified image offers neither anywhere (this is Theorem 1); the attack tries to outvote it at random places
all the same. The content is found by projected sign gradient over the views that show the patch, from many
starts of which the better half goes on (successive halving). The attack only proposes; :class:`Harness`
pastes, checks and asks, with the inference of the defense.

Challenger masking has no wrong answer where neither way is open: a mask over the patch whose row is right
throughout is never out. Where one is open it is attacked the same way: a mask that disagrees with all its
pairs wins there too, and one that is outvoted may lose a game. So the bound of :func:`goals` holds for both,
but is exact for Algorithm 1 only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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
from ..views.masked import Masked, visible, window_tensor
from .goals import Goal, shown
from .harness import Harness, Proposal

MARGIN = 1.0  # of logits: a view that is fooled by more is left alone


STEP = 0.1  # of the range of a pixel, in the first round; half of it in each further one


CLIMB_AT_ONCE = 64  # attempts; so much memory


class AttackConfig(Frozen):
    """How hard the attack tries.

    Each image has ``restarts`` starts (place, goal, random content), in heats of 2, 4, 8 ... while it is not
    broken. In a heat, after each round of ``steps`` gradient steps the starts are judged and the better half
    goes on. Certified images have ``certified_restarts``, since nothing can come of them.
    """

    steps: int = Field(default=20, ge=1)
    restarts: int = Field(default=30, ge=1)
    certified_restarts: int = Field(default=2, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class Attempt:
    """One start on one image: place, goal (as in :class:`Goal`) and content (3, h, w).

    ``shortfall``: the share of its views that are not fooled yet, then by how many logits they miss on
        average.
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


@dataclass(frozen=True)
class Result:
    """An attempt and what the harness made of it."""

    attempt: Attempt
    patched: Tensor
    verdict: Verdict
    broken: bool


def attack_images(
    model: nn.Module,
    harness: Harness,
    labels: Tensor,
    ways: list[list[Goal]],
    config: AttackConfig,
    seeds: list[int],
) -> list[list[Result]]:
    """Attack every image of the harness until its answer is wrong or its starts are used up.

    Args:
        model: the undefended model, for gradients.
        labels: (N,) int64, the true labels.
        ways: the :func:`goals` of each image; empty for a certified one.
        seeds: one for each image.

    Returns:
        for each image everything that was judged, in order.
    """
    images, defense = as_float(harness.pixels), harness.defense
    results: list[list[Result]] = [[] for _ in images]
    starts = [_starts(defense.masks, a, ways[a], config, seed) for a, seed in enumerate(seeds)]

    def open_() -> list[int]:
        return [a for a in range(len(images)) if not any(result.broken for result in results[a])]

    heat = 2
    while any(starts[a] for a in open_()):
        attempts = [start for a in open_() for start in starts[a][:heat]]
        starts, heat, step = [of_image[heat:] for of_image in starts], 2 * heat, STEP
        while attempts:
            parts = [attempts[i : i + CLIMB_AT_ONCE] for i in range(0, len(attempts), CLIMB_AT_ONCE)]
            attempts = [
                climbed
                for part in parts
                for climbed in _climb(model, defense, images, labels, part, config.steps, step)
            ]
            judged = harness.judge([Proposal(a.image, a.top, a.left, a.content) for a in attempts])
            for attempt, (patched, verdict) in zip(attempts, judged, strict=True):
                results[attempt.image].append(
                    Result(attempt, patched, verdict, verdict.defended_label != int(labels[attempt.image]))
                )
            attempts = [
                better
                for a in open_()
                for better in _better_half([attempt for attempt in attempts if attempt.image == a])
            ]
            step /= 2
    return results


def _starts(masks: MaskSet, image: int, ways: list[Goal], config: AttackConfig, seed: int) -> list[Attempt]:
    """Random contents at random places among the most visible, to outvote and to disagree in turn, the
    nearest goals first."""
    height, width = masks.image_size
    rng = np.random.default_rng(seed)
    if not ways:
        for h, w in masks.patch_sizes:
            anywhere = np.array(list(np.ndindex(height - h + 1, width - w + 1)))
            ways = [*ways, Goal(None, None, (h, w), anywhere, np.ones(len(anywhere)), len(masks))]
        first = seed % len(ways)  # with few starts, not the same shapes on every image
        ways, starts = ways[first:] + ways[:first], config.certified_restarts
    else:
        starts = config.restarts
    kinds = [
        kind
        for kind in ([way for way in ways if way.row is None], [way for way in ways if way.row is not None])
        if kind
    ]
    found = []
    for start in range(starts):
        kind = kinds[start % len(kinds)]
        way = kind[start // len(kinds) % len(kind)]
        top, left = rng.choice(way.places[way.visibility >= 0.8 * way.visibility.max()]).tolist()
        content = torch.from_numpy(rng.random((3, *way.patch_size), dtype=np.float32))
        found.append(Attempt(image, top, left, way.row, way.target, content))
    return found


def _better_half(attempts: list[Attempt]) -> list[Attempt]:
    """Successive halving among the attempts on one image; one alone is at its end."""
    return sorted(attempts, key=lambda attempt: attempt.shortfall)[: len(attempts) // 2]


def _climb(
    model: nn.Module,
    defense: PatchCleanser,
    images: Tensor,
    labels: Tensor,
    attempts: list[Attempt],
    steps: int,
    step: float,
) -> list[Attempt]:
    """The attempts with better contents: projected sign gradient with momentum, the step falling on a
    cosine."""
    masks, device = defense.masks, images.device
    windows = window_tensor(masks, device)
    views = [
        (a, i if attempt.row is None else attempt.row, i, -1 if attempt.target is None else attempt.target)
        for a, attempt in enumerate(attempts)
        for i in np.flatnonzero(
            shown(masks, attempt.patch_size, attempt.row)[:, attempt.top, attempt.left]
        ).tolist()
    ]
    which, first, second, target = torch.tensor(views, device=device).T
    pairs = torch.cat([windows[first], windows[second]], dim=1)
    image = torch.tensor([attempt.image for attempt in attempts], device=device)
    subject = torch.where(target < 0, labels[image[which]], target)[:, None]

    def shortfall(logits: Tensor, part: slice) -> Tensor:
        """How far the target is from leading all other labels by MARGIN; without one, the true label from
        trailing another by it."""
        its = logits.gather(1, subject[part])[:, 0]
        others = logits.scatter(1, subject[part], -torch.inf).amax(1)
        return torch.relu(torch.where(target[part] < 0, its - others, others - its) + MARGIN)

    patches = torch.tensor(
        [
            [[rows.start, columns.start, rows.stop, columns.stop]]
            for rows, columns in (a.box for a in attempts)
        ],
        device=device,
    )
    outside = visible(patches, masks.image_size)[:, None]
    clean = images[image]
    pasted = clean.clone()
    for a, attempt in enumerate(attempts):
        pasted[a, :, *attempt.box] = attempt.content
    momentum, look = torch.zeros_like(pasted), Masked(model, defense.fill.to(device))
    for t in range(steps):
        gradient, missing = gradients(look, pasted, which, pairs, shortfall, batch_size=defense.batch_size)
        gradient = gradient.masked_fill(outside, 0)
        momentum = 0.9 * momentum + gradient / gradient.abs().sum((1, 2, 3), keepdim=True).clamp(min=1e-12)
        moved = pasted - step * (1 + math.cos(math.pi * t / steps)) / 2 * momentum.sign()
        pasted = torch.where(outside, clean, moved.clamp(0, 1))

    climbed = []
    for a, attempt in enumerate(attempts):
        of_views = missing[which == a]
        left_over = float((of_views > MARGIN).float().mean()), float(of_views.mean())
        climbed.append(replace(attempt, content=pasted[a, :, *attempt.box], shortfall=left_over))
    return climbed
