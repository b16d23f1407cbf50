"""``certipatch masks``: the mask set for a patch, the proof that it covers, and what it costs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ..geometry.masks import MaskSet
from ..runtime.console import stdout
from ..training.strategies import STRATEGIES
from .options import AsJson, MasksPerAxis, Patches
from .parse import mask_set, parse_size


def masks(
    image_size: Annotated[str, typer.Option(help="224 or 224x192 (height x width)")],
    patch: Annotated[
        str,
        typer.Option(help="the largest patch: 3%, 39 or 39x20 (height x width); several shapes: 39x20+20x39"),
    ],
    masks_per_axis: MasksPerAxis = 6,
    patches: Patches = 1,
    as_json: AsJson = False,
) -> None:
    """Show the masks for a patch, prove that they cover it, and say what they cost."""
    fine = mask_set(patch, masks_per_axis, parse_size(image_size), patches)
    facts = _facts(fine)
    if as_json:
        print(json.dumps(facts))
    else:
        stdout.print(_describe(facts, fine.threat.text), soft_wrap=True)


def _facts(fine: MaskSet) -> dict[str, Any]:
    """What ``masks --json`` prints."""
    (height, width), n, patches = fine.image_size, len(fine), fine.patches
    places = sum((height - h + 1) * (width - w + 1) for h, w in fine.patch_sizes)
    hole = fine.uncovered_patches()
    facts: dict[str, Any] = {
        "image_size": fine.image_size,
        **fine.threat,
        "patch_share": patches * max(h * w for h, w in fine.patch_sizes) / (height * width),
        "masks_per_axis": fine.masks_per_axis,
        "masks": n,
        "patch_positions": places if patches == 1 else places * (places + 1) // 2,
        "uncovered_patch": hole and [vars(window) for window in hole],
        "passes": {"predict_agreed": n, "certify_at_most": n * (n + 1) // 2},  # besides the unmasked image
    }
    if fine.grid is not None:  # one patch of one shape, which train takes too
        facts |= _facts_of_a_grid(fine)
        facts["passes"]["search"] = {n: one.passes(fine) for n, one in STRATEGIES.items() if one.searches}
    return facts


def _facts_of_a_grid(fine: MaskSet) -> dict[str, Any]:
    window = fine.windows[0][0]
    rows, columns = (sorted({getattr(mask[0], side) for mask in fine.windows}) for side in ("top", "left"))
    return {
        "mask_size": (window.height, window.width),
        "stride": tuple(starts[1] if len(starts) > 1 else 0 for starts in (rows, columns)),
        "starts": {"rows": rows, "columns": columns},
        "coarse_masks": len(fine.coarsen()[0]),
    }


def _describe(facts: dict[str, Any], threat: str) -> str:
    """What ``masks`` has to say, for a person."""
    height, width = facts["image_size"]
    n, of_one_grid = facts["masks"], "starts" in facts
    share = f"{100 * facts['patch_share']:.2f} % of the area{'' if of_one_grid else ' at most'}"
    lines = [f"patch     {threat} of {height}x{width} pixels ({share})"]
    if of_one_grid:
        rows, columns = facts["starts"]["rows"], facts["starts"]["columns"]
        sides, stride = ("x".join(map(str, facts[key])) for key in ("mask_size", "stride"))
        starts = (" ".join(map(str, each)) for each in (rows, columns))
        lines += [
            f"masks     {n} of {sides} pixels, {len(rows)} x {len(columns)}; stride {stride}",
            f"          rows start at {next(starts)}; columns at {next(starts)}",
            f"coarse    {facts['coarse_masks']} (unions of 2x2 neighbours)",
        ]
    else:
        one = facts.get("patches", 1) == 1
        lines.append(f"masks     {n}: {'those of each shape' if one else 'every two of those for one patch'}")
    return "\n".join([*lines, _covered(facts), *_passes(facts)])


def _covered(facts: dict[str, Any]) -> str:
    if facts["uncovered_patch"] is not None:
        return f"covered   NO: {facts['uncovered_patch']}"
    placed = "patch positions" if facts.get("patches", 1) == 1 else "pairs of patch positions"
    return f"covered   yes: each of the {facts['patch_positions']} {placed} lies under a mask (all tried)"


def _passes(facts: dict[str, Any]) -> list[str]:
    passes = facts["passes"]
    most = passes["certify_at_most"]
    lines = [f"passes    predict {facts['masks']} where the masks agree; certify at most {most} an image"]
    if "search" in passes:
        costs = ", ".join(f"{name} {cost}" for name, cost in passes["search"].items())
        lines.append(f"          search for one training image: {costs}")
    return lines
