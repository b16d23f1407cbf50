"""``certipatch bench``: how fast certification, training steps and the network are on a model and data of
one's own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..config import DataAsked, ModelAsked
from ..errors import ConfigError
from ..geometry.masks import MaskSet
from ..runtime.console import print_table
from ..training.strategies import STRATEGIES
from . import options as ask
from .open import open_both
from .parse import check_out_file, mask_set

if TYPE_CHECKING:
    from pathlib import Path

    from ..data.source import Source
    from ..models.runs import Opened


def bench(
    model: ask.Model,
    data: ask.Data,
    patch: ask.PatchToTime = None,
    masks_per_axis: ask.MasksPerAxisToTime = None,
    patches: ask.PatchesToTime = None,
    what: ask.Themes = "certify,network",
    repeats: ask.Repeats = 3,
    full: ask.Full = False,
    certified: ask.CertifiedToTime = None,
    only_certified: ask.OnlyCertified = False,
    strategies: ask.StrategiesToTime = "random-both,greedy-multisize",
    train_batch_size: ask.TrainBatchSize = 64,
    search_every: ask.SearchEvery = 1,
    search_precision: ask.SearchPrecision = None,
    out: ask.JsonFile = None,
    weights: ask.Weights = None,
    pretrained: ask.Pretrained = False,
    split: ask.Split = None,
    class_map: ask.ClassMap = None,
    image_size: ask.ImageSize = None,
    crop_pct: ask.CropPct = None,
    batch_size: ask.BatchSize = None,
    limit: ask.LimitToTime = 8,
    device: ask.Device = "auto",
    precision: ask.Precision = "32-true",
    exhaustive: ask.ExhaustiveToo = False,
    compile: ask.CompileToTime = True,
    shared_prefix: ask.SharedPrefixToTime = True,
    as_json: ask.AsJson = False,
) -> None:
    """Measure certification (against the published code), training steps, memory and processes on a model and
    data of your own."""
    themes, chosen = _themes(what), _strategies(strategies)
    if out is not None:
        check_out_file(out)
    asked = ModelAsked(model, weights, pretrained, image_size, crop_pct)
    source, opened = open_both(asked, DataAsked(data, split, class_map))
    geometry = patch, masks_per_axis, patches
    fine, source = _geometry(certified, geometry, only_certified, opened, source)
    if fine.grid is None and "train" in themes:
        raise ConfigError("bench train: expected one patch of one shape, as train takes it")
    way = {"batch_size": batch_size, "exhaustive": exhaustive, "precision": precision}
    way |= {"compile": compile, "shared_prefix": shared_prefix}
    typed = {
        **vars(asked),
        "data": data,
        "split": split,
        "class_map": class_map,
        "limit": limit,
        "device": device,
    }
    search = {"search_every": search_every, "search_precision": search_precision}
    rounds = {"repeats": repeats, "full": full, "train_batch_size": train_batch_size}
    case = {"strategies": chosen, "search": search, "device": device, **rounds}
    found = _measure(opened, source, fine, case, way, typed, themes, limit if only_certified else None)
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    _show(found, as_json)


def _themes(what: str) -> list[str]:
    from ..bench.run import parse_themes

    return parse_themes(what)


def _strategies(names: str) -> list[str]:
    chosen = list(STRATEGIES) if names == "all" else names.split(",")
    unknown = [name for name in chosen if name not in STRATEGIES]
    if unknown:
        raise ConfigError(f"unknown strategy {unknown[0]!r}: expected some of {', '.join(STRATEGIES)}")
    return chosen


def _geometry(
    certified: Path | None,
    geometry: tuple[str | None, int | None, int | None],
    only_certified: bool,
    opened: Opened,
    source: Source,
) -> tuple[MaskSet, Source]:
    """The masks to measure with, and the images: of a certification the masks and what it certified."""
    patch, masks_per_axis, patches = geometry
    if certified is None and patch is None:
        raise ConfigError("patch: expected --patch, or --certified FOLDER, found neither")
    if certified is None:
        fine = mask_set(str(patch), masks_per_axis or 6, opened.spec.image_size, patches or 1)
        return fine, source
    if any((*geometry, only_certified)):
        raise ConfigError(
            f"certified {certified}: has its own patch, k and images; drop --patch, --patches, "
            "--masks-per-axis and --only-certified"
        )
    from ..bench.certification import certified_in
    from ..certification.restore import certified_masks, read_certification

    return certified_masks(read_certification(certified), opened), certified_in(certified, source)


def _measure(
    opened: Opened,
    source: Source,
    fine: MaskSet,
    case: dict[str, Any],
    way: dict[str, Any],
    typed: dict[str, Any],
    themes: list[str],
    find: int | None,
) -> dict[str, Any]:
    """Measure on ``typed["limit"]`` of the images, or on so many certified ones that are found first."""
    from dataclasses import replace

    from ..bench.case import Case, Settings
    from ..bench.certification import only_certified
    from ..bench.run import run

    whole = Case(
        network=opened.network,
        spec=opened.spec,
        source=source,
        masks=fine,
        settings=Settings(**way),
        options=_as_typed(typed, fine, way),
        **case,
    )
    images = source.first(typed["limit"]) if find is None else only_certified(whole, find)
    return run(replace(whole, source=images), themes)


def _as_typed(typed: dict[str, Any], fine: MaskSet, way: dict[str, Any]) -> dict[str, Any]:
    """The options of ``certify`` that say the same, for what is measured in a fresh process."""
    flags = {name if way[name] else f"no_{name}": True for name in ("compile", "shared_prefix")}
    rest = {name: value for name, value in way.items() if name not in ("compile", "shared_prefix")}
    masks = {
        "patch": fine.threat.shapes,
        "patches": fine.patches,
        "masks_per_axis": fine.masks_per_axis,
    }
    same = {"model": typed["name"], **typed, **masks, **rest, **flags}
    del same["name"]
    return {name.replace("_", "-"): value for name, value in same.items() if value not in (None, False)}


def _show(found: dict[str, Any], as_json: bool) -> None:
    from ..bench.table import table

    if as_json:
        print(json.dumps(found))
    else:
        print_table(table(found))
