"""An adaptive attack on a defense by evidence: it knows the windows, the evidence and the rule.

What a patch at a place can do is bounded by the windows that it reaches, and the rules are exact: evidence
that turns the answer exists there if and only if the slack at the place is below 0. So the attack goes where
the slack is below 0, the weakest places first, and wants the rival of each place: in every window that the
patch reaches, the rival shall lead the true label. A certified image has no such place; it is attacked at its
weakest ones all the same. Contents climb as those against PatchCleanser (``climb.py``) and are judged by the
same harness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from ..data.source import as_float
from ..defenses.contract import CertifiedDefense
from ..defenses.evidence.cells import CellWindows
from ..defenses.evidence.defense import WindowDefense
from ..geometry.patch import Size
from ..geometry.reach import every_place
from .cells import look_at_cells, views_of_cells
from .climb import AttackConfig, Attempt, Result, Victim, Views, climb
from .harness import Harness

LEAD = 3.0  # By so many logits the rival shall lead in a window, which turns confidences too, not votes only.
DRAWS = 2  # Contents that are drawn for each start.


@dataclass(frozen=True)
class Kind:
    """Places of the patch that reach the same windows.

    Attributes:
        windows: (reached,) the numbers of these windows.
        patch_size: the shape of the patch.
        places: (places, 2) its top and left.
    """

    windows: np.ndarray
    patch_size: Size
    places: np.ndarray


def by_windows(defense: CertifiedDefense) -> TypeGuard[WindowDefense]:
    """Whether this attack is for a defense."""
    return isinstance(defense, WindowDefense)


def attack_windows(
    harness: Harness[WindowDefense], labels: Tensor, config: AttackConfig, seeds: list[int]
) -> list[tuple[int, list[Result]]]:
    """Attack every image of the harness until its answer is wrong or its starts are used up.

    Args:
        labels: (N,) int64, the true labels. seeds: the seed of each image.

    Returns:
        for each image at how many kinds of places evidence could turn the answer, and all that was judged.
    """
    defense = harness.defense
    kinds = kinds_of(defense)
    with torch.inference_mode():
        logits, _ = defense.windows.look(as_float(harness.pixels))
    aims = [
        _aims(defense, kinds, one, label) for one, label in zip(logits.numpy(), labels.tolist(), strict=True)
    ]
    open_at = [sum(slack < 0 for slack, _, _ in of_image) for of_image in aims]
    starts = [
        _starts(image, kinds, *one, config, seed)
        for image, (one, seed) in enumerate(zip(zip(aims, open_at, strict=True), seeds, strict=True))
    ]
    reached = {
        (size, int(top), int(left)): kind.windows
        for kind in kinds
        for size in [kind.patch_size]
        for top, left in kind.places
    }
    victim = _victim(harness, labels, reached)
    return list(zip(open_at, climb(victim, starts, config.steps), strict=True))


def _victim(harness: Harness[WindowDefense], labels: Tensor, reached: dict[Any, np.ndarray]) -> Victim:
    """How the windows that a patch reaches are looked at: one after the other, or all cells in one pass."""
    defense = harness.defense
    windows = defense.windows
    if isinstance(windows, CellWindows):
        return Victim(
            harness,
            labels,
            look_at_cells(windows),
            windows.batch_size,
            lambda attempts: views_of_cells(defense, reached, labels, attempts),
        )
    return Victim(
        harness,
        labels,
        lambda images, numbers: windows.trace(images, torch.arange(len(images)), numbers),
        windows.batch_size,
        lambda attempts: _views(reached, labels, attempts),
    )


def kinds_of(defense: WindowDefense) -> list[Kind]:
    """Every place of each shape of the patch, by the windows that it reaches."""
    found: dict[tuple[Size, bytes], tuple[np.ndarray, list[tuple[int, int]]]] = {}
    for size in defense.threat.patch_sizes:
        for place, row in every_place(defense.windows.sights, defense.windows.image_size, size):
            found.setdefault((size, row.tobytes()), (row, []))[1].append((place.top, place.left))
    return [Kind(np.flatnonzero(row), size, np.array(places)) for (size, _), (row, places) in found.items()]


Aim = tuple[int, int, int]  # the slack at a kind of places, the number of the kind, and the rival there


def _aims(defense: WindowDefense, kinds: list[Kind], logits: np.ndarray, label: int) -> list[Aim]:
    """What the label has to spare at each kind of places, the weakest first."""
    evidence, found = defense.evidence.of(logits), []
    for number, kind in enumerate(kinds):
        touch = np.zeros((1, len(logits)), dtype=bool)
        touch[0, kind.windows] = True
        least = defense.rule.slack(evidence, label, touch)
        found.append((least.slack, number, least.rival))
    return sorted(found)


def _starts(
    image: int, kinds: list[Kind], aims: list[Aim], open_at: int, config: AttackConfig, seed: int
) -> list[list[Attempt]]:
    """The draws for each start: random contents at the weakest places in turn, every second start at any
    place that is open. At a certified image, where none is, the weakest ones are tried."""
    rng = np.random.default_rng(seed)
    number = config.restarts if open_at else config.certified_restarts
    among = aims[: open_at or len(aims)]
    chosen = [
        among[start // 2 % len(among)] if start % 2 == 0 else among[rng.integers(len(among))]
        for start in range(number)
    ]
    return [[_draw(image, kinds[kind], rival, rng) for _ in range(DRAWS)] for _, kind, rival in chosen]


def _draw(image: int, kind: Kind, rival: int, rng: np.random.Generator) -> Attempt:
    """A random content at one of the places of a kind."""
    top, left = kind.places[rng.integers(len(kind.places))].tolist()
    content = torch.from_numpy(rng.random((3, *kind.patch_size), dtype=np.float32))
    return Attempt(image, top, left, None, rival, content)


def _views(reached: dict[Any, np.ndarray], labels: Tensor, attempts: list[Attempt]) -> Views:
    """The windows that each attempt's patch reaches, in all of which its rival shall lead the true label."""
    views = [
        (a, int(window), attempt.target)
        for a, attempt in enumerate(attempts)
        for window in reached[attempt.patch_size, attempt.top, attempt.left]
    ]
    which, windows, target = torch.tensor(views, device=labels.device).T
    image = torch.tensor([attempt.image for attempt in attempts], device=labels.device)
    label = labels[image[which]]

    def shortfall(logits: Tensor, part: slice) -> Tensor:
        true, rival = (logits.gather(1, each[part, None])[:, 0] for each in (label, target))
        return torch.relu(true - rival + LEAD)

    return Views(which, windows, shortfall)
