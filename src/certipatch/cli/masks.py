"""TODO."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from ..geometry.patch import threat_text
from ..training.cost import search_passes
from .app import app
from .options import AsJson, MasksPerAxis, Patches, stdout
from .parse import mask_set, parse_size


@app.command()
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
    size = parse_size(image_size)
    fine = mask_set(patch, masks_per_axis, size, patches)
    height, width = size
    hole = fine.uncovered_patches()
    places = sum((height - h + 1) * (width - w + 1) for h, w in fine.patch_sizes)
    n = len(fine)
    facts: dict[str, Any] = {
        "image_size": size,
        **fine.threat,
        "patch_share": patches * max(h * w for h, w in fine.patch_sizes) / (height * width),
        "masks_per_axis": masks_per_axis,
        "masks": n,
        "patch_positions": places if patches == 1 else places * (places + 1) // 2,
        "uncovered_patch": hole and [vars(window) for window in hole],
        "passes": {"predict_agreed": n, "certify_at_most": n * (n + 1) // 2},  # besides the unmasked image
    }
    if fine.grid is not None:  # one patch of one shape, which train takes too
        rows, columns = (
            sorted({getattr(mask[0], side) for mask in fine.windows}) for side in ("top", "left")
        )
        facts |= {
            "mask_size": (fine.windows[0][0].height, fine.windows[0][0].width),
            "stride": tuple(starts[1] if len(starts) > 1 else 0 for starts in (rows, columns)),
            "starts": {"rows": rows, "columns": columns},
            "coarse_masks": len(fine.coarsen()[0]),
        }
        facts["passes"]["search"] = search_passes(fine)
    print(json.dumps(facts)) if as_json else stdout.print(
        _describe(facts, threat_text(**fine.threat)), soft_wrap=True
    )


def _describe(facts: dict[str, Any], threat: str) -> str:
    """What ``masks`` has to say, for a person."""
    height, width = facts["image_size"]
    n, passes, of_one_grid = facts["masks"], facts["passes"], "starts" in facts
    placed = "patch positions" if facts.get("patches", 1) == 1 else "pairs of patch positions"
    lines = [
        f"patch     {threat} of {height}x{width} pixels ({100 * facts['patch_share']:.2f} % of the "
        f"area{'' if of_one_grid else ' at most'})"
    ]
    if of_one_grid:
        rows, columns = facts["starts"]["rows"], facts["starts"]["columns"]
        sides, stride = "x".join(map(str, facts["mask_size"])), "x".join(map(str, facts["stride"]))
        lines.append(f"masks     {n} of {sides} pixels, {len(rows)} x {len(columns)}; stride {stride}")
        lines.append(
            f"          rows start at {' '.join(map(str, rows))}; columns at {' '.join(map(str, columns))}"
        )
        lines.append(f"coarse    {facts['coarse_masks']} (unions of 2x2 neighbours)")
    else:
        lines.append(
            f"masks     {n}: "
            f"{'those of each shape' if placed == 'patch positions' else 'every two of those for one patch'}"
        )
    if facts["uncovered_patch"] is None:
        lines.append(
            f"covered   yes: each of the {facts['patch_positions']} {placed} lies under a mask (all tried)"
        )
    else:
        lines.append(f"covered   NO: {facts['uncovered_patch']}")
    lines.append(
        f"passes    predict {n} where the masks agree; certify at most {passes['certify_at_most']} an image"
    )
    if of_one_grid:
        lines.append(
            "          search for one training image: "
            f"{', '.join(f'{name} {cost}' for name, cost in passes['search'].items())}"
        )
    return "\n".join(lines)
