"""The three accuracies of a certification, computed from its records, and the table that compares several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ..errors import RecordsError, one_line
from ..geometry.patch import Threat, by
from ..records.experiment import Certification
from ..records.manifest import Manifest
from ..records.read import Folder, read_written
from ..records.schema import EPOCHS, Record
from .places import ByPlace, ShareOfPlaces
from .proofs import Proofs
from .shares import Share

CAPTION = (
    "% of images, fraction, 95 % interval. vanilla: the undefended model is right; clean: the defended "
    "model is right; certified robust: it stays right under every patch, proven."
)


SIZE_KNOWN = (
    "size known: the defense answers by the size of the patch that it reckons with; without, one answer is "
    "certified against every size."
)

BY_PLACE = (
    "certified share of places: of an image, the places of the patch where it stays right under any content, "
    "proven; the mean over the images, for a place that is not the attacker's choice."
)


@dataclass(frozen=True)
class Summary:
    """What one certification says.

    Attributes:
        folder: its manifest and records.
        vanilla_accuracy: the undefended model is right.
        clean_accuracy: the defended model is right on the clean image.
        certified_robust_accuracy: the defended model is right under every patch, proven.
        certified_share_of_places: the mean share of places where no patch can change the right answer,
            proven; None unless it was certified by place.
        unreadable: images that count as wrong in all three because they could not be read.
        passes: forward passes of the certification, for all images.
        complete: every image has its record.
        min_margin: only certificates with at least this margin are counted.
        below: certificates that are not, since their margin is smaller.
        proofs: answers that are proven without their label; None unless they were asked for.
    """

    folder: Folder[Record]
    vanilla_accuracy: Share
    clean_accuracy: Share
    certified_robust_accuracy: Share
    unreadable: int
    passes: int
    complete: bool
    min_margin: float = 0.0
    below: int = 0
    certified_share_of_places: ShareOfPlaces | None = None
    proofs: Proofs | None = None

    @property
    def name(self) -> str:
        """The folder as it was named."""
        return str(self.folder.path)

    @property
    def experiment(self) -> Certification:
        """Everything that can change a result."""
        return self.folder.manifest.certification

    @property
    def threat(self) -> Threat:
        """What the certificates are against."""
        return threat_of_certification(self.experiment)

    @property
    def images(self) -> int:
        """How many images have a record."""
        return self.certified_robust_accuracy.images

    def to_json(self) -> dict[str, Any]:
        """The summary as ``report --json`` prints it."""
        places = self.certified_share_of_places
        by_place = {} if places is None else {"certified_share_of_places": places.to_json()}
        return {
            "folder": self.name,
            "complete": self.complete,
            "model": self.experiment.model.arch,
            "strategy": strategy(self.experiment),
            "inference": self.experiment.inference,
            "data": self.folder.manifest.stated["data"],
            **self.threat,
            "masks_per_axis": self.experiment.masks_per_axis,
            **_defense(self.experiment),
            "vanilla_accuracy": self.vanilla_accuracy.to_json(),
            "clean_accuracy": self.clean_accuracy.to_json(),
            "certified_robust_accuracy": self.certified_robust_accuracy.to_json(),
            **by_place,
            **({"proven_answers": self.proofs.to_json()} if self.proofs else {}),
            "unreadable": self.unreadable,
            "passes": self.passes,
            "min_margin": self.min_margin,
            "below_min_margin": self.below,
            **environments(self.folder.manifest),
        }


def _defense(experiment: Certification) -> dict[str, Any]:
    """For JSON: which defense it is, where it is not PatchCleanser."""
    if experiment.defense == "patchcleanser":
        return {}
    return {"defense": experiment.defense, "patch_size_known": experiment.knows_patch_size}


def environments(manifest: Manifest) -> dict[str, Any]:
    """For JSON: in what the environments of the parts of a folder differ, if they do."""
    return {"environments_differ": manifest.other_environments} if manifest.other_environments else {}


def in_other_environments(manifests: Iterable[Manifest]) -> list[str]:
    """A sentence for each folder whose shards or resumes were not all run in the same way."""
    return [
        f"{one_line(str(manifest.folder))} was not written in one environment, which can change rounding: "
        f"{one_line('; '.join(manifest.other_environments[:6]))}."
        for manifest in manifests
        if manifest.other_environments
    ]


def summarize(folder: Folder[Record], *, min_margin: float | None = None) -> Summary:
    """The summary of a folder that ``certify`` wrote; also of one that is not complete yet.

    Args:
        min_margin: count only certificates whose smallest logit margin is at least this; by default what
            rounding does not reach (:attr:`certipatch.records.manifest.Manifest.rounding`), 0 for all.

    Raises:
        RecordsError: no records, or those of another kind.
    """
    kind = folder.manifest.kind
    if kind != "certify":
        raise RecordsError(
            f"{folder.path}: expected records of certify, found those of {kind}; run certify on it first"
        )
    least = folder.manifest.rounding if min_margin is None else min_margin
    by_place = ByPlace.of(folder, min_margin=least) if folder.records else None
    return Summary(
        folder=folder,
        **accuracies(folder.records, min_margin=least),
        **totals(folder, "certified"),
        min_margin=least,
        below=sum(record.certified and not record.counts(least) for record in folder.records),
        certified_share_of_places=ShareOfPlaces.of(by_place.shares()) if by_place else None,
        proofs=Proofs.of(folder, min_margin=least),
    )


def totals(folder: Folder[Any], done: str) -> dict[str, Any]:
    """``unreadable``, ``passes`` and ``complete`` of a folder of ``certify`` or ``detect``.

    Args:
        done: what was done to the images, for the error.

    Raises RecordsError if there is no record, or one of an image beyond those of the run.
    """
    records, images = folder.records, folder.manifest.certification.data.images
    if not records:
        raise RecordsError(
            f"{folder.path}: no image has been {done} yet; continue it with {folder.manifest.kind} --resume"
        )
    if len(records) > images or records[-1].index >= images:
        raise RecordsError(
            f"{folder.path}: holds records of more images than the {images} that were {done}; restore it or "
            f"{folder.manifest.kind} again"
        )
    return {
        "unreadable": sum(record.error is not None for record in records),
        "passes": sum(record.passes for record in records),
        "complete": len(records) == images,
    }


def accuracies(records: Sequence[Record], *, min_margin: float) -> dict[str, Any]:
    """The three accuracies by their names."""
    return {
        "vanilla_accuracy": Share.of(record.vanilla_label == record.label for record in records),
        "clean_accuracy": Share.of(record.defended_label == record.label for record in records),
        "certified_robust_accuracy": Share.of(record.counts(min_margin) for record in records),
    }


def strategy(experiment: Certification) -> str:
    """How the certified model was fine-tuned, in a few words."""
    trained = experiment.trained
    if trained is None:
        return "not fine-tuned"
    choices = f" ({', '.join(trained.choices)})" if trained.choices else ""
    return f"{trained.strategy}, {trained.epochs} epochs{choices}"


def training_cost(folder: Path) -> float:
    """Forward-equivalents that a training run spent for each image of its training set, over all epochs."""
    lines = read_written(folder, EPOCHS)
    return sum(line["forward_equivalents"] / line["images"] for line in lines)


def table(summaries: Sequence[Summary]) -> Table:
    """The table of several certifications, 80 columns wide."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    out.caption = escape(" ".join([CAPTION, *_remarks(summaries)]))
    by_place = any(summary.certified_share_of_places for summary in summaries)
    kinds = _of_several_defenses(summaries)
    out.add_column("run, model, training", overflow="fold", min_width=16 if kinds else 22)
    headings = ["patch", *(["size\nknown"] if kinds else []), "k", "vanilla", "clean", "certified\nrobust"]
    headings += ["certified\nshare of\nplaces"] if by_place else []
    for heading in [*headings, "passes/\nimage"]:
        out.add_column(heading, justify="right")
    for summary in summaries:
        out.add_row(*_row(summary, by_place, kinds))
    return out


