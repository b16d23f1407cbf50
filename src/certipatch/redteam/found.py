"""What became of an attacked image: its record, its patched picture, and the case of a certificate that
broke."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.source import Item, pixels_sha256
from ..defenses.patchcleanser.examination import PatchCleanserVerdict
from ..errors import SoundnessError
from ..records.files import write_atomically
from ..records.schema import AttackRecord, Record
from .climb import Result

PICTURES = "patched"


@dataclass(frozen=True)
class Found:
    """What became of one image.

    Attributes:
        clean: the answer without a patch; None for an image that cannot be read.
        ways: the number of goals that the clean table leaves open.
        results: everything that was judged; nothing if the answer was wrong anyway.
    """

    clean: PatchCleanserVerdict | None
    ways: int = 0
    results: tuple[Result, ...] = ()

    @property
    def best(self) -> Result | None:
        """The attempt that broke the image, or else came nearest to it."""
        return min(
            self.results, key=lambda result: (not result.broken, result.attempt.shortfall), default=None
        )

    @property
    def answer(self) -> int | None:
        """The defended label under the best attempt, or without a patch if none was made."""
        if self.best:
            return self.best.verdict.defended_label
        return self.clean.defended_label if self.clean else None


def save(out: Path, record: Record, found: Found) -> AttackRecord:
    """The record of an attack; the patched image goes into a file of its own."""
    best = found.best
    common: dict[str, Any] = {
        "index": record.index,
        "name": record.name,
        "label": record.label,
        "certified": record.certified,
        "ways": found.ways,
        "defended_label": found.answer,
    }
    if best is None:
        vanilla = found.clean.vanilla_label if found.clean else None
        return AttackRecord(**common, broken=True, vanilla_label=vanilla)
    name = f"{PICTURES}/{record.index}.png"
    write_png(out / name, best.patched)
    return AttackRecord(
        **common,
        broken=best.broken,
        top=best.attempt.top,
        left=best.attempt.left,
        height=best.attempt.patch_size[0],
        width=best.attempt.patch_size[1],
        row=best.attempt.row,
        target=best.attempt.target,
        vanilla_label=best.verdict.vanilla_label,
        attempts=len(found.results),
        image=name,
        pixels=pixels_sha256(best.patched),
    )


def check_certificate(out: Path, item: Item, record: Record, found: Found, manifests: dict[str, Any]) -> None:
    """Stop if a certified image was broken, with all that is needed to replay it in a folder of its own.

    Raises SoundnessError, which names that folder.
    """
    withstood = found.best is not None and not found.best.broken
    if withstood or not record.certified:
        return
    folder = out / f"broken-certificate-{record.index}"
    case = {"record": record.model_dump(mode="json"), "answer": found.answer, **manifests}
    if item.pixels is not None:
        write_png(folder / "clean.png", item.pixels)
    case["patch"] = _write_patch(folder, found.best)
    write_atomically(folder / "case.json", json.dumps(case, indent=2).encode())
    margin = "none" if record.margin is None else f"{record.margin:g}"
    raise SoundnessError(
        f"image {record.index} ({record.name!r}): expected the certified answer {record.label}, found "
        f"{found.answer}; the certificate's margin was {margin}; replay it from {folder}"
    )


def _write_patch(folder: Path, best: Result | None) -> dict[str, Any] | None:
    """Where the patch is; its content and the patched image become files. None if the clean image is
    wrong."""
    if best is None:
        return None
    attempt = best.attempt
    write_png(folder / "patch.png", (attempt.content * 255).round().to(torch.uint8))
    write_png(folder / "patched.png", best.patched)
    return {"top": attempt.top, "left": attempt.left, "row": attempt.row, "target": attempt.target}


def write_png(path: Path, pixels: Tensor) -> None:
    """Write a (3, h, w) uint8 tensor as a PNG of those very pixels."""
    data = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(data, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data.getvalue())
