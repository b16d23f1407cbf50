"""Evidence is integers, and sums of it are exact: what every rule on it has to be sure of.

*Evidence* is an int64 array (windows, classes) that depends, row by row, on what one window shows. It is
rounded once and summed as integers, because floats break the theorems: published code takes the evidence of
some windows away from a float32 total, and a single window at 3e8, which an attacker may write, leaves 0.0 of
the 6.4 that the others hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...errors import SoundnessError

EXACT = 2**53  # below this, float64 has every integer, so a product of float64 matrices is exact


@dataclass(frozen=True)
class Weakest:
    """How much an answer has to spare where it has least.

    Attributes:
        slack: certified if this is 0 or more.
        place: the number of the set of windows in :class:`certipatch.geometry.reach.Reach` where it is.
        rival: the class that is nearest to winning there.
    """

    slack: int
    place: int
    rival: int


def weakest(slack: np.ndarray, label: int) -> Weakest:
    """The smallest entry of a slack (sets, classes) over the classes other than the label."""
    others = np.array([c for c in range(slack.shape[1]) if c != label])
    place, column = np.unravel_index(slack[:, others].argmin(), (len(slack), len(others)))
    rival = int(others[column])
    return Weakest(int(slack[place, rival]), int(place), rival)


def check_evidence(evidence: np.ndarray, label: int | None = None) -> None:
    """Refuse evidence that is not int64 of one or more windows for two or more classes, or too large to sum
    exactly; and a label that is none of its classes.

    Raises SoundnessError.
    """
    if evidence.dtype != np.int64 or evidence.ndim != 2 or len(evidence) < 1 or evidence.shape[1] < 2:
        raise SoundnessError(
            "evidence: expected int64 (1 or more windows, 2 or more classes), found "
            f"{evidence.dtype} {evidence.shape}; round it once, before it is summed"
        )
    largest = max(-int(evidence.min()), int(evidence.max()))
    if 4 * largest * len(evidence) >= EXACT:  # every rule adds and subtracts at most four such sums
        raise SoundnessError(
            f"evidence: expected sums over {len(evidence)} windows below 2^51, found entries up to "
            f"{largest}; clip it"
        )
    if label is not None and not 0 <= label < evidence.shape[1]:
        raise SoundnessError(
            f"label {label}: expected one of the {evidence.shape[1]} classes of the evidence"
        )


def check_masks(touch: np.ndarray, masks: np.ndarray) -> None:
    """Refuse masks (masks, windows) bool that do not hide whatever a patch can reach.

    Raises SoundnessError.
    """
    covered = covers(touch, masks).any(axis=1)
    if not covered.all():
        reached = np.flatnonzero(touch[int(covered.argmin())]).tolist()
        raise SoundnessError(
            f"masks: expected one that hides the windows {reached}, which a patch can reach, found none; use "
            "what a patch of the stated size can reach as masks"
        )


def covers(touch: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """(sets, masks) bool: does the mask hide every window of the set?"""
    return product(touch, ~masks) == 0 if len(masks) else np.zeros((len(touch), 0), dtype=bool)


def product(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """``rows @ columns.T`` of integers, exact and as fast as floats, for sums below 2^53."""
    exact = rows.astype(np.float64, copy=False) @ columns.astype(np.float64, copy=False).T
    return exact.astype(np.int64)
