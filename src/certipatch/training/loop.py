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

import torch
from lightning_fabric import Fabric
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Subset

from ..data.source import Images, Item, as_float, collate
from ..geometry.masks import MaskSet
from ..records.store import Store
from ..runtime.devices import derived_seed
from ..runtime.processes import together, total
from ..runtime.progress import Progress
from .batches import epoch_batches, images_used, part_of
from .checkpoint import Checkpoint
from .config import TrainConfig
from .counts import EpochCounts, count_step, mean_loss
from .curves import Curves
from .losses import Objective
from .masking import Masking


def fit(
    model: nn.Sequential,
    images: Images,
    validation: Images,
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

    A killed run that is resumed ends with the same weights on the CPU (of three or more processes: up to
    rounding, as the order of their sums is not fixed).
    """
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    checkpoint = Checkpoint(store, model, optimizer)
    start = checkpoint.restore(fabric)
    objective = Objective(_normalising_together(model, fabric), config, masks.image_size)
    wrapped, opt = fabric.setup(objective, optimizer)
    masking = Masking(model, masks, config, fabric, len(images))
    masking.compile(compile)
    masking.found = masking.found if start.found is None else start.found

    for epoch in range(start.epoch, config.epochs):
        lr = opt.param_groups[0]["lr"] = learning_rate(config, epoch)
        seed, batch_size = derived_seed(config.seed, epoch), config.batch_size * fabric.world_size
        batches = epoch_batches(len(images), batch_size, seed)
        step, counts = 0, EpochCounts()
        if epoch == start.epoch:
            step, counts = start.step, start.counts
            progress.resume(epoch * images_used(batches, fabric) + images_used(batches[:step], fabric))
            curves.begin(epoch * len(batches) + step)
        with _interruptible() as interrupted:
            for items in _loader(images, batches[step:], fabric, workers):
                started = time.monotonic()
                with together(fabric):
                    views, targets, searched = masking(items, epoch, derived_seed(config.seed, epoch, step))
                masking.share(items)
                wrapped.train()
                logits, loss = wrapped(views, targets, (epoch + step / len(batches)) / config.epochs)
                opt.zero_grad()
                fabric.backward(loss)
                opt.step()
                _share_statistics(model, fabric)

                step += 1
                mine = count_step(logits, targets, loss, images=len(items), searched=searched)
                done = total(fabric, {**mine, "stop": interrupted(), "save": checkpoint.due})
                mean = mean_loss(done, epoch, step)  # refused before anything of this step is saved
                seconds = time.monotonic() - started
                counts.add(done, seconds)
                note = counts.note(epoch, config.epochs, store.lines if store else [])
                progress.advance(int(done["images"]), note)
                curves.add_step(epoch * len(batches) + step, mean, lr, done["images"] / seconds)
                if done["stop"] or done["save"]:
                    with together(fabric):
                        curves.flush()
                        checkpoint.save(epoch, step, counts, masking.found)
                if done["stop"]:
                    raise KeyboardInterrupt
        if start.lines <= epoch:  # a kill between this line and the checkpoint repeats only the latter
            validated = vanilla_accuracy(model, validation, fabric, workers)
            with together(fabric):
                if store:
                    store.append([counts.line(epoch, lr, validated)])
        with together(fabric):
            if store:
                curves.add_epoch((epoch + 1) * len(batches), store.lines[epoch])
            curves.flush()
            checkpoint.save(epoch + 1, 0, EpochCounts(), masking.found)

    with together(fabric):
        checkpoint.finish()


def _loader(images: Images, batches: list[list[int]], fabric: Fabric, workers: int) -> DataLoader[Item]:
    """The images of this process's part of each batch, as lists of items."""
    parts = [part_of(batch, fabric.global_rank, fabric.world_size) for batch in batches]
    return DataLoader(images, batch_sampler=parts, collate_fn=list, num_workers=workers)


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0: multiplied by ``lr_decay`` after half of the epochs."""
    return config.lr * (config.lr_decay if epoch >= max(1, config.epochs // 2) else 1.0)


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
    """Let the step under way end when Ctrl-C (or a scheduler's SIGTERM) comes, so that it can be saved."""
    asked = []
    handlers = {
        sig: signal.signal(sig, lambda *_: asked.append(True)) for sig in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield lambda: bool(asked)
    finally:
        for sig, handler in handlers.items():
            signal.signal(sig, handler)
