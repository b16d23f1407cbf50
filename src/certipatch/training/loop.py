"""Fine-tuning on worst-case masked images: the loop in plain sight.

Source: Greedy Cutout. A strategy masks every batch, and the model takes one SGD step on the mean loss of the
masked copies.

Several processes (one a device) share each batch in equal parts and step on their mean gradient, which is one
process's step on the whole batch. They meet where ``fabric`` or ``processes`` is called; only process 0
writes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ..data.source import Images
from ..geometry.masks import MaskSet
from ..records.store import Store
from ..runtime.console import say
from ..runtime.devices import derived_seed
from ..runtime.processes import together, total
from ..runtime.progress import Progress
from ..runtime.signals import SIGNALS
from .batches import Loader, epoch_batches, load, spread
from .checkpoint import Checkpoint
from .config import TrainConfig
from .course import Course
from .curves import Curves
from .depthwise import Layer, in_float32, slow_layers
from .held_out import certified
from .kept import HELD_OUT, Kept
from .losses import Objective
from .masking import Masking
from .memory import say_memory
from .optimization import make_optimizer, make_schedule
from .strategies import STRATEGIES


def fit(
    model: nn.Sequential,
    images: Images,
    validation: Images,
    held_out: Images | None,
    masks: MaskSet,
    config: TrainConfig,
    store: Store | None,
    *,
    fabric: Fabric,
    workers: int,
    compile: bool | None,
    progress: Progress,
    curves: Curves,
) -> None:
    """Train to the end, from the store's checkpoint if there is one. Only process 0 has the store.

    After each epoch the vanilla accuracy on ``validation`` is measured, and how many images of ``held_out``
    are certified, if there are any.

    A killed run that is resumed ends with the same weights on the CPU (of three or more processes: up to
    rounding, as the order of their sums is not fixed).
    """
    _prepare(model, fabric)
    optimizer, kept = make_optimizer(model, config), Kept(model, config)
    batch_size = config.batch_size * fabric.world_size
    steps = len(epoch_batches(len(images), batch_size, seed=0))
    set_lr = make_schedule(optimizer, config, steps)
    checkpoint = Checkpoint(store, model, optimizer, kept)
    start = checkpoint.restore(fabric)
    at_once = config.batch_size * STRATEGIES[config.strategy].copies
    say_memory(model, masks.image_size, at_once, fabric)
    checkpoint.float32 = start.float32 if start.float32 is not None else []
    if start.float32 is None and not config.compile_step:
        checkpoint.float32 = slow_layers(model, masks.image_size, at_once, fabric)
    objective = Objective(model, config, masks.image_size)
    wrapped, opt = fabric.setup(_compiled(objective) if config.compile_step else objective, optimizer)
    loader = Loader(images, fabric, workers)
    masking = Masking(model, masks, config, fabric, len(images))
    masking.prepare(compile)
    masking.found = masking.found if start.found is None else start.found
    course = Course(
        store,
        checkpoint,
        masking,
        fabric,
        epochs=config.epochs,
        steps=steps,
        progress=progress,
        curves=curves,
    )

    for epoch in range(start.epoch, config.epochs):
        batches = epoch_batches(len(images), batch_size, derived_seed(config.seed, epoch))
        step = course.begin(epoch, start, batches)
        with _interruptible() as interrupted:
            for loaded in loader.epoch(batches[step:], epoch):
                started, lr = time.monotonic(), set_lr(epoch, step)
                with together(fabric):
                    views, targets, searched = masking(loaded, epoch, derived_seed(config.seed, epoch, step))
                masking.share(loaded)
                part = (epoch + step / steps) / config.epochs
                logits, loss = _step(wrapped, opt, views, targets, part, fabric, checkpoint.float32)
                _share_statistics(model, fabric)
                step += 1
                kept.update(epoch * steps + step)
                known = {"number": step, "lr": lr, "seconds": time.monotonic() - started}
                course.unseen.add(logits, targets, loss, len(loaded.indices), searched, **known)
                if course.unseen.due(step, steps) or (fabric.world_size == 1 and interrupted()):
                    course.look(epoch, step, stop=interrupted())
        if start.lines <= epoch:  # a kill between this line and the checkpoint repeats only the latter
            judged, passes = _judge(kept.now, validation, held_out, masks, fabric, workers)
            course.write(epoch, set_lr(epoch, steps - 1), judged, passes)
        course.end(epoch)

    with together(fabric):
        checkpoint.finish()


def _step(
    objective: nn.Module,
    optimizer: Optimizer,
    views: Tensor,
    targets: Tensor,
    part: float,
    fabric: Fabric,
    float32: list[Layer],
) -> tuple[Tensor, Tensor]:
    """One gradient step on the mean loss of the views; their logits before it, and the loss.

    ``part``: how much of the training is over, from 0 to 1, by which some losses go. The gradients of the
    layers of ``float32`` are computed so, whatever the precision.
    """
    objective.train()
    logits, loss = objective(views, targets, part)
    optimizer.zero_grad()
    with in_float32(float32):
        fabric.backward(loss)
    optimizer.step()
    return logits, loss


def _judge(
    model: nn.Sequential,
    validation: Images,
    held_out: Images | None,
    masks: MaskSet,
    fabric: Fabric,
    workers: int,
) -> tuple[dict[str, dict[str, int]], int]:
    """What the line of an epoch says of its weights, and the passes of looking at held-out images."""
    found = {"validation_vanilla": vanilla_accuracy(model, validation, fabric, workers)}
    if held_out is None:
        return found, 0
    found[HELD_OUT], passes = certified(model, held_out, masks, fabric, workers)
    return found, passes


@torch.inference_mode()
def vanilla_accuracy(model: nn.Module, images: Images, fabric: Fabric, workers: int = 0) -> dict[str, int]:
    """Undefended accuracy as a fraction: {"correct": c, "images": n}."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=fabric.device)
    with together(fabric):
        for loaded in load(images, spread(len(images), 256, fabric), fabric, workers):
            x, y = loaded.on(fabric.device)
            with fabric.autocast():
                correct += (model(x).argmax(1) == y).sum()
    return {"correct": int(total(fabric, {"correct": int(correct)})["correct"]), "images": len(images)}


