"""How much search does Multi-size Greedy Cutout need? Cheaper searches against the exact one.

    python benchmarks/cheaper_search.py --data ../shared/data/cifar10 --write benchmarks/results/NAME

trains and certifies, at equal epochs, as the setup cifar10-48px of the recipe table3 does, in all but the
search: timm's test_resnet, trained on 50,000 images of CIFAR-10 at 48 pixels, fine-tuned on 4,000 and
certified on 1,000. A search only has to find *bad* masks: what it misses costs certified accuracy, never
soundness. The trials are functions here and not in the package, which has the one that was kept:
``--search-every``, here every-other and every-third, which give the same weights. A killed run of this script
continues with the training it was at; one to five minutes a row and seed on one core, and eight for the
network that all begin with.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certipatch.geometry.masks import MaskSet
from certipatch.records.read import read_folder, read_written
from certipatch.records.schema import EPOCHS
from certipatch.report.certification import summarize
from certipatch.reproduce.done import is_done, training
from certipatch.reproduce.plan import Run, plan
from certipatch.reproduce.recipe import read_recipe
from certipatch.reproduce.run import run as run_all
from certipatch.runtime.devices import make_fabric
from certipatch.training.strategies import STRATEGIES, Strategy
from certipatch.views.losses import losses
from certipatch.views.masked import Masked, frozen, mask_images, visible, window_tensor

SMALL = 32  # pixels, of 48, that the search at low resolution sees

Search = Callable[..., list[Tensor]]  # called as a strategy is
# (which of the four choices, (N, C) candidates) -> (N, fewer) candidates
Pick = Callable[[int, Tensor], Tensor]


def everything(_choice: int, candidates: Tensor) -> Tensor:
    return candidates


def four_masks(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: MaskSet,
    *,
    fill: Tensor,
    pick: Pick,
    seen: Callable[[Tensor], Tensor],
) -> Tensor:
    """(N, 4): M1, M11, m3, m6 of each image.

    Each is the worst of the candidates that ``pick`` leaves, for what ``seen`` predicts. The coarse mask M1
    contains M11, so its loss on x.M11 is known from the first choice, and it is always in the third.
    """
    coarse, children = masks.coarsen()
    every, child = torch.arange(len(coarse)).expand(len(images), -1), torch.tensor(children)

    def worst(
        images: Tensor, of: MaskSet, candidates: Tensor, known: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        with frozen(model):
            windows = window_tensor(of, images.device)[candidates]
            found = losses(Masked(seen, fill), images, labels, windows)
        table = torch.full((len(images), len(of)), -torch.inf).scatter(1, candidates, found)
        if known:
            table.scatter_(1, known[0][:, None], known[1][:, None])
        index = table.argmax(dim=1)  # the lowest of equals
        return index, table.gather(1, index[:, None])[:, 0]

    def finest(images: Tensor, candidates: Tensor) -> Tensor:
        return candidates[:, 0] if candidates.shape[1] == 1 else worst(images, masks, candidates)[0]

    M1, loss = worst(images, coarse, pick(0, every))
    M11 = finest(images, pick(1, child[M1]))
    others = every[:, :-1] + (every[:, :-1] >= M1[:, None])
    masked = mask_images(images, visible(hide(masks, M11), masks.image_size), fill)
    m3, _ = worst(masked, coarse, pick(2, others), known=(M1, loss))
    m6 = finest(masked, pick(3, child[m3]))
    return torch.stack([M1, M11, m3, m6], dim=1)


def hide(masks: MaskSet, *chosen: Tensor) -> Tensor:
    """(N, windows, 4): those of the masks chosen for each image."""
    return window_tensor(masks, chosen[0].device)[torch.stack(chosen, dim=1)].flatten(1, 2)


def copies(masks: MaskSet, four: Tensor) -> list[Tensor]:
    M1, M11, m3, m6 = four.unbind(1)
    return [hide(masks.coarsen()[0], M1, m3), hide(masks, M11, m6)]


def some(share: float, generator: torch.Generator, candidates: Tensor, first: Tensor | None = None) -> Tensor:
    """A random share of each image's candidates, rounded up.

    With ``first`` (N,) among them where it is a candidate.
    """
    scores = torch.rand(candidates.shape, generator=generator)
    if first is not None:
        scores = scores + (candidates == first[:, None])
    return candidates.gather(1, scores.topk(math.ceil(share * candidates.shape[1]), dim=1).indices)


def multisize_share(share: float) -> Search:
    """A random share of the candidates in each of the four choices."""

    def strategy(model, images, labels, masks, *, fill, generator, **_):
        def pick(_choice, candidates):
            return some(share, generator, candidates)

        return copies(masks, four_masks(model, images, labels, masks, fill=fill, pick=pick, seen=model))

    return strategy


def random_first() -> Search:
    """M1 and its child M11 at random; only the second round is searched."""

    def strategy(model, images, labels, masks, *, fill, generator, **_):
        def pick(choice, candidates):
            return some(1e-9, generator, candidates) if choice < 2 else candidates

        return copies(masks, four_masks(model, images, labels, masks, fill=fill, pick=pick, seen=model))

    return strategy


def last_winners() -> Search:
    """Half of the candidates, what won for the image an epoch ago among them.

    The pixels say which image it is.
    """
    memory: dict[bytes, Tensor] = {}

    def strategy(model, images, labels, masks, *, fill, generator, **_):
        keys = [image.numpy().tobytes() for image in images]
        last = torch.stack([memory.get(key, torch.full((4,), -1)) for key in keys])

        def pick(choice, candidates):
            return some(0.5, generator, candidates, last[:, choice])

        four = four_masks(model, images, labels, masks, fill=fill, pick=pick, seen=model)
        memory.update(zip(keys, four, strict=True))
        return copies(masks, four)

    return strategy


def reused(due: Callable[[int], bool], *, starting_weights: bool = False) -> Search:
    """Search when it is ``due`` at an image's n-th visit, and use again what was found then.

    This is ``--search-every`` of the package.
    """
    memory: dict[bytes, tuple[int, Tensor]] = {}
    start: dict[str, Tensor] = {}

    def strategy(model, images, labels, masks, *, fill, **_):
        start.update(start or {key: value.clone() for key, value in model.state_dict().items()})

        def seen(views):
            return torch.func.functional_call(model, start, (views,)) if starting_weights else model(views)

        keys = [image.numpy().tobytes() for image in images]
        visits, four = map(
            list, zip(*(memory.get(key, (0, torch.zeros(4, dtype=torch.int64))) for key in keys), strict=True)
        )
        found, search = torch.stack(four), torch.tensor([due(visit) for visit in visits])
        if search.any():
            found[search] = four_masks(
                model, images[search], labels[search], masks, fill=fill, pick=everything, seen=seen
            )
        memory.update({key: (visit + 1, row) for key, visit, row in zip(keys, visits, found, strict=True)})
        return copies(masks, found)

    return strategy


def low_resolution() -> Search:
    """The exact search on smaller views."""

    def strategy(model, images, labels, masks, *, fill, **_):
        def seen(views):
            return model(F.interpolate(views, (SMALL, SMALL), mode="bilinear", antialias=True))

        return copies(masks, four_masks(model, images, labels, masks, fill=fill, pick=everything, seen=seen))

    return strategy


def coarse_share(share: float) -> Search:
    """greedy-coarse over a random share of the candidates of both rounds."""

    def strategy(model, images, labels, masks, *, fill, generator, **_):
        coarse = masks.coarsen()[0]
        every = torch.arange(len(coarse)).expand(len(images), -1)

        def worst(images, candidates):
            with frozen(model):
                windows = window_tensor(coarse, images.device)[candidates]
                found = losses(Masked(model, fill), images, labels, windows)
            return candidates.gather(1, found.argmax(dim=1, keepdim=True))[:, 0]

        m1 = worst(images, some(share, generator, every))
        others = every[:, :-1] + (every[:, :-1] >= m1[:, None])
        m2 = worst(
            mask_images(images, visible(hide(coarse, m1), masks.image_size), fill),
            some(share, generator, others),
        )
        return [hide(coarse, m1, m2)]

    return strategy


@dataclass(frozen=True)
class Trial(Strategy):
    """A strategy that is a function here; what it costs is counted on the model, not stated."""

    search: Search

    def __call__(self, *arguments: Any, **options: Any) -> list[Tensor]:
        return self.search(*arguments, **options)


def trial(name: str, search: Search) -> Strategy:
    """A search as a row of ``STRATEGIES``."""
    if isinstance(search, Strategy):
        return search
    return Trial(name, "", by="loss", copies=2, passes=lambda _masks: 0, search=search)


def exact() -> Search:
    return STRATEGIES["greedy-multisize"]


def every(n: int) -> Callable[[], Search]:
    return partial(reused, lambda visit: visit % n == 0)


EXACT, LONGER = "greedy-multisize", "greedy-multisize, 6 epochs"
# Row: what it is compared with, what it is, and how to make it.
TRIALS: dict[str, tuple[str, str, Callable[[], Search]]] = {
    EXACT: ("", "the package's exact search", exact),
    "every-other": (
        EXACT,
        "searched at every other visit of an image, what was found used again in between",
        every(2),
    ),
    "every-third": (EXACT, "searched at every third visit: here the first", every(3)),
    "half": (
        EXACT,
        "a random half of the candidates in each of the four choices",
        partial(multisize_share, 0.5),
    ),
    "last-winners": (EXACT, "half, with the image's winners of its last epoch among it", last_winners),
    "random-first": (EXACT, "M1 and M11 at random, only m3 and m6 searched", random_first),
    "quarter": (EXACT, "a random quarter; a single candidate needs no pass", partial(multisize_share, 0.25)),
    "frozen": (
        EXACT,
        "searched once, with the weights at the start",
        partial(reused, lambda visit: visit == 0, starting_weights=True),
    ),
    "low-resolution": (EXACT, f"the search sees {SMALL} pixels; its passes count (32/48)^2", low_resolution),
    "random-both": (
        EXACT,
        "no search at all: two coarse, two fine masks at random",
        lambda: STRATEGIES["random-both"],
    ),
    LONGER: ("", "the package's exact search", exact),
    "every-other, 6 epochs": (LONGER, "searched in three of the six epochs", every(2)),
    "every-third, 6 epochs": (LONGER, "searched in two of the six epochs", every(3)),
    "half, 6 epochs": (LONGER, "a random half of the candidates", partial(multisize_share, 0.5)),
    "greedy-coarse": ("", "the package's exact search", lambda: STRATEGIES["greedy-coarse"]),
    "half-coarse": ("greedy-coarse", "greedy-coarse over a random half", partial(coarse_share, 0.5)),
}
PASS = {"low-resolution": (SMALL / 48) ** 2}  # what a pass of its search costs of a whole one


def runs_of(row: str, seeds: list[int], scale: float) -> list[Run]:
    """The runs of a trial: those of greedy-multisize in the recipe under another name."""
    exact = plan(read_recipe("table3"), only="cifar10-48px,test_resnet,greedy-multisize", scale=scale)
    strategy, _, longer = row.partition(", ")
    epochs = int(longer.removesuffix(" epochs") or exact[0].epochs)
    return [replace(run, strategy=strategy, row=row, epochs=epochs) for run in exact if run.seed in seeds]


def result(run: Run, out: Path) -> dict[str, Any] | None:
    """What is known of one run once it is complete: shares, certified images by k, and counted passes."""
    if not is_done(run, out):
        return None
    lines = read_written(out / run.name, EPOCHS)
    # What is recorded is search and gradient step; a view of the latter is worth 3 passes.
    searched = sum(line["forward_equivalents"] - 3 * line["masked_views"] for line in lines)
    images = sum(line["images"] for line in lines)
    found: dict[str, Any] = {
        "seed": run.seed,
        "passes": searched / images * PASS.get(run.row, 1),
        "epochs": len(lines),
        "seconds": sum(line["seconds"] for line in lines),
    }
    for patch, k in run.certifications:
        folder = read_folder(out / run.certified(patch, k))
        summary = summarize(folder)
        found[f"certified k={k}"] = summary.certified_robust_accuracy.count
        found[f"clean k={k}"] = summary.clean_accuracy.count
        found["vanilla"], found["images"] = summary.vanilla_accuracy.count, summary.vanilla_accuracy.images
        found[f"which k={k}"] = [int(record.certified) for record in folder.records]
    return found


def results_of(row: str, seeds: list[int], scale: float, out: Path) -> list[dict[str, Any]]:
    """What is known of the runs of a trial that are complete."""
    found = [result(run, out) for run in runs_of(row, seeds, scale)]
    return [one for one in found if one]


def difference(trial: list[dict[str, Any]], exact: list[dict[str, Any]], k: int) -> str:
    """Certified points more than the exact search, with a 95 % interval over the images.

    Of the seeds that both have.
    """
    which = f"which k={k}"
    pairs = [(a[which], b[which]) for a in trial for b in exact if a["seed"] == b["seed"]]
    if not pairs:
        return ""
    of_seed = [[x - y for x, y in zip(a, b, strict=True)] for a, b in pairs]
    per_image = [mean(differences) for differences in zip(*of_seed, strict=True)]
    half = 196 * stdev(per_image) / math.sqrt(len(per_image))
    return f"{100 * mean(per_image):+.1f} ± {half:.1f}"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| search | epochs | passes of search per image and epoch | certified k=3 | against exact | "
        "certified k=6 | against exact | clean k=3 | clean k=6 | vanilla | what it is |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row, found in results.items():
        if not found:
            continue

        def share(key: str, found: list[dict[str, Any]] = found) -> str:
            values = [100 * one[key] / one["images"] for one in found]
            return f"**{mean(values):.1f}** ({', '.join(f'{value:.1f}' for value in values)})"

        rival = results.get(TRIALS[row][0], [])
        cells = [row, str(found[0]["epochs"]), f"{mean(one['passes'] for one in found):.1f}"]
        for k in (3, 6):
            cells += [share(f"certified k={k}"), difference(found, rival, k)]
        cells += [share("clean k=3"), share("clean k=6"), share("vanilla"), TRIALS[row][1]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


NOTES = """Accuracies in %: mean of the seeds, then each seed. passes of search: counted on the model, the
exact search's 25 (17) being 9 + 4 + 8 + 4 (9 + 8). against exact: percentage points against the exact search
for as many epochs with the same seeds, and a 95 % interval over the test images.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder with the train.tar and test.tar of CIFAR-10")
    parser.add_argument("--out", type=Path, default=Path("runs/cheaper"), help="folder of the runs")
    parser.add_argument("--write", type=Path, help="also write the table to NAME.md and NAME.json")
    parser.add_argument("--only", help="rows, separated by ';'")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the images, for a quick look")
    parser.add_argument("--show", action="store_true", help="run nothing, show what there is")
    asked = parser.parse_args()

    rows = asked.only.split(";") if asked.only else list(TRIALS)
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    fabric = cache(lambda precision: make_fabric(device="cpu", precision=precision))

    def show() -> str:
        results = {row: results_of(row, seeds, asked.scale, asked.out) for row in TRIALS}
        text = table(results)
        if asked.write:
            asked.write.with_suffix(".md").write_text(f"# Cheaper searches\n\n{text}\n{NOTES}")
            kept = {
                row: [{k: v for k, v in one.items() if "which" not in k} for one in found]
                for row, found in results.items()
            }
            about = {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "rows": kept,
            }
            asked.write.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
        return text

    for seed in [] if asked.show else seeds:
        for row in rows:
            (run,) = runs_of(row, [seed], asked.scale)
            if training(run, asked.out) is None:
                # What a strategy remembered is lost with its process: begin again.
                shutil.rmtree(asked.out / run.name, ignore_errors=True)
            STRATEGIES[run.strategy] = trial(run.strategy, TRIALS[row][2]())
            failures = run_all(
                [run], asked.out, locations={run.setup.data: asked.data}, fabric=fabric, after_each=show
            )
            if failures:
                raise SystemExit(failures[0])
    print(show())


if __name__ == "__main__":
    main()
