"""Every number of a report, computed from records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from scipy.stats import binomtest

from ..errors import RecordsError, one_line
from ..geometry.patch import threat_of, threat_text
from ..records.manifest import read_manifest
from ..records.read import read_records, read_written
from ..records.schema import Record

CAPTION = (
    "% of images, fraction, 95 % interval. vanilla: the undefended model is right; "
    "clean: the defended model is right; certified robust: it stays right under every patch, proven."
)


@dataclass(frozen=True)
class Share:
    """A share of images, always with its fraction and 95 % Wilson interval."""

    count: int
    images: int

    @property
    def interval(self) -> tuple[float, float]:
        low, high = binomtest(self.count, self.images).proportion_ci(0.95, method="wilson")
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.count / self.images:.1f} % ({self.count}/{self.images}; {100 * low:.1f}-{100 * high:.1f})"

    def stacked(self) -> str:
        low, high = self.interval
        return f"{100 * self.count / self.images:.1f} %\n{self.count}/{self.images}\n{100 * low:.1f}-{100 * high:.1f}"

    def to_json(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "images": self.images,
            "share": self.count / self.images,
            "interval_95": self.interval,
        }


@dataclass(frozen=True)
class Summary:
    """What one certification says.

    Attributes:
        vanilla_accuracy: the undefended model is right; clean_accuracy: the defended model is right on the
            clean image; certified_robust_accuracy: the defended model is right under every patch, proven.
        unreadable: images that count as wrong in all three because they could not be read.
        passes: forward passes of the certification, for all images.
        complete: every image has its record.
    """

    folder: str
    manifest: dict[str, Any]
    vanilla_accuracy: Share
    clean_accuracy: Share
    certified_robust_accuracy: Share
    unreadable: int
    passes: int
    complete: bool
    min_margin: float = 0.0

    def to_json(self) -> dict[str, Any]:
        experiment = self.manifest["experiment"]
        return {
            "folder": self.folder,
            "complete": self.complete,
            "model": experiment["model"]["arch"],
            "strategy": strategy(self.manifest),
            "inference": experiment.get("inference", "double-masking"),
            "data": experiment["data"],
            **threat_of(experiment["masks"]),
            "masks_per_axis": experiment["masks"]["masks_per_axis"],
            "vanilla_accuracy": self.vanilla_accuracy.to_json(),
            "clean_accuracy": self.clean_accuracy.to_json(),
            "certified_robust_accuracy": self.certified_robust_accuracy.to_json(),
            "unreadable": self.unreadable,
            "passes": self.passes,
            "min_margin": self.min_margin,
        }


def summarize(folder: str | Path, *, min_margin: float = 0.0) -> Summary:
    """The summary of a folder that ``certify`` wrote; also of one that is not complete yet.

    Args:
        min_margin: count only certificates whose smallest logit margin is at least this.

    Raises:
        RecordsError: no records, or damaged ones.
    """
    manifest = read_manifest(Path(folder))
    if manifest["kind"] != "certify":
        raise RecordsError(
            f"{folder}: expected records of certify, found those of {manifest['kind']}; run certify on it "
            "first"
        )
    records = read_records(Path(folder))
    if not records:
        raise RecordsError(f"{folder}: no image has been certified yet; continue it with certify --resume")
    images = _images(Path(folder), manifest)
    if len(records) > images or records[-1].index >= images:
        raise RecordsError(
            f"{folder}: holds records of more images than the {images} that were certified; restore it or "
            "certify again"
        )
    return Summary(
        folder=str(folder),
        manifest=manifest,
        **accuracies(records, min_margin=min_margin),
        unreadable=sum(r.error is not None for r in records),
        passes=sum(r.passes for r in records),
        complete=len(records) == images,
        min_margin=min_margin,
    )


def _images(folder: Path, manifest: dict[str, Any]) -> int:
    """How many images the certification is of."""
    try:
        return int(manifest["experiment"]["data"]["images"])
    except (KeyError, TypeError, ValueError) as error:
        raise RecordsError(f"{folder}: its manifest lacks {error}; restore it or certify again") from error


def accuracies(records: list[Record], *, min_margin: float = 0.0) -> dict[str, Share]:
    n = len(records)
    return {
        "vanilla_accuracy": Share(sum(r.vanilla_label == r.label for r in records), n),
        "clean_accuracy": Share(sum(r.defended_label == r.label for r in records), n),
        "certified_robust_accuracy": Share(
            sum(r.certified and (r.margin or 0.0) >= min_margin for r in records), n
        ),
    }


def strategy(manifest: dict[str, Any]) -> str:
    trained = manifest["experiment"].get("trained")
    if not trained:
        return "not fine-tuned"
    every = f" (searched in every {trained['search_every']}.)" if trained.get("search_every") else ""
    return f"{trained['strategy']}, {trained['epochs']} epochs{every}"


def training_cost(folder: str | Path) -> float:
    """Forward-equivalents that a training run spent for each image of its training set, over all epochs."""
    lines = read_written(Path(folder), "epochs.jsonl")
    return sum(line["forward_equivalents"] / line["images"] for line in lines)


def table(summaries: list[Summary]) -> Table:
    """The table of several certifications, 80 columns wide."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left", caption=CAPTION)
    if len({s.manifest["experiment"]["data"]["fingerprint"] for s in summaries}) > 1:
        out.caption = f"{CAPTION} These runs are not of the same images."
    for margin in sorted({s.min_margin for s in summaries if s.min_margin}):
        out.caption = f"{out.caption} Counted: certificates with a logit margin of at least {margin:g}."
    out.add_column("run, model, training", overflow="fold", min_width=22)
    for heading in ("patch", "k", "vanilla", "clean", "certified\nrobust", "passes/\nimage"):
        out.add_column(heading, justify="right")
    for s in summaries:
        experiment = s.manifest["experiment"]
        done = s.certified_robust_accuracy.images
        state = "" if s.complete else f" (incomplete: {done} of {experiment['data']['images']} images)"
        inference = ["challenger masking"] if experiment.get("inference") == "challenger" else []
        out.add_row(
            "\n".join(
                escape(one_line(text))
                for text in (
                    f"{s.folder}{state}",
                    experiment["model"]["arch"],
                    strategy(s.manifest),
                    *inference,
                )
            ),
            against(experiment["masks"]),
            str(experiment["masks"]["masks_per_axis"]),
            *(
                share.stacked()
                for share in (s.vanilla_accuracy, s.clean_accuracy, s.certified_robust_accuracy)
            ),
            f"{s.passes / s.certified_robust_accuracy.images:.0f}",
        )
    return out


def against(masks: dict[str, Any]) -> str:
    """The patches of a manifest in a column of the table: shapes, image, and the largest share of the
    area."""
    h, w = masks["image_size"]
    return (
        threat_text(**threat_of(masks)).replace("+", "+\n") + f" of\n{h}x{w}\n{percent_of_image(masks):.1f} %"
    )


def percent_of_image(masks: dict[str, Any]) -> float:
    """The largest share of the image that the attacker of a manifest has, in %."""
    threat, (h, w) = threat_of(masks), masks["image_size"]
    shapes = (threat["patch_size"], *threat.get("other_patch_sizes", ()))
    return 100 * float(threat.get("patches", 1) * max(ph * pw for ph, pw in shapes)) / (h * w)
