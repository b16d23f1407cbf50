"""Fine-tuning on worst-case masked images: the loop in plain sight.

Source: Greedy Cutout. Every batch is masked by a strategy (``search``), and the model takes one SGD step on the
mean loss of the masked copies.

Several processes (one a device) share each batch in equal parts and step on their mean gradient, which is one
process's step on the whole batch. They meet where ``fabric`` or ``processes`` is called; only process 0 writes.
"""

from __future__ import annotations

import io
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Subset

from . import runtime
from .config import ModelSpec, TrainConfig
from .cost import BACKWARD, FORWARD, RANDOM, SEARCHES_BY_LOSS, copies, search_passes
from .data import Images, Item, Source, as_float, check_training_classes, collate
from .errors import ConfigError, DataError, RecordsError, SoundnessError
from .gradcam import saliency
from .masks import MaskSet
from .models import find_mean, weights_sha256
from .network import LARGE, Network
from .processes import of_all, together, total
from .progress import Curves, Progress, progress_bar, share
from .records import Store, manifest
from .runtime import derived_seed
from .seals import LENGTH, sha256, write_through
from .search import STRATEGIES
from .views import default_batch_size, frozen, mask_images, visible

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
    compile: bool | None = None,
    tensorboard: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Fine-tune ``model`` into the folder ``out``: ``model.safetensors``, ``manifest.json``, ``epochs.jsonl``.

    Args:
        model: ``Sequential(Normalize, network)`` as :func:`certipatch.models.build` gives it; changed in place.
        source, validation: images to train on, and to measure vanilla accuracy on after each epoch.
        fabric: launched, if it has several processes. ``config.batch_size`` is that of each. BatchNorm normalises the
            whole batch on CUDA; on the CPU, where torch cannot, each process normalises its part.
        data: how the data set is called in tables.
        compile: search with the model compiled; None: in a large run, where it pays. It changes rounding only.
        tensorboard: write curves of each step and epoch into ``out``/tensorboard as well.

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
    _check_batch(model, len(source), config.batch_size, fabric)
    described = {"data": source.describe(), "validation": validation.describe()}
    everywhere = fabric.broadcast(described)
    with together(fabric):
        if described != everywhere:
            raise DataError(f"data {data}: expected the same images on every machine, found others on machine {fabric.node_rank}")
    masks = MaskSet.covering(image_size=spec.image_size, patch_size=config.patch_size, masks_per_axis=config.masks_per_axis)
    if config.strategy.startswith("gutout"):  # one Grad-CAM, so that a layer it cannot use is refused before anything is written
        device = next(model.parameters()).device
        black, label = torch.zeros(1, 3, *spec.image_size, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        saliency(model, black, label, config.gradcam_layer)
    elif config.gradcam_layer is not None:
        raise ConfigError(f"gradcam layer {config.gradcam_layer!r}: expected one of the gutout strategies, found {config.strategy}")
    for option, value in (("search every", config.search_every), ("search precision", config.search_precision)):
        if value is not None and config.strategy in RANDOM:
            raise ConfigError(f"{option} {value}: expected a strategy that searches, found {config.strategy}")
    experiment = {
        "model": spec.model_dump(mode="json"),
        "initial_weights_sha256": weights_sha256(model),
        "train": config.model_dump(mode="json"),
        "masks": masks.to_json(),
        "fill": torch.as_tensor(find_mean(model)).expand(3).tolist(),
        **described,
        "device": fabric.device.type,
        "precision": runtime.precision(fabric),
        "processes": fabric.world_size,
    }
    about = {**manifest("train", experiment, **runtime.environment(fabric)), "data": data}
    with ExitStack() as stack:
        with together(fabric):
            curves = stack.enter_context(Curves(out / "tensorboard" if tensorboard and fabric.is_global_zero else None))
            store = stack.enter_context(Store(out, about, "epochs.jsonl", resume=resume)) if fabric.is_global_zero else None
        if fabric.broadcast(store and store.manifest["finished"]) is None:
            batches = epoch_batches(len(source), config.batch_size * fabric.world_size, seed=0)
            with progress_bar(config.epochs * _used(batches, fabric), "train") as progress:
                _fit(
                    model, Images(source, spec), Images(validation, spec), masks, config, store,
                    fabric=fabric, workers=workers, compile=compile, progress=progress, curves=curves,
                )  # fmt: skip
        last: dict[str, Any] = fabric.broadcast(store.lines[-1] if store else {})
        return last


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

    Writes ``checkpoint.pt`` (the sha256 of what follows, and that) every few minutes and after each epoch; the weights at the end are those of the
    network alone, under its own names. A killed run that is resumed ends with the same weights on the CPU (of three
    or more processes: up to rounding, as the order of their sums is not fixed). Only process 0 has the store.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    state: dict[str, Any] = {}
    with together(fabric):
        if store:
            state = {**_load(store.folder / CHECKPOINT, model, optimizer), "lines": len(store.lines)}
            if state["lines"] < state["epoch"]:
                raise RecordsError(
                    f"{store.path}: expected the lines of {state['epoch']} epochs that {CHECKPOINT} follows, found {state['lines']}; "
                    f"restore it, or delete {CHECKPOINT} to train from the start"
                )
    state = fabric.broadcast(state)
    if not store and "model" in state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        convert_sync_batchnorm(model)  # timm's: torch's own would drop the activation in timm's BatchNormAct2d
    wrapped, opt = fabric.setup(model, optimizer)
    masking = _Masking(model, masks, config, fabric, len(images))
    pixels = masks.image_size[0] * masks.image_size[1] * len(images) * config.epochs
    if config.strategy in SEARCHES_BY_LOSS and (search_passes(masks)[config.strategy] * pixels >= LARGE if compile is None else compile):
        masking.compile()
    masking.found = state.get("found", masking.found)

    def save(epoch: int, step: int, sums: dict[str, float]) -> None:
        curves.flush()
        if store:
            state = {"epoch": epoch, "step": step, "sums": sums, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state["found"] = masking.found
            data = io.BytesIO()
            torch.save(state, data)
            _write(store.folder / CHECKPOINT, sha256(data.getbuffer()).encode(), data.getbuffer())

    for epoch in range(state["epoch"], config.epochs):
        lr = config.lr * (config.lr_decay if epoch >= max(1, config.epochs // 2) else 1.0)
        for group in opt.param_groups:
            group["lr"] = lr
        batches = epoch_batches(len(images), config.batch_size * fabric.world_size, derived_seed(config.seed, epoch))
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
                    raise SoundnessError(f"loss: expected a finite number, found {mean} in epoch {epoch + 1}, step {step}; lower --lr")
                for key in ("loss", "correct", "views", "images", "passes"):
                    sums[key] += counts[key]
                seconds = time.monotonic() - started
                sums["seconds"] += seconds
                progress.advance(int(counts["images"]), _note(epoch, config.epochs, sums, store))
                curves.add("step", epoch * len(batches) + step, loss=mean, lr=lr, images_per_second=counts["images"] / seconds)
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


class _Masking:
    """Makes of a batch what the model trains on: masked copies, and what the search for the masks cost.

    ``found`` are the windows last found for each image, (images, copies, windows, 4), -1 where no search was yet; None
    without epochs that use them again.
    """

    def __init__(self, model: nn.Sequential, masks: MaskSet, config: TrainConfig, fabric: Fabric, images: int) -> None:
        self.model, self.masks, self.config, self.fabric = model, masks, config, fabric
        self.strategy, self.fill = STRATEGIES[config.strategy], torch.as_tensor(find_mean(model))
        self.look: Network | None = None
        self.found: Tensor | None = None
        if config.search_every is not None:
            self.found = torch.full((images, copies(config.strategy), 2, 4), -1, dtype=torch.int16)

    def __call__(self, items: list[Item], epoch: int, seed: int) -> tuple[Tensor, Tensor, int]:
        """(copies x N, 3, H, W) views, their labels, and the forward passes of the search."""
        pixels, labels = collate(items)  # here and not in a worker, so that an unreadable image is one clear line
        rank = self.fabric.global_rank
        torch.manual_seed(seed + rank)  # dropout and the like
        x, y = as_float(pixels.to(self.fabric.device)), labels.to(self.fabric.device)
        place = (rank * len(x), self.fabric.world_size * len(x))

        def search(x: Tensor, y: Tensor) -> Tensor:
            hidden = self.strategy(
                self.model, x, y, self.masks,
                fill=self.fill, generator=torch.Generator().manual_seed(seed), place=place, layer=self.config.gradcam_layer, look=self.look,
            )  # fmt: skip
            return torch.stack(hidden, dim=1)

        with (
            runtime.autocast(self.config.search_precision or runtime.precision(self.fabric), self.fabric.device),
            _passes_counted(self.model) as passes,
        ):
            windows = search(x, y) if self.found is None else self._now_or_last(search, epoch, _index(items), x, y)
        keeps = [_leave_clean(visible(each, self.masks.image_size), self.config.clean_fraction, place) for each in windows.unbind(1)]
        return torch.cat([mask_images(x, keep, self.fill) for keep in keeps]), y.repeat(len(keeps)), sum(passes) + self._compiled_passes()

    def compile(self) -> None:
        """Search with a compiled twin of the model, which shares its weights; its answers differ by rounding."""
        size, precision = self.masks.image_size, self.config.search_precision or runtime.precision(self.fabric)
        batch_size = 2 ** (default_batch_size(size).bit_length() - 1)  # of which the views of most batches are a multiple
        with frozen(self.model):
            look = Network(
                self.model, self.masks, fill=self.fill.expand(3), batch_size=batch_size, precision=precision, compile=True, frozen=False
            )
        self.look = look if look.compiled else None

    def _compiled_passes(self) -> int:
        """Those since the last call."""
        if self.look is None:
            return 0
        passes, self.look.views = self.look.views, 0
        return passes

    def _now_or_last(self, search: Callable[[Tensor, Tensor], Tensor], epoch: int, index: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """(N, copies, windows, 4): found now where a search is due, else what was last found for the image."""
        assert self.found is not None
        due = self.found[index].flatten(1)[:, 0] < 0  # also in other epochs: the last batch may have left an image out
        if epoch % (self.config.search_every or 1) == 0:
            due[:] = True
        if due.any():
            self.found[index[due]] = search(x[due.to(x.device)], y[due.to(x.device)]).to(self.found)
        return self.found[index].to(x.device, torch.int64)

    def share(self, items: list[Item]) -> None:
        """What one process has found all will know: in another epoch an image may be another's."""
        if self.found is not None:
            index = _index(items)
            rows = of_all(self.fabric, torch.cat([index[:, None], self.found[index].flatten(1).long()], dim=1))
            self.found[rows[:, 0]] = rows[:, 1:].view(-1, *self.found.shape[1:]).to(self.found)


def _index(items: list[Item]) -> Tensor:
    return torch.tensor([item.index for item in items])


def epoch_batches(n: int, batch_size: int, seed: int) -> list[list[int]]:
    """The batches of one epoch: a seeded permutation, cut up; a last batch that is not full is left out (if others exist)."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [order[i : i + batch_size] for i in range(0, n, batch_size)]
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) < batch_size else batches


def part_of(batch: list[int], rank: int, processes: int) -> list[int]:
    """What one of the processes takes of a batch; a remainder that cannot be split equally is left out."""
    each = len(batch) // processes
    return batch[rank * each : (rank + 1) * each]


def _used(batches: list[list[int]], fabric: Fabric) -> int:
    """Images of the batches that the processes train on."""
    return fabric.world_size * sum(len(part_of(batch, 0, fabric.world_size)) for batch in batches)


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


def _check_batch(model: nn.Module, images: int, batch_size: int, fabric: Fabric) -> None:
    """Refuse what leaves a process without images, or BatchNorm with one."""
    each = min(batch_size, images // fabric.world_size)
    if not each:
        raise ConfigError(
            f"{images} images for {fabric.world_size} processes: expected at least one for each; use fewer --devices or --nodes"
        )
    normalised = each * (fabric.world_size if fabric.device.type == "cuda" else 1)
    if normalised < 2 and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ConfigError("a batch of 1 image: BatchNorm expects at least 2 in each process; raise --batch-size or use more images")


def _leave_clean(keep: Tensor, fraction: float, place: tuple[int, int]) -> Tensor:
    """Unmask the first ``fraction`` of the (shuffled) batch, of which this is the part at ``place``."""
    clean = max(0, round(fraction * place[1]) - place[0])
    return torch.cat([torch.ones_like(keep[:clean]), keep[clean:]])


def _share_statistics(model: nn.Module, fabric: Fabric) -> None:
    """BatchNorm's running statistics become the mean over the processes, so that all search with the same network.

    Where the processes normalise the whole batch together they are the same already.
    """
    if fabric.world_size > 1 and fabric.device.type != "cuda":
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None:
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
    so_far = f"epoch {epoch + 1}/{epochs}, loss {sums['loss'] / sums['views']:.3f}, right under the masks {share(int(sums['correct']), int(sums['views']))}"
    if not store or not store.lines:
        return so_far
    last = store.lines[-1]["validation_vanilla"]
    return f"{so_far}, validation vanilla accuracy {share(last['correct'], last['images'])}"


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
def _passes_counted(model: nn.Module) -> Iterator[list[int]]:
    """Counts the images that a search sends through the model, so that a cost in the records is what was spent.

    Under a gradient twice: the backward pass of Grad-CAM ends at the last feature map, so the papers' count of one
    pass for it is more than enough.
    """
    passes: list[int] = []

    def count(_model: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        passes.append(len(inputs[0]) * (2 if torch.is_grad_enabled() else 1))

    handle = model.register_forward_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


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
        data = path.read_bytes()
        if sha256(data[LENGTH:]).encode() != data[:LENGTH]:
            raise ValueError("it is not what was written")
        state = torch.load(io.BytesIO(data[LENGTH:]), map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        raise RecordsError(f"{path}: damaged ({' '.join(str(error).split())[:100]}); delete it to train from the start") from error
    return state


def _write(path: Path, *parts: bytes | memoryview) -> None:
    """Replace a file in one step. Its name while it is written is always the same, so that kills leave one such file at most."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        for number, part in enumerate(parts):
            write_through(temporary, part, append=number > 0)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RecordsError(f"{path}: cannot be written ({error.strerror or error}); free some space and use --resume") from error
