"""Minority Reports: detection of a patch, on labels and confidences only: no network, no pixels.

Source: Minority Reports (McCoyd et al., 2020), with the masks of PatchCleanser, each of which covers the
patch at some places, in place of the paper's voting grid, which does not hold at the border (PatchCleanser's
notes on it). The answer is the undefended label F(x) and K one-mask labels, with their confidences (softmax
of the best label), may raise an alarm against it.

The theorem. *Alarm at tau*: a one-mask label other than F(x) with a confidence above tau. *Certified at tau*
for (x, y): every one-mask view of x answers y with a confidence above tau. Put any patch on a certified x: a
mask that covers it shows x alone, so its view still answers y with a confidence above tau. If F is fooled
into another label than y, that view raises the alarm. So the answer is y or there is an alarm. Both
comparisons are strict: a confidence of exactly tau raises no alarm, and certifies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import ConfigError


def dissent(vanilla_label: int, labels: Sequence[int], confidences: Sequence[float]) -> float | None:
    """The largest confidence of a one-mask label other than F(x), or None: an alarm is raised at every
    threshold below it."""
    others = [
        confidence for label, confidence in zip(labels, confidences, strict=True) if label != vanilla_label
    ]
    return max(others, default=None)


def agreement(true_label: int, labels: Sequence[int], confidences: Sequence[float]) -> float | None:
    """The smallest confidence if every one-mask label is the true one, else None: certified at every
    threshold below it."""
    return min(confidences) if all(label == true_label for label in labels) else None


def above(confidence: float | None, threshold: float) -> bool:
    """Is there an alarm (of a :func:`dissent`), or a certificate (of an :func:`agreement`), at the
    threshold? Both are compared in double precision, whatever their types are."""
    return confidence is not None and float(confidence) > float(threshold)


def check_threshold(threshold: float) -> float:
    """The threshold in double precision, in which it is compared. Raises ConfigError if it is no share from 0
    to 1."""
    number = hasattr(threshold, "__float__")
    if not number or not 0 <= float(threshold) <= 1:  # NaN is not either
        shown = f"{threshold:g}" if number else repr(threshold)
        raise ConfigError(f"threshold {shown}: expected a confidence from 0 to 1")
    return float(threshold)
