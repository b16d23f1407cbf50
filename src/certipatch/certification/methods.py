"""The certified defenses by name: the one table that knows them all.

A new defense is a folder in ``defenses/`` and a row here. With these it has ``certify --defense NAME``,
resume, shards, records, report, page and ``verify`` (which checks what does not depend on the method).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..defenses.bounds.defense import IntervalDefense
from ..defenses.contract import CertifiedDefense
from ..defenses.evidence.cells import CellWindows
from ..defenses.evidence.defense import WindowDefense
from ..defenses.evidence.rules import BoundedSum, RobustMasking, TwoMasks
from ..defenses.evidence.shown import ShownWindows
from ..defenses.evidence.votes import (
    BEST_VOTE,
    CLIPPED_TANH,
    CONFIDENCE,
    POSITIVE,
    SIGNED,
    STEP,
    TANH,
    threshold_votes,
)
from ..defenses.evidence.windows import Windows
from ..defenses.minority_reports.algorithm import above
from ..defenses.minority_reports.detector import MinorityReports
from ..defenses.patchcleanser.algorithms import INFERENCES, Inference, answer
from ..defenses.patchcleanser.defense import PatchCleanser
from ..errors import ConfigError
from ..geometry.masks import MaskSet
from ..geometry.patch import Size, Threat
from ..geometry.sights import sights_of
from ..views.ablated import has_tokens


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
        views: (masks, **options) -> how many views of an image are looked at, at most; what pays depends on
            it.
        options: the names of its own options, under which they stand in the experiment; those that it
            ``needs`` must be given.
        masks: whether it answers by the mask set; of another one only the threat counts.
        against: (defense, threat) -> the same against another threat, which shares what the network says of
            an image inside of ``remembering``; None for a defense that looks anew for each.
        promise: what its certificate is called while a run is under way.
        keeps: (record, least margin) -> whether the record has that certificate, beyond rounding.
    """

    kind: str
    build: Callable[..., CertifiedDefense]
    views: Callable[..., int]
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    masks: bool = True
    against: Callable[[Any, Threat], CertifiedDefense] | None = None
    remembering: Callable[[Any], AbstractContextManager[None]] = lambda _defense: nullcontext()
    promise: str = "certified"
    keeps: Callable[[Any, float], bool] = lambda record, least: bool(record.counts(least))


def _patchcleanser(model: nn.Module, masks: MaskSet, way: Way, **options: Any) -> PatchCleanser:
    return PatchCleanser(model, masks, **vars(way), **options)


def _minority_reports(model: nn.Module, masks: MaskSet, way: Way) -> MinorityReports:
    """The threshold does not matter: the records have what is needed for any."""
    return MinorityReports(
        model, masks, threshold=0, batch_size=way.batch_size, precision=way.precision, compile=way.compile
    )


def _shown(model: nn.Module, size: Size, way: Way, windows: str, tokens: str | None = "filled") -> Windows:
    """A classifier that is shown windows of an image.

    ``tokens`` None: a vision transformer drops those that show nothing, and is refused if it cannot.
    """
    if windows.startswith("cells:"):
        raise ConfigError(
            f"windows {windows}: expected columns or blocks; cells are for clipped-bagnet, bagcert, "
            "patchguard and patchcure-srf"
        )
    if tokens is None:
        tokens = "dropped" if any(map(has_tokens, model.modules())) else "filled"
    if tokens not in ("dropped", "filled"):
        raise ConfigError(f"tokens {tokens!r}: expected dropped or filled")
    how: dict[str, Any] = {"batch_size": way.batch_size, "precision": way.precision, "compile": way.compile}
    return ShownWindows(model, size, windows, tokens=tokens, **how)  # type: ignore[arg-type]  # is one


def _ds(model: nn.Module, masks: MaskSet, way: Way, *, windows: str, theta: float = 0.2) -> WindowDefense:
    evidence = threshold_votes(theta)  # theta is refused before the model is looked at
    shown = _shown(model, masks.image_size, way, windows)
    return WindowDefense("ds", shown, evidence, lambda reach: BoundedSum(reach, 1), masks.threat)


def _smoothed_vit(
    model: nn.Module, masks: MaskSet, way: Way, *, windows: str, tokens: str | None = None
) -> WindowDefense:
    shown = _shown(model, masks.image_size, way, windows, tokens)
    return WindowDefense("smoothed-vit", shown, BEST_VOTE, lambda reach: BoundedSum(reach, 1), masks.threat)


