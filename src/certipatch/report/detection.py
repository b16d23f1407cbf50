"""Every number of a report on detection, computed from records: a sweep over thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ..defenses.minority_reports.algorithm import above, check_threshold
from ..errors import ConfigError, RecordsError, one_line
from ..geometry.patch import threat_of
from ..records.manifest import read_manifest
from ..records.read import read_images
from ..records.schema import DetectionRecord
from .certification import Share, against, strategy

THRESHOLDS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)


CAPTION = (
    "Detection (Minority Reports): % of images, fraction, 95 % interval. threshold: an alarm is raised by a "
    "one-mask view that is more "
    "confident than this in another label; clean: the undefended model is right and there is no alarm; "
    "false alarms: an alarm without a "
    "patch; certified detection: under every patch the answer is right or there is an alarm, proven."
)


@dataclass(frozen=True)
class AtThreshold:
    """What detection is worth at one threshold.

    Attributes:
        clean_accuracy: F(x) is right and there is no alarm; false_alarms: there is an alarm, though there is
            no patch;
            certified_detection_accuracy: under every patch the answer is the true label or there is an alarm,
                proven.
    """

    threshold: float
    clean_accuracy: Share
    false_alarms: Share
    certified_detection_accuracy: Share

    def to_json(self) -> dict[str, Any]:
        shares = {name: value.to_json() for name, value in vars(self).items() if isinstance(value, Share)}
        return {"threshold": self.threshold, **shares}


@dataclass(frozen=True)
class DetectionSummary:
    """What the records of one ``detect`` say. ``complete``: every image has its record; ``unreadable`` images
    count as wrong."""

    folder: str
    manifest: dict[str, Any]
    vanilla_accuracy: Share
    sweep: tuple[AtThreshold, ...]
    unreadable: int
    passes: int
    complete: bool

    def to_json(self) -> dict[str, Any]:
        experiment = self.manifest["experiment"]
        return {
            "folder": self.folder,
            "kind": "detect",
            "complete": self.complete,
            "model": experiment["model"]["arch"],
            "strategy": strategy(self.manifest),
            "data": experiment["data"],
            **threat_of(experiment["masks"]),
            "masks_per_axis": experiment["masks"]["masks_per_axis"],
            "vanilla_accuracy": self.vanilla_accuracy.to_json(),
            "thresholds": [one.to_json() for one in self.sweep],
            "unreadable": self.unreadable,
            "passes": self.passes,
        }


def parse_thresholds(text: str | None) -> tuple[float, ...]:
    """``"0,0.5,0.9"`` -> thresholds in that order, each once; None: the usual ones. Raises ConfigError."""
    if text is None:
        return THRESHOLDS
    try:
        return tuple(dict.fromkeys(check_threshold(float(part)) for part in text.split(",")))
    except ValueError:
        raise ConfigError(
            f"thresholds {text!r}: expected confidences from 0 to 1, such as 0,0.5,0.9"
        ) from None


def summarize_detection(folder: str | Path, thresholds: tuple[float, ...] = THRESHOLDS) -> DetectionSummary:
    """The summary of a folder that ``detect`` wrote; also of one that is not complete yet. Raises
    RecordsError."""
    manifest = read_manifest(Path(folder))
    if manifest["kind"] != "detect":
        raise RecordsError(f"{folder}: expected records of detect, found those of {manifest['kind']}")
    records = read_images(Path(folder), DetectionRecord)
    if not records:
        raise RecordsError(f"{folder}: no image has been examined yet; continue it with detect --resume")
    n, images = len(records), manifest["experiment"]["data"]["images"]
    if n > images or records[-1].index >= images:
        raise RecordsError(
            f"{folder}: holds records of more images than the {images} that were examined; restore it or "
            "detect again"
        )
    return DetectionSummary(
        folder=str(folder),
        manifest=manifest,
        vanilla_accuracy=Share(sum(r.vanilla_label == r.label for r in records), n),
        sweep=tuple(at_threshold(records, threshold) for threshold in thresholds),
        unreadable=sum(r.error is not None for r in records),
        passes=sum(r.passes for r in records),
        complete=n == images,
    )


def at_threshold(records: list[DetectionRecord], threshold: float) -> AtThreshold:
    n, alarms = len(records), [above(r.dissent, threshold) for r in records]
    return AtThreshold(
        threshold,
        clean_accuracy=Share(
            sum(r.vanilla_label == r.label and not alarm for r, alarm in zip(records, alarms, strict=True)), n
        ),
        false_alarms=Share(sum(alarms), n),
        certified_detection_accuracy=Share(sum(above(r.agreement, threshold) for r in records), n),
    )


def detection_table(summaries: list[DetectionSummary]) -> Table:
    """The sweeps of several folders, 80 columns wide, a threshold a row."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left", caption=CAPTION)
    if len({s.manifest["experiment"]["data"]["fingerprint"] for s in summaries}) > 1:
        out.caption = f"{CAPTION} These runs are not of the same images."
    out.add_column("run, model, training", overflow="fold", min_width=22)
    for heading in ("patch", "k", "thres-\nhold", "clean", "false\nalarms", "certified\ndetection"):
        out.add_column(heading, justify="right")
    for s in summaries:
        experiment = s.manifest["experiment"]
        state = (
            ""
            if s.complete
            else f" (incomplete: {s.vanilla_accuracy.images} of {experiment['data']['images']} images)"
        )
        what = (
            "\n".join(
                escape(one_line(text))
                for text in (f"{s.folder}{state}", experiment["model"]["arch"], strategy(s.manifest))
            ),
            against(experiment["masks"]),
            str(experiment["masks"]["masks_per_axis"]),
        )
        for one in s.sweep:
            shares = one.clean_accuracy, one.false_alarms, one.certified_detection_accuracy
            out.add_row(
                *(what if one is s.sweep[0] else ("", "", "")),
                f"{one.threshold:g}",
                *(share.stacked() for share in shares),
            )
    return out
