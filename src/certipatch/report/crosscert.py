"""CrossCert: PatchCleanser answers, a defense by windows warns where it would answer otherwise.

Source: CrossCert (FSE 2024). Nothing is run for it: what it certifies follows from two folders of records of
the same images against the same patches. If PatchCleanser is certified, the answer is right under
every patch; if the other is, its answer is, so a wrong answer of PatchCleanser's raises the warning. Where
both are, the answer is right and nothing warns, whatever the patch ("unwavering"). CrossCert's third way to a
certificate of detection, place by place, is not here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from ..errors import one_line
from .certification import Summary
from .shares import Share


def crosscert(summaries: Sequence[Summary]) -> list[str]:
    """A sentence for each certification of PatchCleanser and each by windows that can be joined."""
    masked = [one for one in summaries if one.experiment.defense == "patchcleanser" and one.complete]
    windowed = [one for one in summaries if one.experiment.windows_shown and one.complete]
    return [
        one_line(" ".join(_joined(first, second)))
        for first, second in product(masked, windowed)
        if first.experiment.data.fingerprint == second.experiment.data.fingerprint
        and first.threat == second.threat
        and first.experiment.against.image_size == second.experiment.against.image_size
    ]


def _joined(first: Summary, second: Summary) -> Iterator[str]:
    """What PatchCleanser with a warning by windows is worth, image by image."""
    pairs = list(zip(first.folder.records, second.folder.records, strict=True))
    proven = [(one.counts(first.min_margin), other.counts(second.min_margin)) for one, other in pairs]
    right = Share.of(one.defended_label == other.defended_label == one.label for one, other in pairs)
    yield f"{first.name} with a warning where {second.name} answers otherwise (CrossCert):"
    yield f"right without a warning {right} on clean images,"
    yield f"under every patch, proven, {Share.of(one and other for one, other in proven)};"
    detected = Share.of(one or other for one, other in proven)
    yield f"right or with a warning under every patch, proven, {detected}."
