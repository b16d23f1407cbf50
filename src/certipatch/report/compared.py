"""Several folders of records beside each other: what ``report`` prints and a page shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..records.read import Folder
from ..records.schema import AttackRecord
from .attack import certification_of, summarize_attack
from .certification import Summary, summarize
from .detection import THRESHOLDS, DetectionSummary, summarize_detection


@dataclass(frozen=True)
class AttackSummary:
    """An attack: its manifest and records, and what they say."""

    folder: Folder[AttackRecord]
    summary: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The summary as ``report --json`` prints it."""
        return self.summary


@dataclass(frozen=True)
class Compared:
    """Certifications, sweeps of detection and attacks, in the order in which their folders were named."""

    every: tuple[Summary | DetectionSummary | AttackSummary, ...]

    @cached_property
    def summaries(self) -> list[Summary]:
        """The certifications; a page is about the first."""
        return [one for one in self.every if isinstance(one, Summary)]

    @cached_property
    def sweeps(self) -> list[DetectionSummary]:
        """The folders of detection."""
        return [one for one in self.every if isinstance(one, DetectionSummary)]

    @cached_property
    def attacks(self) -> list[AttackSummary]:
        """The attacks."""
        return [one for one in self.every if isinstance(one, AttackSummary)]

    def to_json(self) -> list[dict[str, Any]]:
        """What ``report --json`` prints."""
        return [one.to_json() for one in self.every]


def compare(
    folders: Sequence[Folder[Any]],
    thresholds: tuple[float, ...] = THRESHOLDS,
    min_margin: float | None = None,
) -> Compared:
    """Each folder summarised by what it is of; an attack is compared with its certification, if that is
    among them.

    Args:
        thresholds: of detection. min_margin: as of :func:`certipatch.report.certification.summarize`.

    Raises RecordsError for damaged records, and an attack that says otherwise than its certification.
    """
    certifications = [folder for folder in folders if folder.manifest.kind == "certify"]

    def summarized(folder: Folder[Any]) -> Summary | DetectionSummary | AttackSummary:
        if folder.manifest.kind == "attack":
            return AttackSummary(folder, summarize_attack(folder, certification_of(folder, certifications)))
        if folder.manifest.kind == "detect":
            return summarize_detection(folder, thresholds)
        return summarize(folder, min_margin=min_margin)

    return Compared(tuple(map(summarized, folders)))