def _of_several_defenses(summaries: Sequence[Summary]) -> bool:
    """Whether some of them are of another defense than PatchCleanser."""
    return any(summary.experiment.defense != "patchcleanser" for summary in summaries)


def _remarks(summaries: Sequence[Summary]) -> list[str]:
    """What a reader must know of all rows."""
    fallen = [remark for remark in map(below_the_margin, summaries) if remark]
    manifests = [summary.folder.manifest for summary in summaries]
    by_place = [BY_PLACE] if any(summary.certified_share_of_places for summary in summaries) else []
    proofs = [f"{summary.name}: {summary.proofs}." for summary in summaries if summary.proofs]
    kinds = [SIZE_KNOWN] if _of_several_defenses(summaries) else []
    return [
        *kinds,
        *by_place,
        *map(one_line, proofs),
        *other_images([summary.experiment for summary in summaries]),
        *dict.fromkeys(fallen),
        *in_other_environments(manifests),
    ]


def below_the_margin(summary: Summary) -> str:
    """How many certificates a run has that are not counted, and why; empty if all are."""
    if not summary.below:
        return ""
    what = "1 certificate" if summary.below == 1 else f"{summary.below} certificates"
    default = summary.min_margin == summary.folder.manifest.rounding
    why = ", which rounding could turn (--min-margin 0 counts all)" if default else ""
    return f"Not counted: {what} of {summary.name} with a logit margin below {summary.min_margin:.3g}{why}."