def _patchguard(model: nn.Module, masks: MaskSet, way: Way, *, windows: str) -> WindowDefense:
    """On the cells of a BagNet, or on bands of any classifier; each has its evidence."""
    if windows.startswith("cells:"):
        cells = _cells(model, masks.image_size, way, windows)
        return WindowDefense("patchguard", cells, POSITIVE, RobustMasking, masks.threat)
    shown = _shown(model, masks.image_size, way, windows)
    return WindowDefense("patchguard", shown, CONFIDENCE, RobustMasking, masks.threat)


def _cells(model: nn.Module, size: Size, way: Way, windows: str) -> Windows:
    """A network whose cells have limited sight, all of them in one pass."""
    if not windows.startswith("cells:"):
        raise ConfigError(f"windows {windows}: expected those of a network with cells, such as cells:17/8")
    return CellWindows(model, size, windows, batch_size=way.batch_size, precision=way.precision)


def _clipped_bagnet(model: nn.Module, masks: MaskSet, way: Way, *, windows: str) -> WindowDefense:
    cells = _cells(model, masks.image_size, way, windows)
    rule = partial(BoundedSum, spread=2 * TANH)
    return WindowDefense("clipped-bagnet", cells, CLIPPED_TANH, rule, masks.threat)


def _bagcert(model: nn.Module, masks: MaskSet, way: Way, *, windows: str) -> WindowDefense:
    cells = _cells(model, masks.image_size, way, windows)
    return WindowDefense("bagcert", cells, STEP, partial(BoundedSum, spread=1), masks.threat)


def _patchcure(
    model: nn.Module, masks: MaskSet, way: Way, *, windows: str, inference: Inference = INFERENCES[0]
) -> WindowDefense:
    """PatchCleanser's algorithms on sums of evidence; each way of inference has the same certificate."""
    cells = _cells(model, masks.image_size, way, windows)
    rule = partial(TwoMasks, answer=lambda table: answer(table, inference)[0])
    return WindowDefense("patchcure-srf", cells, SIGNED, rule, masks.threat)


def _ibp(model: nn.Module, masks: MaskSet, way: Way) -> IntervalDefense:
    return IntervalDefense(model, masks, precision=way.precision)


def _window_views(masks: MaskSet, *, windows: str, **_others: Any) -> int:
    return 1 if windows.startswith("cells:") else len(sights_of(windows, masks.image_size)) + 1


METHODS: dict[str, Method] = {
    "patchcleanser": Method(
        kind="certify",
        build=_patchcleanser,
        views=lambda masks, **_: len(masks) * (len(masks) + 1) // 2,
        options=("exhaustive", "inference", "places", "prove"),
    ),
    "minority-reports": Method(
        kind="detect",
        build=_minority_reports,
        views=lambda masks, **_: len(masks) + 1,
        promise="certified detection at threshold 0",
        keeps=lambda record, least: above(record.agreement, 0),
    ),
    **{
        name: Method(
            kind="certify",
            build=build,
            views=_window_views,
            options=("windows", *options),
            needs=("windows",),
            masks=False,
            against=WindowDefense.against,
            remembering=lambda defense: defense.windows.remembering(),
        )
        for name, build, options in (
            ("ds", _ds, ("theta",)),
            ("smoothed-vit", _smoothed_vit, ("tokens",)),
            ("patchguard", _patchguard, ()),
            ("clipped-bagnet", _clipped_bagnet, ()),
            ("bagcert", _bagcert, ()),
            ("patchcure-srf", _patchcure, ()),
        )
    },
    "ibp": Method(kind="certify", build=_ibp, views=lambda masks, **_: 1 + 2 * len(masks)),
}

Defended = PatchCleanser | WindowDefense | IntervalDefense  # what a folder of ``certify`` can be about

# What ``predict`` and ``attack`` take the folders of. With interval bounds the network answers as it is.
ANSWERING = tuple(name for name, method in METHODS.items() if method.kind == "certify" and name != "ibp")


def method_of(defense: str) -> Method:
    """The row of a defense. Raises ConfigError for a name that is none."""
    if defense not in METHODS:
        raise ConfigError(f"defense {defense!r}: expected one of {', '.join(METHODS)}")
    return METHODS[defense]


def check_options(defense: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, of those that all defenses have together.

    Raises ConfigError for an unknown defense, an option that it does not have, and one that it lacks.
    """
    method = method_of(defense)
    given = {name: value for name, value in asked.items() if value is not None and value is not False}
    odd = [f"--{name}" for name in given if name not in method.options]
    if odd:
        raise ConfigError(f"defense {defense!r}: has no {', no '.join(odd)}; drop {_it(odd)}")
    missing = [f"--{name}" for name in method.needs if name not in given]
    if missing:
        example = {"--windows": "columns:4"}.get(missing[0], "")
        raise ConfigError(f"defense {defense!r}: expected {missing[0]} with it, such as {example}")
    return given


def _it(several: list[str]) -> str:
    return "it" if len(several) == 1 else "them"
