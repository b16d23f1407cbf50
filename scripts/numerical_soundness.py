"""How far do logits move with what should not matter: the batch a view is computed in, and the number of threads?

    python scripts/numerical_soundness.py --model runs/digits --records runs/digits-k6 --data digits --limit 20

For some images of a certification, every one- and two-mask view is computed alone, in batches of two sizes and in another
order, and with two threads, in float32 and in bf16. A certificate can flip only if the margin of one of its views is
smaller than what the margin moves by; the records say how many certificates have such a margin.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from certipatch.data import Images, as_float
from certipatch.network import Network
from certipatch.options import as_certified, images_as_certified, open_model, source_for
from certipatch.records import read_manifest, read_records
from certipatch.views import check_logits, window_tensor

WAYS = ((128, 1, False), (128, 1, True), (32, 1, True), (128, 2, False), (1, 1, False))  # batch size, threads, shuffled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--records", required=True, type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split")
    parser.add_argument("--limit", type=int, default=20)
    arguments = parser.parse_args()

    source = images_as_certified(arguments.records, source_for(arguments.model, arguments.data, arguments.split, None))
    spec, network, _ = open_model(arguments.model, source, None, False, None, None)
    masks, options = as_certified(arguments.records, spec, network)
    fill = torch.tensor(read_manifest(arguments.records)["experiment"]["fill"])
    some = Images(source.first(arguments.limit), spec)
    pixels = torch.stack([item.pixels for item in map(some.__getitem__, range(len(some))) if item.pixels is not None])
    images, (i, j) = as_float(pixels), np.triu_indices(len(masks))
    windows = window_tensor(masks, torch.device("cpu"))
    pairs = torch.cat([windows[i], windows[j]], dim=1).repeat(len(images), 1, 1)
    which = torch.arange(len(images)).repeat_interleave(len(i))
    shuffled = torch.randperm(len(which), generator=torch.Generator().manual_seed(0))

    certified = [record for record in read_records(arguments.records) if record.certified]
    margins = np.array([record.margin for record in certified])
    for precision in ("32-true", "bf16-mixed"):
        ways = []
        for batch_size, threads, shuffle in WAYS:
            order = shuffled if shuffle else torch.arange(len(which))
            torch.set_num_threads(threads)
            look = Network(network, masks, fill=fill, batch_size=batch_size, precision=precision, compile=False)
            parts = [check_logits(look(images[which[some]], pairs[some]), len(some)) for some in torch.split(order, batch_size)]
            best, back = torch.cat(parts).topk(2, dim=1), order.argsort()
            ways.append((best.indices[back, 0].numpy(), (best.values[:, 0] - best.values[:, 1])[back].numpy()))
        labels, gaps = (np.stack(values) for values in zip(*ways, strict=True))
        same = (labels == labels[0]).all(axis=0)
        moved = float((gaps.max(axis=0) - gaps.min(axis=0))[same].max())
        flipped = float(gaps[:, ~same].max()) if (~same).any() else 0.0
        found = {
            "precision": precision,
            "views": len(which),
            "ways": len(ways),
            "largest_move_of_a_margin": moved,
            "views_whose_label_changes": int((~same).sum()),
            "largest_margin_of_those": flipped,
        }
        if precision == options["precision"]:
            stated = max(moved, flipped)
            found |= {
                "certified": len(certified),
                "certified_with_smaller_margin": int((margins <= stated).sum()),
                "smallest_margin": float(margins.min()),
            }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
