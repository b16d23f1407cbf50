"""What one image costs with a defense by windows: seconds of looking at all its windows, and of the rule.

    python benchmarks/windows.py ARCH [--windows columns:19/5] [--patch 32] [--images 2] [--rounds 3]

A transformer (a timm name) is timed twice, interleaved: with hidden tokens dropped, and with all of them,
filled; a network without tokens once. Weights are random, for they do not change the time. Printed are the
medians of the rounds with their range, and how many times one undefended pass that is.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import timm
import torch

from certipatch.defenses.evidence.defense import WindowDefense
from certipatch.defenses.evidence.rules import BoundedSum
from certipatch.defenses.evidence.shown import ShownWindows
from certipatch.defenses.evidence.votes import BEST_VOTE
from certipatch.geometry.patch import Threat
from certipatch.views.ablated import has_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch")
    parser.add_argument("--windows", default="columns:19/5")
    parser.add_argument("--patch", type=int, default=32)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--classes", type=int, default=1000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = timm.create_model(asked.arch, num_classes=asked.classes).eval()
    size = timm.data.resolve_data_config(model=model)["input_size"][1:]
    images, labels = torch.rand(asked.images, 3, *size), torch.zeros(asked.images, dtype=torch.int64)

    def defended(tokens: str) -> WindowDefense:
        shown = ShownWindows(model, size, asked.windows, tokens=tokens)
        return WindowDefense(
            "timed", shown, BEST_VOTE, lambda reach: BoundedSum(reach, 1), Threat((asked.patch, asked.patch))
        )

    kinds = ("dropped", "filled") if any(map(has_tokens, model.modules())) else ("filled",)
    defenses = {kind: defended(kind) for kind in kinds}
    seconds: dict[str, list[float]] = {name: [] for name in ("one pass", *kinds, "rule")}
    defenses[kinds[0]].examine(images, labels)
    shown = defenses[kinds[0]].windows
    logits = shown.look(images)[0].numpy()
    with torch.inference_mode():
        for turn in range(asked.rounds + 1):  # the first warms up
            for name, times in seconds.items():
                began = time.perf_counter()
                if name == "one pass":
                    model(images)
                elif name == "rule":
                    for one in logits:
                        defenses[kinds[0]]._verdict(0, 0, one, proven=False)
                else:
                    defenses[name].windows.look(images)
                if turn:
                    times.append((time.perf_counter() - began) / len(images))
    height, width = size
    print(
        f"{asked.arch}, {asked.windows}: {len(shown.sights)} windows of {height}x{width}, one thread of torch"
    )
    for name, times in seconds.items():
        share, most = median(times) / median(seconds["one pass"]), max(times)
        print(f"{name:9} {median(times):8.4f} s an image ({min(times):.4f}-{most:.4f}), {share:6.2f} passes")
    if shown.tokens:
        kept = sum(len(shown.tokens.kept(sight)) for sight in shown.sights)
        print(f"tokens kept: {kept / len(shown.sights):.1f} of {shown.tokens.grid[0] * shown.tokens.grid[1]}")


if __name__ == "__main__":
    main()
