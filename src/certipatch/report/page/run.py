"""TODO."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ...errors import RecordsError
from ...records.read import read_records
from ...records.schema import Record
from ..certification import Summary

PAIRS = 10  # of the most frequent failing ones


@dataclass(frozen=True)
class Run:
    """A certification as the page shows it."""

    summary: Summary
    records: list[Record]

    @property
    def experiment(self) -> dict[str, Any]:
        experiment: dict[str, Any] = self.summary.manifest["experiment"]
        return experiment

    @property
    def masks(self) -> list[list[list[int]]]:
        masks: list[list[list[int]]] = self.experiment["masks"]["windows"]
        return masks

    @property
    def classes(self) -> list[str]:
        """Names of labels; a damaged manifest has none, then numbers stand for them."""
        names = self.experiment["model"].get("classes")
        return [str(name) for name in names] if isinstance(names, list) else []


def _records(summary: Summary) -> list[Record]:
    records, masks = (
        read_records(Path(summary.folder)),
        len(summary.manifest["experiment"]["masks"]["windows"]),
    )
    for record in records:
        if record.failing_pair is not None and not all(0 <= mask < masks for mask in record.failing_pair):
            raise RecordsError(
                f"{summary.folder}: image {record.index}: expected a pair of its {masks} masks, found "
                f"{record.failing_pair}"
            )
    return records


def _dict(value: Any) -> dict[str, Any]:
    """What a manifest says beside its experiment is shown, not relied on."""
    return value if isinstance(value, dict) else {}


def _seconds(manifest: dict[str, Any]) -> float | None:
    """From the start to the end of a run, pauses before a resume included."""
    try:
        return (
            datetime.fromisoformat(manifest["finished"]["at"]) - datetime.fromisoformat(manifest["started"])
        ).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None
