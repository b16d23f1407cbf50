"""Can any content at a proven place change an answer? Random patches there, and the defense asked again.

    python benchmarks/attacked_places.py RUN CERTIFIED --data digits [--views 100000] [--seed 0]

CERTIFIED is a folder of ``certify --places``. Of each image with a proven place, those without a certificate
first, patches of noise, of one colour, and cut from another image are laid at proven places, drawn evenly,
and the defended answer is compared with the label, until so many views were looked at. The exit code is 1 if
one answer was another. ``certipatch attack`` climbs gradients at such places; these are many simple ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from certipatch.certification.restore import images_as_certified, read_certification, restore
from certipatch.cli.open import open_both
from certipatch.config import DataAsked, ModelAsked
from certipatch.data.source import Images, as_float
from certipatch.defenses.patchcleanser.defense import PatchCleanser
from certipatch.geometry.masks import MaskSet
from certipatch.geometry.places import proven_places
from certipatch.records.read import read_folder
from certipatch.records.schema import PatchCleanserRecord
from certipatch.runtime.devices import make_fabric

AT_ONCE = 32  # patched images


def rows(record: PatchCleanserRecord, least: float) -> np.ndarray:
    """(masks,) bool: whose row is proven with at least this margin."""
    found = np.array([bit == "1" for bit in record.proven or ""])
    found[np.flatnonzero(found)] = np.array(record.proven_margins or ()) >= least
    return found


def patched(
    images: Images, records: list[PatchCleanserRecord], masks: MaskSet, least: float, rng: np.random.Generator
) -> Iterator[tuple[Tensor, PatchCleanserRecord]]:
    """Without an end: an image (3, H, W) uint8 with a patch at a proven place, and its record."""
    where = [[np.argwhere(shape) for shape in proven_places(rows(one, least), masks)] for one in records]
    while True:
        for record, of_shapes in zip(records, where, strict=True):
            shape = int(rng.integers(len(of_shapes)))
            if not len(of_shapes[shape]):
                continue
            (h, w), (top, left) = masks.patch_sizes[shape], rng.choice(of_shapes[shape])
            pixels = images[record.index].readable().clone()
            kind = rng.integers(3)
            if kind == 0:
                content = torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8))
            elif kind == 1:
                content = torch.from_numpy(rng.integers(0, 256, (3, 1, 1), dtype=np.uint8)).expand(3, h, w)
            else:
                other = images[records[rng.integers(len(records))].index].readable()
                y, x = (
                    int(rng.integers(side - size + 1))
                    for side, size in zip(pixels.shape[1:], (h, w), strict=True)
                )
                content = other[:, y : y + h, x : x + w]
            pixels[:, top : top + h, left : left + w] = content
            yield pixels, record


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("certified", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split")
    parser.add_argument("--class-map")
    parser.add_argument("--weights")
    parser.add_argument("--views", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()

    manifest = read_certification(asked.certified)
    source, opened = open_both(
        ModelAsked(asked.model, asked.weights),
        DataAsked(asked.data, asked.split, asked.class_map),
        as_in=manifest,
    )
    images = Images(images_as_certified(manifest, source), opened.spec)
    fabric = make_fabric(device="cpu", precision=manifest.certification.precision)
    defense = restore(manifest, opened, fabric)
    assert isinstance(defense, PatchCleanser)
    least = manifest.rounding
    records = [one for one in read_folder(asked.certified).records if rows(one, least).any()]
    records.sort(key=lambda one: one.certified)
    drawn = patched(images, records, defense.masks, least, np.random.default_rng(asked.seed))
    views = tried = uncertified = broken = 0
    while views < asked.views:
        some = [next(drawn) for _ in range(AT_ONCE)]
        verdicts = defense.examine(as_float(torch.stack([pixels for pixels, _ in some])).to(fabric.device))
        tried += len(some)
        uncertified += sum(not record.certified for _, record in some)
        broken += sum(v.defended_label != record.label for v, (_, record) in zip(verdicts, some, strict=True))
        views += sum(verdict.passes for verdict in verdicts)
        if tried % (AT_ONCE * 20) == 0:
            print(f"{tried} attacked images, {views} views, {broken} answers changed", flush=True)
    print(
        f"{tried} attacked images, {uncertified} of them of images that are not certified, {views} views, "
        f"{broken} answers changed"
    )
    return int(broken > 0)


if __name__ == "__main__":
    raise SystemExit(main())
