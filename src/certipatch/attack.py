"""An adaptive patch attack on the defended model, and the harness that does not believe it.

A mask that covers the patch restores the clean image, so those rows of the clean two-mask table that belong to masks
over the patch are beyond the attacker. Algorithm 1 then leaves two ways to a wrong answer:

* *outvote*: the one-mask labels become wrong. Possible where each mask over the patch has a wrong entry in its row, for
  a row that is right throughout overrules the majority.
* *disagree*: a mask r and all its pairs answer one wrong label t. Possible where each pair of r that covers the patch
  answers t on the clean image already.

A certified image offers neither anywhere (this is Theorem 1); the attack tries to outvote it at random places all the
same. The content is found by projected sign gradient over the views that show the patch, from many starts of which the
better half goes on (successive halving). The attack only proposes; :class:`Harness` pastes, checks and asks, with the
inference of the defense.

Challenger masking has no wrong answer where neither way is open: a mask over the patch whose row is right throughout is
never out. Where one is open it is attacked the same way: a mask that disagrees with all its pairs wins there too, and one
that is outvoted may lose a game. So the bound of :func:`goals` holds for both, but is exact for Algorithm 1 only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from .config import Frozen
from .data import as_float
from .defense import PatchCleanser, Verdict
from .errors import ConfigError
from .masks import MaskSet, Size, by
from .views import Masked, check_logits, gradients, visible, window_tensor

MARGIN = 1.0  # of logits: a view that is fooled by more is left alone
STEP = 0.1  # of the range of a pixel, in the first round; half of it in each further one
CLIMB_AT_ONCE = 64  # attempts; so much memory


class AttackConfig(Frozen):
    """How hard the attack tries.

    Each image has ``restarts`` starts (place, goal, random content), in heats of 2, 4, 8 ... while it is not broken. In a heat,
    after each round of ``steps`` gradient steps the starts are judged and the better half goes on. Certified images have
    ``certified_restarts``, since nothing can come of them.
    """

    steps: int = Field(default=20, ge=1)
    restarts: int = Field(default=30, ge=1)
    certified_restarts: int = Field(default=2, ge=1)
    seed: int = 0


# --- What the attacker may hope for: from the clean table alone -------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """One way to a wrong answer, and where it is open.

    Attributes:
        row, target: None: outvote. Else disagree: mask ``row`` and all its pairs shall answer ``target``.
        patch_size: the shape of the patch.
        places: (positions, 2) top and left of the patch where the clean table does not rule it out.
        visibility: (positions,) the smallest share of the patch that a view shows which is still to be fooled.
        left: number of views that do not answer as wanted on the clean image.
    """

    row: int | None
    target: int | None
    patch_size: Size
    places: np.ndarray
    visibility: np.ndarray
    left: int


@lru_cache(maxsize=64)
def shown(masks: MaskSet, patch_size: Size, row: int | None = None) -> np.ndarray:
    """(masks, H-h+1, W-w+1): the share of a patch at each place that each mask, together with mask ``row``, leaves visible."""
    keep = masks.keep.numpy()
    if row is not None:
        keep = keep & keep[row]
    h, w = patch_size
    total = np.pad(keep.cumsum(1, dtype=np.int32).cumsum(2, dtype=np.int32), ((0, 0), (1, 0), (1, 0)))
    return ((total[:, h:, w:] - total[:, :-h, w:] - total[:, h:, :-w] + total[:, :-h, :-w]) / (h * w)).astype(np.float32)


def goals(masks: MaskSet, table: np.ndarray, label: int) -> list[Goal]:
    """Every way to win on an image with this clean table, the nearest first.

    None is left out: an attacker who could give the views that show some of the patch any label he likes wins exactly
    where there is a goal (with challenger masking: only where there is one). So the images without one bound every attack,
    and they are the certified ones at least.
    """
    ways: list[tuple[int | None, int | None, np.ndarray]] = [(None, None, table.diagonal() != label)]
    for mask, labels in enumerate(table):
        ways += [(mask, int(target), labels == target) for target in np.unique(labels) if target != label]
    overruling = (table == label).all(axis=1)
    found = []
    for size, (row, target, done) in product(masks.patch_sizes, ways):
        visible = shown(masks, size, row)
        open_at = (visible[overruling if row is None else ~done] > 0).all(axis=0)
        if open_at.any():
            to_fool = np.where((visible == 0) | done[:, None, None], 1, visible)[:, open_at]
            found.append(Goal(row, target, size, np.argwhere(open_at), to_fool.min(axis=0), int((~done).sum())))
    return sorted(found, key=lambda goal: goal.left)


def clean_tables(defense: PatchCleanser, images: Tensor) -> np.ndarray:
    """(N, masks, masks): the one- and two-mask labels of (N, 3, H, W) float images, every one computed."""
    n, k = len(images), len(defense.masks)
    i, j = np.triu_indices(k)
    windows = window_tensor(defense.masks, images.device)
    pairs = torch.cat([windows[i], windows[j]], dim=1).repeat(n, 1, 1)
    which = torch.arange(n, device=images.device).repeat_interleave(len(i))
    labels = [
        check_logits(defense.network(images[some], pair), len(some)).argmax(dim=1).cpu()
        for some, pair in zip(torch.split(which, defense.batch_size), torch.split(pairs, defense.batch_size), strict=True)
    ]
    table = np.empty((n, k, k), dtype=np.int64)
    table[:, i, j] = table[:, j, i] = torch.cat(labels).view(n, -1).numpy()
    return table


# --- The harness -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposal:
    """What an attack may say: image number ``image`` gets a patch of ``content`` (3, h, w) in [0, 1] at (top, left).

    (h, w) is one of the shapes that the masks are against.
    """

    image: int
    top: int
    left: int
    content: Tensor


class Harness:
    """Pastes what an attack proposes, checks that it is one patch, and asks the defended model.

    Args:
        pixels: (N, 3, H, W) uint8, the clean images.

    Raises ConfigError for a defense against two patches.
    """

    def __init__(self, defense: PatchCleanser, pixels: Tensor) -> None:
        check_one_patch(defense.masks)
        self.defense, self.pixels = defense, pixels

    def judge(self, proposals: list[Proposal]) -> list[tuple[Tensor, Verdict]]:
        """For each proposal the patched image (3, H, W) uint8, rounded to 8 bits before it is judged, and what the defense says of it.

        Raises ConfigError for a proposal that is not one patch with values in [0, 1].
        """
        if not proposals:
            return []
        patched = torch.stack([self._paste(proposal) for proposal in proposals])
        return list(zip(patched, self.defense.examine(as_float(patched)), strict=True))

    def _paste(self, proposal: Proposal) -> Tensor:
        shapes, (height, width) = self.defense.masks.patch_sizes, self.defense.masks.image_size
        content, top, left = proposal.content, proposal.top, proposal.left
        found = tuple(content.shape)
        if found not in [(3, *size) for size in shapes] or not (0 <= top <= height - found[1] and 0 <= left <= width - found[2]):
            raise ConfigError(
                f"attack: expected a patch of {' or '.join(map(by, shapes))} pixels within {by((height, width))}, found {found} at ({top}, {left})"
            )
        _, h, w = found
        if not content.is_floating_point() or not bool(((content >= 0) & (content <= 1)).all()):  # NaN is neither
            raise ConfigError("attack: expected finite values in [0, 1], found others")
        clean = self.pixels[proposal.image]
        patched = clean.clone()
        patched[:, top : top + h, left : left + w] = (content * 255).round().to(torch.uint8)
        changed = (patched != clean).any(dim=0).nonzero()
        if len(changed) and (changed.amax(0) - changed.amin(0) >= torch.tensor((h, w), device=changed.device)).any():
            raise ConfigError(f"attack: expected changes within one patch of {by((h, w))}, found some outside")
        return patched


def check_one_patch(masks: MaskSet) -> None:
    """Refuse masks against two patches: goals, places and harness are those of one."""
    if masks.patches != 1:
        raise ConfigError(
            f"attack: expected masks against one patch, found those against {masks.patches}; there is no attack with more yet"
        )


# --- The attack ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attempt:
    """One start on one image: place, goal (as in :class:`Goal`) and content (3, h, w).

    ``shortfall``: the share of its views that are not fooled yet, then by how many logits they miss on average.
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
    model: nn.Module, harness: Harness, labels: Tensor, ways: list[list[Goal]], config: AttackConfig, seeds: list[int]
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
            attempts = [climbed for part in parts for climbed in _climb(model, defense, images, labels, part, config.steps, step)]
            judged = harness.judge([Proposal(a.image, a.top, a.left, a.content) for a in attempts])
            for attempt, (patched, verdict) in zip(attempts, judged, strict=True):
                results[attempt.image].append(Result(attempt, patched, verdict, verdict.defended_label != int(labels[attempt.image])))
            attempts = [better for a in open_() for better in _better_half([attempt for attempt in attempts if attempt.image == a])]
            step /= 2
    return results


