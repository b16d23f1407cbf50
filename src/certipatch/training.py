"""Fine-tuning on worst-case masked images: the loop in plain sight.

Source: Greedy Cutout. Every batch is masked by a strategy (``search``), and the model takes one SGD step on the
mean loss of the masked copies.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import runtime
from .config import ModelSpec, TrainConfig
from .cost import BACKWARD, FORWARD
from .data import Images, Source, as_float, check_training_classes, collate
from .errors import ConfigError, RecordsError, SoundnessError
from .gradcam import saliency
from .masks import MaskSet
from .models import find_mean, weights_sha256
from .records import Store, manifest
from .runtime import derived_seed
from .search import STRATEGIES
from .views import mask_images

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_SECONDS = 300
NOTHING: dict[str, float] = {"loss": 0.0, "correct": 0, "views": 0, "images": 0, "passes": 0, "seconds": 0.0}


def train(
    model: nn.Sequential,
    spec: ModelSpec,
    source: Source,
    validation: Source,
    config: TrainConfig,
    out: Path,
    *,
    fabric: Fabric,
    data: str = "",
    workers: int = 0,
    resume: bool = False,
) -> dict[str, Any]:
    """Fine-tune ``model`` into the folder ``out``: ``model.safetensors``, ``manifest.json``, ``epochs.jsonl``.

    Args:
        model: ``Sequential(Normalize, network)`` as :func:`certipatch.models.build` gives it; changed in place.
        source, validation: images to train on, and to measure vanilla accuracy on after each epoch.
        data: how the data set is called in tables.

    Returns:
        The last line of ``epochs.jsonl``.

    Raises:
        DataError: unusable data, or an unreadable image. RecordsError: ``out`` cannot be used.
        SoundnessError: a loss that is not finite.
    """
    check_training_classes(source, validation)
    if runtime.precision(fabric) not in ("32-true", "16-mixed", "bf16-mixed"):
        raise ConfigError(
            f"precision {runtime.precision(fabric)!r}: training keeps float32 weights; expected 32-true, bf16-mixed or 16-mixed"
        )
    masks = MaskSet.covering(image_size=spec.image_size, patch_size=config.patch_size, masks_per_axis=config.masks_per_axis)
    if config.strategy.startswith("gutout"):  # one Grad-CAM, so that a layer it cannot use is refused before anything is written
        device = next(model.parameters()).device
        black, label = torch.zeros(1, 3, *spec.image_size, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        saliency(model, black, label, config.gradcam_layer)
    elif config.gradcam_layer is not None:
        raise ConfigError(f"gradcam layer {config.gradcam_layer!r}: expected one of the gutout strategies, found {config.strategy}")
    experiment = {
        "model": spec.model_dump(mode="json"),
        "initial_weights_sha256": weights_sha256(model),
        "train": config.model_dump(mode="json"),
        "masks": masks.to_json(),
        "fill": torch.as_tensor(find_mean(model)).expand(3).tolist(),
        "data": source.describe(),
        "validation": validation.describe(),
        "device": fabric.device.type,
        "precision": runtime.precision(fabric),
    }
    about = {**manifest("train", experiment, **runtime.environment(fabric)), "data": data}
    with Store(out, about, "epochs.jsonl", resume=resume) as store:
        if store.manifest["finished"] is None:
            used = sum(map(len, epoch_batches(len(source), config.batch_size, seed=0)))
            with runtime.progress_bar(config.epochs * used, "train") as progress:
                _fit(
                    model, Images(source, spec), Images(validation, spec), masks, config, store,
                    fabric=fabric, workers=workers, progress=progress,
                )  # fmt: skip
        return store.lines[-1]


def _fit(
    model: nn.Sequential,
    images: Images,
    validation: Images,
    masks: MaskSet,
    config: TrainConfig,
    store: Store,
    *,
    fabric: Fabric,
    workers: int,
    progress: Callable[[int, str], None],
) -> None:
    """The loop, continuing from the checkpoint in the store's folder if there is one.

    Writes ``checkpoint.pt`` every few minutes and after each epoch; the weights at the end are those of the
    network alone, under its own names. A killed run that is resumed ends with the same weights on the CPU.
    """
    fill = torch.as_tensor(find_mean(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    checkpoint = store.folder / CHECKPOINT
    state = _load(checkpoint, model, optimizer)
    wrapped, opt = fabric.setup(model, optimizer)
    strategy = STRATEGIES[config.strategy]
    counter = _PassCounter(model)

    def save(epoch: int, step: int, sums: dict[str, float]) -> None:
        state = {"epoch": epoch, "step": step, "sums": sums, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        _write(checkpoint, lambda path: torch.save(state, path))

    for epoch in range(state["epoch"], config.epochs):
        lr = config.lr * (config.lr_decay if epoch >= max(1, config.epochs // 2) else 1.0)
        for group in opt.param_groups:
            group["lr"] = lr
        batches = epoch_batches(len(images), config.batch_size, derived_seed(config.seed, epoch))
        step = state["step"] if epoch == state["epoch"] else 0
        sums = dict(state["sums"]) if step else dict(NOTHING)
        loader = DataLoader(images, batch_sampler=batches[step:], collate_fn=list, num_workers=workers)
        progress(sum(map(len, batches[:step])), "")
        saved = time.monotonic()
        with _interruptible() as interrupted:
            for items in loader:
                pixels, labels = collate(items)  # here and not in a worker, so that an unreadable image is one clear line
                started, counter.passes = time.monotonic(), 0
                seed = derived_seed(config.seed, epoch, step)
                torch.manual_seed(seed)  # dropout and the like
                x, y = as_float(pixels.to(fabric.device)), labels.to(fabric.device)

                with fabric.autocast():
                    draws = torch.Generator().manual_seed(seed)
                    keeps = strategy(model, x, y, masks, fill=fill, generator=draws, layer=config.gradcam_layer)
                searched = counter.passes
                keeps = [_leave_clean(keep, config.clean_fraction) for keep in keeps]
                views = torch.cat([mask_images(x, keep, fill) for keep in keeps])
                targets = y.repeat(len(keeps))
                wrapped.train()
                logits = wrapped(views)
                loss = F.cross_entropy(logits, targets)
                if not torch.isfinite(loss):
                    raise SoundnessError(
                        f"loss: expected a finite number, found {loss.item()} in epoch {epoch + 1}, step {step + 1}; lower --lr"
                    )
                opt.zero_grad()
                fabric.backward(loss)
                opt.step()

                step += 1
                sums["loss"] += loss.item() * len(views)
                sums["correct"] += int((logits.argmax(1) == targets).sum())
                sums["views"] += len(views)
                sums["images"] += len(x)
                sums["passes"] += searched * FORWARD + len(views) * (FORWARD + BACKWARD)
                sums["seconds"] += time.monotonic() - started
                progress(len(x), f"epoch {epoch + 1}/{config.epochs} loss {loss.item():.3f}")
                if interrupted() or time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save(epoch, step, sums)
                    saved = time.monotonic()
                if interrupted():
                    raise KeyboardInterrupt
        if len(store.lines) <= epoch:  # a kill between this line and the checkpoint repeats only the latter
            store.append([_epoch_line(epoch, lr, sums, vanilla_accuracy(wrapped, validation, fabric.device, workers))])
        save(epoch + 1, 0, {})
    counter.remove()

    network = {key: value.cpu().contiguous() for key, value in model[1].state_dict().items()}
    _write(store.folder / "model.safetensors", lambda path: safetensors.torch.save_file(network, path))
    store.finish(weights_sha256=weights_sha256(model.eval()))
    checkpoint.unlink()


def epoch_batches(n: int, batch_size: int, seed: int) -> list[list[int]]:
    """The batches of one epoch: a seeded permutation, cut up; a last batch that is not full is left out (if others exist)."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [order[i : i + batch_size] for i in range(0, n, batch_size)]
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) < batch_size else batches


