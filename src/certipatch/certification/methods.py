"""The certified defenses by name: the one table that knows them all.

A new defense is a folder in ``defenses/`` and a row here. With these it has ``certify --defense NAME``,
resume, shards, records, report, page and ``verify`` (which checks what does not depend on the method).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..defenses.contract import CertifiedDefense
from ..defenses.minority_reports.algorithm import above
from ..defenses.minority_reports.detector import MinorityReports
from ..defenses.patchcleanser.defense import PatchCleanser
from ..errors import ConfigError
from ..geometry.masks import MaskSet


@dataclass(frozen=True)
class Way:
    """How a defense runs its network: what changes rounding and time, but no result beyond that.

    Attributes:
        precision: "32-true", "bf16-mixed" or "16-mixed".
        batch_size: views in one forward pass; None: by image size.
        compile, shared_prefix: as of :class:`certipatch.PatchCleanser`.
    """

    precision: str = "32-true"
    batch_size: int | None = None
    compile: bool = False
    shared_prefix: bool | str = False


@dataclass(frozen=True)
class Method:
    """What there is to know of a certified defense outside of its own folder.

    Attributes:
        kind: of the manifest: ``certify`` for certified answers, ``detect`` for certified alarms.
        build: (model, masks, way, **options) -> the defense. One without masks takes the threat and the image
            size from them.
        views: how many views of an image are looked at, at most, with so many masks; what pays depends on it.
        options: the names of its own options, under which they stand in the experiment.
        promise: what its certificate is called while a run is under way.
        keeps: (record, least margin) -> whether the record has that certificate, beyond rounding.
    """

    kind: str
    build: Callable[..., CertifiedDefense]
    views: Callable[[int], int]
    options: tuple[str, ...] = ()
    promise: str = "certified"
    keeps: Callable[[Any, float], bool] = lambda record, least: bool(record.counts(least))


def _patchcleanser(model: nn.Module, masks: MaskSet, way: Way, **options: Any) -> PatchCleanser:
    return PatchCleanser(model, masks, **vars(way), **options)


def _minority_reports(model: nn.Module, masks: MaskSet, way: Way) -> MinorityReports:
    """The threshold does not matter: the records have what is needed for any."""
    return MinorityReports(
        model, masks, threshold=0, batch_size=way.batch_size, precision=way.precision, compile=way.compile
    )


METHODS: dict[str, Method] = {
    "patchcleanser": Method(
        kind="certify",
        build=_patchcleanser,
        views=lambda masks: masks * (masks + 1) // 2,
        options=("exhaustive", "inference", "places", "prove"),
    ),
    "minority-reports": Method(
        kind="detect",
        build=_minority_reports,
        views=lambda masks: masks + 1,
        promise="certified detection at threshold 0",
        keeps=lambda record, least: above(record.agreement, 0),
    ),
}


def method_of(defense: str) -> Method:
    """The row of a defense. Raises ConfigError for a name that is none."""
    if defense not in METHODS:
        raise ConfigError(f"defense {defense!r}: expected one of {', '.join(METHODS)}")
    return METHODS[defense]
