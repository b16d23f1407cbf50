"""Fine-tuning on worst-case masked images: the loop in plain sight.

Source: Greedy Cutout. Every batch is masked by a strategy (``search``), and the model takes one SGD step on
the mean loss of the masked copies.

Several processes (one a device) share each batch in equal parts and step on their mean gradient, which is one
process's step on the whole batch. They meet where ``fabric`` or ``processes`` is called; only process 0
writes.
"""

from __future__ import annotations

import io
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Subset

from ..data.source import Images, as_float, collate
from ..errors import RecordsError, SoundnessError
from ..geometry.masks import MaskSet
from ..models.weights import weights_sha256
from ..records.seals import sha256
from ..records.store import Store
from ..runtime.devices import derived_seed
from ..runtime.processes import together, total
from ..runtime.progress import Progress, percent
from ..views.network import LARGE
from .batches import _used, epoch_batches, part_of
from .checkpoint import CHECKPOINT, _load, _write
from .config import TrainConfig
from .cost import BACKWARD, FORWARD, SEARCHES_BY_LOSS, search_passes
from .curves import Curves
from .masking import _Masking

CHECKPOINT_SECONDS = 300


NOTHING: dict[str, float] = {"loss": 0.0, "correct": 0, "views": 0, "images": 0, "passes": 0, "seconds": 0.0}


