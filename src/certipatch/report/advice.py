"""What to do next about a certification, from its records."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from ..records.experiment import Certification
from ..records.manifest import Manifest
from ..records.schema import Record
from .certification import Summary
from .findings import outcome

Advice = tuple[str, str]  # a sentence, and a command or nothing


def advise(summary: Summary, *, attacked: bool) -> list[Advice]:
    """What to do next, the most useful first. ``attacked``: an attack on it is known."""
    about = _About(summary)
    found = [
        *_go_on(about),
        *_train(about),
        *_more_masks(about),
        *_just_missed(about),
        *_wrong_anyway(about),
        *_near(about),
        *_verify(about),
    ]
    return found if attacked else [*found, *_attack(about)]


@dataclass(frozen=True)
class _About:
    """A certification, with what several pieces of advice need to know of it."""

    summary: Summary

    @property
    def records(self) -> Sequence[Record]:
        return self.summary.folder.records

    @property
    def experiment(self) -> Certification:
        return self.summary.experiment

    @property
    def patch(self) -> str:
        """The shapes of the patch as they are typed."""
        return self.summary.threat.shapes

    @cached_property
    def typed(self) -> tuple[str, str]:
        """``--model ...`` and ``--data ...`` as the run had them, or words in capitals to fill in."""
        return _options_of(self.summary.folder.manifest)

    def some(self, part: int) -> int:
        """One image in ``part`` of them, at least one: what is fewer is not worth a sentence."""
        return max(1, len(self.records) // part)


def _go_on(about: _About) -> Iterator[Advice]:
    if not about.summary.complete:
        done, asked = len(about.records), about.experiment.data.images
        yield f"{done} of {asked} images are done. Go on with the command below and --resume.", ""


def _train(about: _About) -> Iterator[Advice]:
    trained, one_patch = about.experiment.trained, about.summary.threat.is_single
    if not one_patch or (trained is not None and trained.strategy == "greedy-multisize"):
        return
    before = "was not fine-tuned" if trained is None else f"was fine-tuned with {trained.strategy}"
    if not about.experiment.masks:
        if about.experiment.windows_shown and (trained is None or trained.strategy != "random-band"):
            yield _train_on_windows(about, before)
        return
    yield (
        f"The model {before}. Fine-tuning on the worst pairs of masks (greedy-multisize) makes more images "
        "certifiable.",
        f"certipatch train {about.typed[0]} --data TRAIN --val-data VALIDATION --strategy greedy-multisize "
        f"--patch {about.patch} --out RUN",
    )


def _train_on_windows(about: _About, before: str) -> Advice:
    windows = about.experiment.windows_shown
    return (
        f"The model {before}, and sees little in one window. Fine-tuning on one window of each image "
        "(random-band) makes more images certifiable.",
        f"certipatch train {about.typed[0]} --data TRAIN --val-data VALIDATION --strategy random-band "
        f"--windows {windows} --patch {about.patch} --out RUN",
    )


def _more_masks(about: _About) -> Iterator[Advice]:
    k, (model, where) = about.experiment.masks_per_axis, about.typed
    if 0 < k < 6:
        yield (
            f"With k={k} each mask hides much of the image. With k=6 masks are smaller and more images are "
            "certified, for more passes.",
            f"certipatch certify {model} {where} --patch {about.patch} --masks-per-axis 6 --out CERTIFIED",
        )


def _just_missed(about: _About) -> Iterator[Advice]:
    states = Counter(outcome(record, about.summary.min_margin) for record in about.records)
    missed, n = states["just missed"], len(about.records)
    if about.experiment.masks and missed >= about.some(20):
        yield (
            f"{missed} of {n} images just miss: no single mask fools the model on them, only some pair does. "
            "They are what longer fine-tuning or a larger k (for more passes) can win.",
            "",
        )


def _wrong_anyway(about: _About) -> Iterator[Advice]:
    wrong = sum(record.vanilla_label != record.label for record in about.records)
    if wrong >= about.some(10):
        yield (
            f"{wrong} of {len(about.records)} images are answered wrongly without any patch. No defence "
            "mends that: start from a better model.",
            "",
        )


def _near(about: _About) -> Iterator[Advice]:
    few, least = near(about.summary), about.summary.folder.manifest.rounding
    if few:
        yield (
            f"{few} of the certificates {'has' if few == 1 else 'have'} a logit margin below {least:g}, "
            "which rounding on another machine could turn. Count without:",
            f"certipatch report {about.summary.name}",
        )


def _verify(about: _About) -> Iterator[Advice]:
    model, where = about.typed
    yield (
        "Have independent code check these records, and look at images again:",
        f"certipatch verify {about.summary.name} {model} {where}",
    )


def _attack(about: _About) -> Iterator[Advice]:
    model, where = about.typed
    if about.summary.threat.patches == 1:
        yield (
            "See what an attacker reaches: an upper bound beside this lower one, with patched images for "
            "this page.",
            f"certipatch attack {model} --records {about.summary.name} {where} --out ATTACK",
        )


def near(summary: Summary) -> int:
    """How many of the counted certificates have a margin that rounding could turn: none, by default."""
    least = summary.folder.manifest.rounding
    counted = [record for record in summary.folder.records if record.counts(summary.min_margin)]
    return sum(not record.counts(least) for record in counted)


def _options_of(manifest: Manifest) -> tuple[str, str]:
    """The options of the model and of the data with which the run was started."""
    try:
        words = shlex.split(manifest.command)
    except ValueError:
        words = []
    given = dict(pairwise(words)) if words[1:2] == ["certify"] else {}

    def chosen(*names: str) -> str:
        return " ".join(f"{name} {shlex.quote(given[name])}" for name in names if name in given)

    model = chosen("--model", "--weights", "--image-size", "--crop-pct") or "--model MODEL"
    pretrained = " --pretrained" if "--pretrained" in given else ""
    data = chosen("--data", "--split", "--class-map") or f"--data {shlex.quote(manifest.data or 'DATA')}"
    return model + pretrained, data
