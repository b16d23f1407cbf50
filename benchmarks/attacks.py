"""Does a simple attack find an image that ``certipatch attack`` misses, with as many queries?

    python benchmarks/attacks.py RUN CERTIFIED [CERTIFIED ...] --data digits [--images 60] [--seeds 3] [--all]

Of each certification, the images that are answered right and not certified, with the fewest goals open to an
attacker, are attacked by ours and, where ours fails, by each attack of ``simple_attacks.py``; with ``--all``
also where ours breaks the image. A simple attack may ask as often as ours did on the image where it asked
most, judging and clean tables included. Printed is how many images each breaks and which of them ours misses,
for each seed; the exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from simple_attacks import SIMPLE, Counted, OutOfQueriesError, Victim
from torch import Tensor

from certipatch.certification.restore import certified_masks, read_certification
from certipatch.data.load import judged_split, load_source
from certipatch.data.source import Images, as_float
from certipatch.defenses.patchcleanser.defense import PatchCleanser
from certipatch.models.runs import open_run
from certipatch.records.read import read_folder
from certipatch.redteam.climb import AttackConfig, attack_images
from certipatch.redteam.goals import clean_tables, goals
from certipatch.redteam.harness import Harness
from certipatch.views.masked import find_mean


@dataclass(frozen=True)
class Attacked:
    """The defended model of a certification, and the images to attack by their numbers: pixels and label."""

    model: Counted
    defense: PatchCleanser
    images: dict[int, tuple[Tensor, int]]


def open_attacked(run: Path, certified: Path, data: str, split: str | None, most: int) -> Attacked:
    manifest, opened = read_certification(certified), open_run(run)
    model = Counted(opened.network).eval()
    fill = torch.as_tensor(find_mean(opened.network))
    defense = PatchCleanser(model, certified_masks(manifest, opened), fill=fill.expand(3), batch_size=128)
    records = [r for r in read_folder(certified).records if r.defended_label == r.label and not r.certified]
    source = load_source(data, split=judged_split(data, split))
    every = {name: i for i, name in enumerate(source.names)}
    images = Images(source, opened.spec)
    taken = {r.index: (images[every[r.name]].readable(), r.label) for r in records}
    tables = clean_tables(defense, as_float(torch.stack([pixels for pixels, _ in taken.values()])))
    ways = {
        r.index: len(goals(defense.masks, table, r.label)) for r, table in zip(records, tables, strict=True)
    }
    hardest = sorted(taken, key=lambda index: ways[index])[:most]
    return Attacked(model, defense, {index: taken[index] for index in hardest})


def ours(attacked: Attacked, index: int, seed: int) -> bool:
    pixels, label = attacked.images[index]
    attacked.model.asked, attacked.model.budget = 0, float("inf")
    ways = goals(attacked.defense.masks, clean_tables(attacked.defense, as_float(pixels[None]))[0], label)
    harness, labels = Harness(attacked.defense, pixels[None]), torch.tensor([label])
    config = AttackConfig()
    (judged,) = attack_images(attacked.model, harness, labels, [ways], config, [seed * 10**6 + index])
    return any(result.broken for result in judged)


def simple(attacked: Attacked, name: str, index: int, seed: int, budget: int) -> bool:
    pixels, label = attacked.images[index]
    masks, fill = attacked.defense.masks, attacked.defense.fill.view(3, 1, 1)
    (image,) = as_float(pixels[None])
    victim = Victim(
        attacked.model, attacked.defense.predict, image, label, masks.patch_sizes[0], masks.keep, fill
    )
    attacked.model.asked, attacked.model.budget = 0, budget
    try:
        patched = SIMPLE[name](victim, torch.Generator().manual_seed(seed * 10**6 + index))
    except OutOfQueriesError:
        return False
    attacked.model.budget = float("inf")
    return int(attacked.defense.predict(patched[None])) != label


def compare(attacked: Attacked, seed: int, *, everywhere: bool) -> bool:
    """Print what each attack breaks; is there an image that a simple one breaks and ours does not?"""
    broken, asked, started = set(), 1, time.perf_counter()
    for index in attacked.images:
        if ours(attacked, index, seed):
            broken.add(index)
        asked = max(asked, attacked.model.asked)
    seconds = time.perf_counter() - started
    missed = sorted(attacked.images.keys() - broken)
    of = f"{len(broken)} of {len(attacked.images)}, {seconds:.0f} s, at most {asked} queries an image"
    print(f"  seed {seed}: ours {of}; missed {missed or 'none'}", flush=True)
    found_beyond = False
    for name in SIMPLE:
        tried = attacked.images.keys() - (set() if everywhere else broken)
        found = {index for index in tried if simple(attacked, name, index, seed, asked)}
        beyond = sorted(found - broken)
        found_beyond |= bool(beyond)
        print(f"    {name}: {len(found)} of {len(tried)}; and not by ours: {beyond or 'none'}", flush=True)
    return found_beyond


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("certified", type=Path, nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--all", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    missed = False
    for certified in asked.certified:
        attacked = open_attacked(asked.run, certified, asked.data, asked.split, asked.images)
        print(f"{certified.name}: {len(attacked.images)} images", flush=True)
        for seed in range(asked.seeds):
            missed |= compare(attacked, seed, everywhere=asked.all)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