@torch.inference_mode()
def vanilla_accuracy(model: nn.Module, images: Images, device: torch.device, workers: int = 0) -> dict[str, int]:
    """Undefended accuracy as a fraction: {"correct": c, "images": n}."""
    model.eval()
    correct = 0
    for items in DataLoader(images, batch_size=256, collate_fn=list, num_workers=workers):
        pixels, labels = collate(items)
        correct += int((model(as_float(pixels.to(device))).argmax(1).cpu() == labels).sum())
    return {"correct": correct, "images": len(images)}


def _leave_clean(keep: Tensor, fraction: float) -> Tensor:
    """Unmask the first ``fraction`` of the (shuffled) batch."""
    clean = round(fraction * len(keep))
    return torch.cat([torch.ones_like(keep[:clean]), keep[clean:]])


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


class _PassCounter:
    """Counts the images that a search sends through the model, so that a cost in the records is what was spent.

    Under a gradient twice: the backward pass of Grad-CAM ends at the last feature map, so the papers' count of one
    pass for it is more than enough.
    """

    def __init__(self, model: nn.Module) -> None:
        self.passes = 0
        self._handle = model.register_forward_hook(self._count)

    def _count(self, _model: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        self.passes += len(inputs[0]) * (2 if torch.is_grad_enabled() else 1)

    def remove(self) -> None:
        self._handle.remove()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Let the step under way end when Ctrl-C (or a scheduler's SIGTERM) comes, so that it can be saved."""
    asked = []
    handlers = {sig: signal.signal(sig, lambda *_: asked.append(True)) for sig in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for sig, handler in handlers.items():
            signal.signal(sig, handler)


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if not path.exists():
        return {"epoch": 0, "step": 0, "sums": {}}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        raise RecordsError(f"{path}: damaged ({' '.join(str(error).split())[:100]}); delete it to train from the start") from error
    return state


def _write(path: Path, save: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save(temporary)
        temporary.replace(path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise RecordsError(f"{path}: cannot be written ({' '.join(str(error).split())[:100]}); free some space and use --resume") from error
