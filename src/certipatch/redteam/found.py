"""What became of an attacked image: its record, its patched picture, and the case of a certificate that
broke."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..data.source import Item, pixels_sha256
from ..defenses.contract import Verdict
from ..errors import BrokenCertificateError
from ..records.files import write_atomically
from ..records.schema import AttackRecord, PatchCleanserRecord, PlacesAttacked, Record
from .climb import Result
from .places import AtPlaces

PICTURES = "patched"


@dataclass(frozen=True)
class Found:
    """What became of one image.

    Attributes:
        clean: the answer without a patch; None for an image that cannot be read.
        ways: the number of goals that the clean table leaves open.
        results: everything that was judged; nothing if the answer was wrong anyway.
        dropped: how many more were judged, none of which came nearer.
        places: what became of it at places that are not the attacker's choice; None if the answer was wrong
            anyway, or if it was not certified by place.
    """

    clean: Verdict | None
    ways: int = 0
    results: tuple[Result, ...] = ()
    places: AtPlaces | None = None
    dropped: int = 0

    @property
    def broken_proof(self) -> Result | None:
        """An attempt that broke the answer at a proven place, which none can."""
        return next((one for one in self.places.proven if one.broken), None) if self.places else None

    @property
    def best(self) -> Result | None:
        """The attempt that broke the image, or else came nearest to it."""
        return min(
            self.results, key=lambda result: (not result.broken, result.attempt.shortfall), default=None
        )

    def brief(self) -> Found:
        """The same with the best attempt alone, to be sent from one machine to another."""
        places = self.places and replace(self.places, proven=tuple(map(_on_cpu, self.places.proven)))
        best = tuple(_on_cpu(one) for one in [self.best] if one)
        return replace(self, results=best, places=places, dropped=len(self.results) - len(best))

    @property
    def answer(self) -> int | None:
        """The defended label under the best attempt, or without a patch if none was made."""
        if self.best:
            return self.best.verdict.defended_label
        return self.clean.defended_label if self.clean else None


def _on_cpu(result: Result) -> Result:
    attempt = replace(result.attempt, content=result.attempt.content.cpu())
    return replace(result, attempt=attempt, patched=result.patched.cpu())


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
    if isinstance(record, PatchCleanserRecord) and record.proven is not None:
        common["places"] = _at_places(found)
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
        attempts=len(found.results) + found.dropped,
        image=name,
        pixels=pixels_sha256(best.patched),
    )


def _at_places(found: Found) -> PlacesAttacked:
    """An image that is wrong without a patch is wrong at every place."""
    if found.places is None:
        return PlacesAttacked(proven_share=0.0, broken=True)
    one = found.places
    drawn = dict(zip(("top", "left", "height", "width"), one.drawn or (None,) * 4, strict=True))
    return PlacesAttacked(proven_share=one.share, broken=one.broken, proven_attempts=len(one.proven), **drawn)


def check_certificate(out: Path, item: Item, record: Record, found: Found, manifests: dict[str, Any]) -> None:
    """Stop if a certified image was broken, or another at a proven place, with all that is needed to replay
    it in a folder of its own.

    Raises BrokenCertificateError, which names that folder.
    """
    withstood = found.best is not None and not found.best.broken
    best, answer, proof = found.best, found.answer, found.broken_proof
    if proof is not None:
        best, answer = proof, proof.verdict.defended_label
    elif withstood or not record.certified:
        return
    folder = out / f"broken-certificate-{record.index}"
    case = {"record": record.model_dump(mode="json"), "answer": answer, **manifests}
    if item.pixels is not None:
        write_png(folder / "clean.png", item.pixels)
    case["patch"] = _write_patch(folder, best)
    write_atomically(folder / "case.json", json.dumps(case, indent=2).encode())
    margin = "none" if record.margin is None else f"{record.margin:g}"
    raise BrokenCertificateError(
        f"image {record.index} ({record.name!r}): expected the certified answer {record.label}, found "
        f"{answer}; the certificate's margin was {margin}; replay it from {folder}"
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
