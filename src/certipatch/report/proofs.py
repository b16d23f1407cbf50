"""Answers that are proven without their label: how many of all, and how many of those are wrong.

The theorem is that of ``unchangeable`` and ``forgeable`` in ``defenses/patchcleanser/algorithms.py``. All
shares are of all images: among the proven answers alone an attacker chooses which right ones lose it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..records.read import Folder
from ..records.schema import PatchCleanserRecord, Record
from .shares import Share


@dataclass(frozen=True)
class Proofs:
    """What a certification with proofs says of answers in use, where nobody knows the label.

    Attributes:
        proven: the answer is proven unchangeable.
        wrong: it is, and it is wrong.
        forgeable: under some patch an answer may be proven and wrong; no attack does so on more images.
    """

    proven: Share
    wrong: Share
    forgeable: Share

    @classmethod
    def of(cls, folder: Folder[Record], *, min_margin: float) -> Proofs | None:
        """None of a folder without proofs.

        Args:
            min_margin: the least margin, in logits, of what counts as proven. An image with a smaller one
                counts as forgeable unless it is certified, for rounding could make it so.
        """
        if not folder.manifest.certification.prove or not folder.records:
            return None
        least, records = min_margin, folder.records
        proven = [_is_proven(record, least) for record in records]
        wrong = [record.defended_label != record.label for record in records]
        return cls(
            Share.of(proven),
            Share.of(one and other for one, other in zip(proven, wrong, strict=True)),
            Share.of(_may_be_forged(record, least) for record in records),
        )

    def __str__(self) -> str:
        return (
            f"proven without a label: {self.proven} of all answers; wrong ones among them: {self.wrong} of "
            f"all images; under any attack at most {self.forgeable}"
        )

    def to_json(self) -> dict[str, Any]:
        """``proven``, ``wrong`` and ``forgeable``, each as a share of all images."""
        return {
            "proven": self.proven.to_json(),
            "wrong": self.wrong.to_json(),
            "forgeable": self.forgeable.to_json(),
        }


def _is_proven(record: Record, least: float) -> bool:
    if not isinstance(record, PatchCleanserRecord) or not record.unchangeable:
        return False
    return (record.margin or 0.0) >= least


def _may_be_forged(record: Record, least: float) -> bool:
    """Whether a wrong answer may be proven; an image that cannot be read has no answer."""
    if not isinstance(record, PatchCleanserRecord) or record.error is not None:
        return False
    narrow = record.margin is None or record.margin < least
    return bool(record.forgeable) or (narrow and not record.certified)
