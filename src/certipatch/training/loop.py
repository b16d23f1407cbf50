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
import torch.nn.functional as F
from lightning_fabric import Fabric
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset

from ..data.source import Images, Item, as_float, collate
from ..geometry.masks import MaskSet
from ..records.store import Store
from ..runtime.devices import derived_seed
from ..runtime.processes import together, total
from ..runtime.progress import Progress
from ..runtime.signals import SIGNALS
from .augment import Augmented
from .batches import epoch_batches, images_used, part_of
from .checkpoint import Checkpoint
from .config import TrainConfig
from .counts import EpochCounts, count_step, mean_loss
from .curves import Curves
from .held_out import certified
from .kept import HELD_OUT, Kept
from .masking import Masking
from .optimization import make_optimizer, make_schedule


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
    model.to(fabric.device)
    optimizer, kept = make_optimizer(model, config), Kept(model, config)
    batch_size = config.batch_size * fabric.world_size
    steps = len(epoch_batches(len(images), batch_size, seed=0))
    set_lr = make_schedule(optimizer, config, steps)
    checkpoint = Checkpoint(store, model, optimizer, kept)
    start = checkpoint.restore(fabric)
    wrapped, opt = fabric.setup(_normalising_together(model, fabric), optimizer)
    masking = Masking(model, masks, config, fabric, len(images))
    masking.compile(compile)
    masking.found = masking.found if start.found is None else start.found

    for epoch in range(start.epoch, config.epochs):
        batches = epoch_batches(len(images), batch_size, derived_seed(config.seed, epoch))
        step, counts = 0, EpochCounts()
        if epoch == start.epoch:
            step, counts = start.step, start.counts
            progress.resume(epoch * images_used(batches, fabric) + images_used(batches[:step], fabric))
            curves.begin(epoch * steps + step)
        with _interruptible() as interrupted:
            for items in _loader(images, batches[step:], epoch, fabric, workers):
                started, lr = time.monotonic(), set_lr(epoch, step)
                with together(fabric):
                    views, targets, searched = masking(items, epoch, derived_seed(config.seed, epoch, step))
                masking.share(items)
                logits, loss = _step(wrapped, opt, views, targets, fabric)
                _share_statistics(model, fabric)
                step += 1
                kept.update(epoch * steps + step)
                mine = count_step(logits, targets, loss, images=len(items), searched=searched)
                done = total(fabric, {**mine, "stop": interrupted(), "save": checkpoint.due})
                mean = mean_loss(done, epoch, step)  # refused before anything of this step is saved
                counts.add(done, seconds := time.monotonic() - started)
                note = counts.note(epoch, config.epochs, store.lines if store else [])
                progress.advance(int(done["images"]), note)
                curves.add_step(epoch * steps + step, mean, lr, done["images"] / seconds)
                if done["stop"] or done["save"]:
                    with together(fabric):
                        curves.flush()
                        checkpoint.save(epoch, step, counts, masking.found)
                if done["stop"]:
                    raise KeyboardInterrupt
        if start.lines <= epoch:  # a kill between this line and the checkpoint repeats only the latter
            judged, passes = _judge(kept.now, validation, held_out, masks, fabric, workers)
            counts.passes += passes
            with together(fabric):
                if store:
                    store.append([{**counts.line(epoch, set_lr(epoch, steps - 1)), **judged}])
        with together(fabric):
            if store:
                kept.compare(store.lines)
                curves.add_epoch((epoch + 1) * steps, store.lines[epoch])
            curves.flush()
            checkpoint.save(epoch + 1, 0, EpochCounts(), masking.found)

    with together(fabric):
        checkpoint.finish()


def _step(
    model: nn.Module, optimizer: Optimizer, views: Tensor, targets: Tensor, fabric: Fabric
) -> tuple[Tensor, Tensor]:
    """One gradient step on the mean loss of the views; their logits before it, and the loss."""
    model.train()
    logits = model(views)
    loss = F.cross_entropy(logits, targets)
    optimizer.zero_grad()
    fabric.backward(loss)
    optimizer.step()
    return logits, loss


def _loader(
    images: Images, batches: list[list[int]], epoch: int, fabric: Fabric, workers: int
) -> DataLoader[Item]:
    """The images of this process's part of each batch, as lists of items."""
    parts: list[Any] = [part_of(batch, fabric.global_rank, fabric.world_size) for batch in batches]
    if isinstance(images, Augmented):
        parts = [[(index, epoch) for index in part] for part in parts]
    return DataLoader(images, batch_sampler=parts, collate_fn=list, num_workers=workers)


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
    correct = 0
    mine = Subset(images, range(fabric.global_rank, len(images), fabric.world_size))
    with together(fabric):
        for items in DataLoader(mine, batch_size=256, collate_fn=list, num_workers=workers):
            pixels, labels = collate(items)
            with fabric.autocast():
                correct += int((model(as_float(pixels.to(fabric.device))).argmax(1).cpu() == labels).sum())
    return {"correct": int(total(fabric, {"correct": correct})["correct"]), "images": len(images)}


def _normalising_together(model: nn.Sequential, fabric: Fabric) -> nn.Sequential:
    """The model, with BatchNorm over the whole batch where several processes share it on CUDA; changed in
    place."""
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        # timm's conversion: torch's own would drop the activation in timm's BatchNormAct2d.
        convert_sync_batchnorm(model)
    return model


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