def _starts(masks: MaskSet, image: int, ways: list[Goal], config: AttackConfig, seed: int) -> list[Attempt]:
    """Random contents at random places among the most visible, to outvote and to disagree in turn, the nearest goals first."""
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
    kinds = [kind for kind in ([way for way in ways if way.row is None], [way for way in ways if way.row is not None]) if kind]
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
    model: nn.Module, defense: PatchCleanser, images: Tensor, labels: Tensor, attempts: list[Attempt], steps: int, step: float
) -> list[Attempt]:
    """The attempts with better contents: projected sign gradient with momentum, the step falling on a cosine."""
    masks, device = defense.masks, images.device
    windows = window_tensor(masks, device)
    views = [
        (a, i if attempt.row is None else attempt.row, i, -1 if attempt.target is None else attempt.target)
        for a, attempt in enumerate(attempts)
        for i in np.flatnonzero(shown(masks, attempt.patch_size, attempt.row)[:, attempt.top, attempt.left]).tolist()
    ]
    which, first, second, target = torch.tensor(views, device=device).T
    pairs = torch.cat([windows[first], windows[second]], dim=1)
    image = torch.tensor([attempt.image for attempt in attempts], device=device)
    subject = torch.where(target < 0, labels[image[which]], target)[:, None]

    def shortfall(logits: Tensor, part: slice) -> Tensor:
        """How far the target is from leading all other labels by MARGIN; without one, the true label from trailing another by it."""
        its = logits.gather(1, subject[part])[:, 0]
        others = logits.scatter(1, subject[part], -torch.inf).amax(1)
        return torch.relu(torch.where(target[part] < 0, its - others, others - its) + MARGIN)

    patches = torch.tensor(
        [[[rows.start, columns.start, rows.stop, columns.stop]] for rows, columns in (a.box for a in attempts)], device=device
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