def _compiled(model: nn.Module) -> Any:
    """The model, compiled for batches of one shape; the first step compiles it."""
    say("compiling the step: the first one takes a minute or so")
    return torch.compile(model, dynamic=False)


def _prepare(model: nn.Sequential, fabric: Fabric) -> None:
    """Move the model to its device, laid out as an accelerator is fastest with it; changed in place.

    Where several processes share a batch on CUDA, BatchNorm normalises the whole of it.
    """
    model.to(fabric.device)
    if fabric.device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = True  # all batches of a run have one shape
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if fabric.world_size > 1:
        # timm's conversion: torch's own would drop the activation in timm's BatchNormAct2d.
        convert_sync_batchnorm(model)


def _share_statistics(model: nn.Module, fabric: Fabric) -> None:
    """BatchNorm's running statistics become the mean over the processes, so that all search with the same
    network.

    Where the processes normalise the whole batch together, on CUDA, they are the same already.
    """
    if fabric.world_size == 1 or fabric.device.type == "cuda":
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for statistic in filter(torch.is_tensor, (module.running_mean, module.running_var)):
                statistic.copy_(fabric.all_reduce(statistic, reduce_op="mean"))  # type: ignore[arg-type]


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Let the step under way end when Ctrl-C (or a scheduler's signal) comes, so that it can be saved."""
    asked = []
    handlers = {sig: signal.signal(sig, lambda *_: asked.append(True)) for sig in (signal.SIGINT, *SIGNALS)}
    try:
        yield lambda: bool(asked)
    finally:
        for sig, handler in handlers.items():
            signal.signal(sig, handler)
