"""What detection is worth at each threshold, computed from its records, and the table of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ..defenses.minority_reports.algorithm import above, check_threshold
from ..errors import ConfigError, RecordsError, one_line
from ..records.experiment import Certification
from ..records.read import Folder
from ..records.schema import DetectionRecord
from .certification import (
    against,
    environments,
    in_other_environments,
    other_images,
    strategy,
    threat_of_certification,
    totals,
)
from .shares import Share

THRESHOLDS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99)
CAPTION = (
    "Detection (Minority Reports): % of images, fraction, 95 % interval. threshold: an alarm is raised by a "
    "one-mask view that is more confident than this in another label; clean: the undefended model is right "
    "and there is no alarm; false alarms: an alarm without a patch; certified detection: under every patch "
    "the answer is right or there is an alarm, proven."
)


@dataclass(frozen=True)
class AtThreshold:
    """What detection is worth at one threshold.

    Attributes:
        clean_accuracy: F(x) is right and there is no alarm.
        false_alarms: there is an alarm, though there is no patch.
        certified_detection_accuracy: under every patch the answer is the true label or there is an alarm,
            proven.
    """

    threshold: float
    clean_accuracy: Share
    false_alarms: Share
    certified_detection_accuracy: Share

    @property
    def shares(self) -> dict[str, Share]:
        """The three shares by their names."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Share)}

    def to_json(self) -> dict[str, Any]:
        """The threshold and the shares."""
        return {
            "threshold": self.threshold,
            **{name: share.to_json() for name, share in self.shares.items()},
        }


@dataclass(frozen=True)
class DetectionSummary:
    """What the records of one ``detect`` say.

    Attributes:
        folder: its manifest and records.
        sweep: what it is worth at each threshold.
        unreadable: images that count as wrong because they could not be read.
        passes: forward passes, for all images.
        complete: every image has its record.
    """

    folder: Folder[DetectionRecord]
    vanilla_accuracy: Share
    sweep: tuple[AtThreshold, ...]
    unreadable: int
    passes: int
    complete: bool

    @property
    def name(self) -> str:
        """The folder as it was named."""
        return str(self.folder.path)

    @property
    def experiment(self) -> Certification:
        """Everything that can change a result."""
        return self.folder.manifest.certification

    def to_json(self) -> dict[str, Any]:
        """The summary as ``report --json`` prints it."""
        return {
            "folder": self.name,
            "kind": "detect",
            "complete": self.complete,
            "model": self.experiment.model.arch,
            "strategy": strategy(self.experiment),
            "data": self.folder.manifest.stated["data"],
            **threat_of_certification(self.experiment),
            "masks_per_axis": self.experiment.masks_per_axis,
            "vanilla_accuracy": self.vanilla_accuracy.to_json(),
            "thresholds": [one.to_json() for one in self.sweep],
            "unreadable": self.unreadable,
            "passes": self.passes,
            **environments(self.folder.manifest),
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


def summarize_detection(
    folder: Folder[DetectionRecord], thresholds: tuple[float, ...] = THRESHOLDS
) -> DetectionSummary:
    """The summary of a folder that ``detect`` wrote; also of one that is not complete yet. Raises
    RecordsError."""
    kind, records = folder.manifest.kind, folder.records
    if kind != "detect":
        raise RecordsError(f"{folder.path}: expected records of detect, found those of {kind}")
    rest = totals(folder, "examined")
    return DetectionSummary(
        folder=folder,
        vanilla_accuracy=Share.of(record.vanilla_label == record.label for record in records),
        sweep=tuple(at_threshold(records, threshold) for threshold in thresholds),
        **rest,
    )


def at_threshold(records: Sequence[DetectionRecord], threshold: float) -> AtThreshold:
    """What detection is worth on these images at one threshold."""
    alarms = [above(record.dissent, threshold) for record in records]
    right = [record.vanilla_label == record.label for record in records]
    return AtThreshold(
        threshold,
        clean_accuracy=Share.of(
            is_right and not alarm for is_right, alarm in zip(right, alarms, strict=True)
        ),
        false_alarms=Share.of(alarms),
        certified_detection_accuracy=Share.of(above(record.agreement, threshold) for record in records),
    )


def detection_table(summaries: Sequence[DetectionSummary]) -> Table:
    """The sweeps of several folders, 80 columns wide, a threshold a row."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    images = other_images([summary.experiment for summary in summaries])
    elsewhere = in_other_environments(summary.folder.manifest for summary in summaries)
    out.caption = escape(" ".join([CAPTION, *images, *elsewhere]))
    out.add_column("run, model, training", overflow="fold", min_width=22)
    for heading in ("patch", "k", "thres-\nhold", "clean", "false\nalarms", "certified\ndetection"):
        out.add_column(heading, justify="right")
    for summary in summaries:
        what = _what(summary)
        for one in summary.sweep:
            shares = (share.stacked() for share in one.shares.values())
            out.add_row(*what, f"{one.threshold:g}", *shares)
            what = ("", "", "")  # below its first row
    return out


def _what(summary: DetectionSummary) -> tuple[str, str, str]:
    experiment, done = summary.experiment, summary.vanilla_accuracy.images
    state = "" if summary.complete else f" (incomplete: {done} of {experiment.data.images} images)"
    words = f"{summary.name}{state}", experiment.model.arch, strategy(experiment)
    return (
        "\n".join(escape(one_line(text)) for text in words),
        against(experiment),
        str(experiment.masks_per_axis),
    )