def other_images(experiments: Sequence[Certification]) -> list[str]:
    """A sentence where some runs are not of the same images."""
    same = len({experiment.data.fingerprint for experiment in experiments}) <= 1
    return [] if same else ["These runs are not of the same images."]


def _row(summary: Summary, by_place: bool, kinds: bool) -> list[str]:
    experiment = summary.experiment
    asked = experiment.data.images
    state = "" if summary.complete else f" (incomplete: {summary.images} of {asked} images)"
    what = [f"{summary.name}{state}", experiment.model.arch, strategy(experiment)]
    what += ["challenger masking"] if experiment.inference == "challenger" else []
    what += [f"defense: {in_words(experiment)}"] if experiment.defense != "patchcleanser" else []
    shares = summary.vanilla_accuracy, summary.clean_accuracy, summary.certified_robust_accuracy
    places = summary.certified_share_of_places
    return [
        "\n".join(escape(one_line(text)) for text in what),
        against(experiment),
        *([{True: "yes", False: "no", None: ""}[experiment.knows_patch_size]] if kinds else []),
        str(experiment.masks_per_axis or ""),
        *(share.stacked() for share in shares),
        *([places.stacked() if places else ""] if by_place else []),
        f"{summary.passes / summary.images:.0f}",
    ]


def in_words(experiment: Certification) -> str:
    """The defense and its windows: ``ds columns:4``, ``patchcleanser``."""
    return " ".join([experiment.defense, *([experiment.windows_shown] if experiment.windows_shown else [])])


def against(experiment: Certification) -> str:
    """The patches in a column of the table: shapes, image, and the largest share of the area."""
    height, width = experiment.against.image_size
    shapes = threat_of_certification(experiment).text.replace("+", "+\n")
    return f"{shapes} of\n{by((height, width))}\n{percent_of_image(experiment):.1f} %"


def threat_of_certification(experiment: Certification) -> Threat:
    """What the certificates of an experiment are against."""
    return Threat.of(experiment.against.model_dump(include={"patch_size", "other_patch_sizes", "patches"}))


def percent_of_image(experiment: Certification) -> float:
    """The largest share of the image that the attacker has, in %."""
    threat, (height, width) = threat_of_certification(experiment), experiment.against.image_size
    return 100 * float(threat.patches * max(h * w for h, w in threat.patch_sizes)) / (height * width)
