"""How far do logits move with what should not matter: the batch of a view, and the number of threads?

    python scripts/numerical_soundness.py --model runs/digits --records runs/digits-k6 --records
    runs/digits-k6-bf16 --data digits --limit 20

For some images of a certification, every one- and two-mask view is computed alone, in batches of two sizes
and in another order, and with two threads, in float32 and in bf16, and the two are compared; with
``--compiled`` by compiled code too. A certificate
can flip only if the margin of one of its views is smaller than what the margin moves by; records of the same
precision say how many certificates have such a margin, and how many one below the tolerance of ``verify``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from certipatch.certification.restore import certified_masks, images_as_certified
from certipatch.cli.open import open_both
from certipatch.config import DataAsked, ModelAsked
from certipatch.data.source import Images, as_float
from certipatch.records.read import read_folder
from certipatch.verify.views import TOLERANCE
from certipatch.views.masked import check_logits, window_tensor
from certipatch.views.network import Network

WAYS = (
    (128, 1, False, False),
    (128, 1, True, False),
    (32, 1, True, False),
    (128, 2, False, False),
    (1, 1, False, False),
)  # batch size, threads, shuffled, compiled
COMPILED = (32, 1, False, True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--records",
        required=True,
        type=Path,
        action="append",
        help="of the same images; one for each precision",
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--split")
    parser.add_argument("--class-map")
    parser.add_argument("--weights")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()

    folders = [read_folder(path) for path in arguments.records]
    first = folders[0]
    source, opened = open_both(
        ModelAsked(arguments.model, arguments.weights),
        DataAsked(arguments.data, arguments.split, arguments.class_map),
        as_in=first.manifest,
    )
    masks, certified = certified_masks(first.manifest, opened), {}
    for folder in folders:
        other = certified_masks(folder.manifest, opened)
        if (other, images_as_certified(folder.manifest, source).describe()) != (masks, source.describe()):
            parser.error(f"{folder.path} is of other masks or images than {first.path}")
        certified[folder.manifest.certification.precision] = np.array(
            [record.margin for record in folder.records if record.certified]
        )
    fill = torch.tensor(first.manifest.certification.fill)
    some = Images(source.first(arguments.limit), opened.spec)
    pixels = torch.stack(
        [item.pixels for item in map(some.__getitem__, range(len(some))) if item.pixels is not None]
    )
    images, (i, j) = as_float(pixels), np.triu_indices(len(masks))
    windows = window_tensor(masks, torch.device("cpu"))
    pairs = torch.cat([windows[i], windows[j]], dim=1).repeat(len(images), 1, 1)
    which = torch.arange(len(images)).repeat_interleave(len(i))
    shuffled = torch.randperm(len(which), generator=torch.Generator().manual_seed(0))

    exact = None
    for precision in ("32-true", "bf16-mixed"):
        ways = []
        for batch_size, threads, shuffle, compiled in (*WAYS, *([COMPILED] if arguments.compiled else [])):
            order = shuffled if shuffle else torch.arange(len(which))
            torch.set_num_threads(threads)
            look = Network(
                opened.network,
                masks,
                fill=fill,
                batch_size=batch_size,
                precision=precision,
                compile=compiled,
                frozen=True,
            )
            parts = [
                check_logits(look(images[which[some]], pairs[some]), len(some))
                for some in torch.split(order, batch_size)
            ]
            best, back = torch.cat(parts).topk(2, dim=1), order.argsort()
            ways.append(
                (best.indices[back, 0].numpy(), (best.values[:, 0] - best.values[:, 1])[back].numpy())
            )
        labels, gaps = (np.stack(values) for values in zip(*ways, strict=True))
        same = (labels == labels[0]).all(axis=0)
        moved = float((gaps.max(axis=0) - gaps.min(axis=0))[same].max())
        flipped = float(gaps[:, ~same].max()) if (~same).any() else 0.0
        exact = (labels[0], gaps[0]) if exact is None else exact
        agree = labels[0] == exact[0]
        found = {
            "precision": precision,
            "views": len(which),
            "ways": len(ways),
            "largest_move_of_a_margin": moved,
            "views_whose_label_changes": int((~same).sum()),
            "largest_margin_of_those": flipped,
            "largest_difference_to_float32": float(np.abs(gaps[0] - exact[1])[agree].max()),
            "views_with_another_label_than_in_float32": int((~agree).sum()),
        }
        if (margins := certified.get(precision)) is not None:
            tolerance = TOLERANCE[precision]
            found |= {
                "certified": len(margins),
                "certified_with_smaller_margin": int((margins <= max(moved, flipped)).sum()),
                f"certified_with_a_margin_below_{tolerance:g}": int((margins <= tolerance).sum()),
                "smallest_margin": float(margins.min()),
            }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