def _fit(
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
    """The loop, continuing from the checkpoint in the store's folder if there is one.

    Writes ``checkpoint.pt`` (the sha256 of what follows, and that) every few minutes and after each epoch;
    the weights at the end are those of the network alone, under its own names. A killed run that is resumed
    ends with the same weights on the CPU (of three
    or more processes: up to rounding, as the order of their sums is not fixed). Only process 0 has the store.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    state: dict[str, Any] = {}
    with together(fabric):
        if store:
            state = {**_load(store.folder / CHECKPOINT, model, optimizer), "lines": len(store.lines)}
            if state["lines"] < state["epoch"]:
                raise RecordsError(
                    f"{store.path}: expected the lines of {state['epoch']} epochs that {CHECKPOINT} "
                    f"follows, found {state['lines']}; "
                    f"restore it, or delete {CHECKPOINT} to train from the start"
                )
    state = fabric.broadcast(state)
    if not store and "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        convert_sync_batchnorm(
            model
        )  # timm's: torch's own would drop the activation in timm's BatchNormAct2d
    wrapped, opt = fabric.setup(model, optimizer)
    masking = _Masking(model, masks, config, fabric, len(images))
    pixels = masks.image_size[0] * masks.image_size[1] * len(images) * config.epochs
    if config.strategy in SEARCHES_BY_LOSS and (
        search_passes(masks)[config.strategy] * pixels >= LARGE if compile is None else compile
    ):
        masking.compile()
    masking.found = state.get("found", masking.found)

    def save(epoch: int, step: int, sums: dict[str, float]) -> None:
        curves.flush()
        if store:
            state = {
                "epoch": epoch,
                "step": step,
                "sums": sums,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            state["found"] = masking.found
            data = io.BytesIO()
            torch.save(state, data)
            _write(store.folder / CHECKPOINT, sha256(data.getbuffer()).encode(), data.getbuffer())

    for epoch in range(state["epoch"], config.epochs):
        lr = config.lr * (config.lr_decay if epoch >= max(1, config.epochs // 2) else 1.0)
        for group in opt.param_groups:
            group["lr"] = lr
        batches = epoch_batches(
            len(images), config.batch_size * fabric.world_size, derived_seed(config.seed, epoch)
        )
        step = state["step"] if epoch == state["epoch"] else 0
        sums = dict(state["sums"]) if step else dict(NOTHING)
        parts = [part_of(batch, fabric.global_rank, fabric.world_size) for batch in batches[step:]]
        loader = DataLoader(images, batch_sampler=parts, collate_fn=list, num_workers=workers)
        if epoch == state["epoch"]:
            progress.resume(epoch * _used(batches, fabric) + _used(batches[:step], fabric))
            curves.begin(epoch * len(batches) + step)
        saved = time.monotonic()
        with _interruptible() as interrupted:
            for items in loader:
                started = time.monotonic()
                with together(fabric):
                    views, targets, searched = masking(items, epoch, derived_seed(config.seed, epoch, step))
                masking.share(items)
                wrapped.train()
                logits = wrapped(views)
                loss = F.cross_entropy(logits, targets)
                opt.zero_grad()
                fabric.backward(loss)
                opt.step()
                _share_statistics(model, fabric)

                step += 1
                counts = {
                    "loss": loss.item() * len(views),
                    "correct": int((logits.argmax(1) == targets).sum()),
                    "views": len(views),
                    "images": len(items),
                    "passes": searched * FORWARD + len(views) * (FORWARD + BACKWARD),
                    "stop": interrupted(),
                    "save": store is not None and time.monotonic() - saved > CHECKPOINT_SECONDS,
                }
                counts = total(fabric, counts)
                mean = counts["loss"] / counts["views"]
                if not math.isfinite(mean):  # before anything of this step is saved
                    raise SoundnessError(
                        f"loss: expected a finite number, found {mean} in epoch {epoch + 1}, step {step}; "
                        "lower --lr"
                    )
                for key in ("loss", "correct", "views", "images", "passes"):
                    sums[key] += counts[key]
                seconds = time.monotonic() - started
                sums["seconds"] += seconds
                progress.advance(int(counts["images"]), _note(epoch, config.epochs, sums, store))
                curves.add(
                    "step",
                    epoch * len(batches) + step,
                    loss=mean,
                    lr=lr,
                    images_per_second=counts["images"] / seconds,
                )
                if counts["stop"] or counts["save"]:
                    with together(fabric):
                        save(epoch, step, sums)
                    saved = time.monotonic()
                if counts["stop"]:
                    raise KeyboardInterrupt
        if state["lines"] <= epoch:  # a kill between this line and the checkpoint repeats only the latter
            validated = vanilla_accuracy(model, validation, fabric, workers)
            with together(fabric):
                if store:
                    store.append([_epoch_line(epoch, lr, sums, validated)])
        with together(fabric):
            if store:
                _draw(curves, (epoch + 1) * len(batches), store.lines[epoch])
            save(epoch + 1, 0, {})

    with together(fabric):
        if store:
            network = {key: value.cpu().contiguous() for key, value in model[1].state_dict().items()}
            _write(store.folder / "model.safetensors", safetensors.torch.save(network))
            store.finish(weights_sha256=weights_sha256(model.eval()))
            (store.folder / CHECKPOINT).unlink()


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


def _share_statistics(model: nn.Module, fabric: Fabric) -> None:
    """BatchNorm's running statistics become the mean over the processes, so that all search with the same
    network.

    Where the processes normalise the whole batch together they are the same already.
    """
    if fabric.world_size > 1 and fabric.device.type != "cuda":
        for module in model.modules():
            if (
                isinstance(module, _BatchNorm)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                for statistic in (module.running_mean, module.running_var):
                    statistic.copy_(fabric.all_reduce(statistic, reduce_op="mean"))  # type: ignore[arg-type]


def _epoch_line(epoch: int, lr: float, sums: dict[str, Any], validation: dict[str, int]) -> dict[str, Any]:
    return {
        "epoch": epoch + 1,
        "lr": lr,
        "loss": sums["loss"] / sums["views"],
        "masked_correct": int(sums["correct"]),
        "masked_views": int(sums["views"]),
        "images": int(sums["images"]),
        "forward_equivalents": int(sums["passes"]),
        "seconds": round(sums["seconds"], 3),
        "validation_vanilla": validation,
    }


def _note(epoch: int, epochs: int, sums: dict[str, float], store: Store | None) -> str:
    """What a run under way is worth: of this epoch so far, and the vanilla accuracy after the last."""
    so_far = f"epoch {epoch + 1}/{epochs}, loss {sums['loss'] / sums['views']:.3f}, right under the masks {percent(int(sums['correct']), int(sums['views']))}"
    if not store or not store.lines:
        return so_far
    last = store.lines[-1]["validation_vanilla"]
    return f"{so_far}, validation vanilla accuracy {percent(last['correct'], last['images'])}"


def _draw(curves: Curves, step: int, line: dict[str, Any]) -> None:
    """A line of ``epochs.jsonl`` at the end of its epoch's curves."""
    right = line["validation_vanilla"]
    curves.add(
        "epoch",
        step,
        loss=line["loss"],
        lr=line["lr"],
        right_under_the_masks=line["masked_correct"] / line["masked_views"],
        validation_vanilla_accuracy=right["correct"] / right["images"],
        images_per_second=line["images"] / max(line["seconds"], 1e-3),
    )


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
