"""A training run, from its premises to its folder: everything around the loop.

What cannot be trained is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from ..config import ModelSpec
from ..data.source import Images, Source, check_training_classes
from ..errors import ConfigError, DataError
from ..geometry.masks import MaskSet
from ..geometry.sights import sights_of
from ..models.weights import weights_sha256
from ..records.manifest import begin_manifest
from ..records.schema import EPOCHS
from ..records.store import Store
from ..runtime.devices import AUTOCAST, environment, precision_of
from ..runtime.processes import together
from ..runtime.progress import progress_bar
from ..views.masked import find_mean
from .augment import Augmented
from .batches import check_batch, epoch_batches, images_used
from .config import TrainConfig
from .curves import Curves, check_log
from .gradcam import saliency
from .held_out import hold_out
from .kept import kept_line
from .loop import fit
from .losses import check_loss
from .optimization import make_optimizer
from .strategies import STRATEGIES


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
    log: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Fine-tune ``model`` into the folder ``out``: its weights, ``manifest.json`` and ``epochs.jsonl``.

    Args:
        model: ``Sequential(Normalize, network)`` as :func:`certipatch.models.build.build` gives it; changed
            in place.
        source, validation: images to train on, and to measure vanilla accuracy on after each epoch.
        fabric: launched, if it has several processes. ``config.batch_size`` is that of each. BatchNorm
            normalises the whole batch on CUDA, but each process's part on the CPU, where torch cannot.
        data: how the data set is called in tables.
        compile: search with the model compiled, which only changes rounding; None: if the run is large.
        log: write curves of each step and epoch too, into ``out``/LOG: tensorboard, wandb or mlflow.

    Returns:
        The line of ``epochs.jsonl`` of the epoch whose weights were kept: the last one, or the best.

    Raises:
        ConfigError: options that cannot be. DataError: unusable data, or an unreadable image. RecordsError:
        ``out`` cannot be used. SoundnessError: a loss that is not finite.
    """
    described = _describe_data(source, validation, data, fabric)
    source, held_out = hold_out(source) if config.keep == "best" else (source, None)
    _check_premises(model, source, validation, config, fabric)
    masks = _masks(spec, config)
    _check_strategy(model, spec, config)
    experiment = {**_describe(model, spec, config, masks), **described, **_describe_processes(fabric)}
    about = {**begin_manifest("train", experiment, **environment(fabric)), "data": data}
    with _opened(out, about, fabric, log=log, resume=resume) as (store, curves):
        if fabric.broadcast(store and store.finished) is None:
            with progress_bar(_images_trained_on(source, config, fabric), "train") as progress:
                fit(
                    model,
                    Augmented(source, spec, config) if config.augment else Images(source, spec),
                    Images(validation, spec),
                    Images(held_out, spec) if held_out else None,
                    masks,
                    config,
                    store,
                    fabric=fabric,
                    workers=workers,
                    compile=compile,
                    progress=progress,
                    curves=curves,
                )
        line: dict[str, Any] = fabric.broadcast(kept_line(store.lines) if store else {})
        return line


def _masks(spec: ModelSpec, config: TrainConfig) -> MaskSet:
    size, k = config.patch_size, config.masks_per_axis
    return MaskSet.covering(image_size=spec.image_size, patch_size=size, masks_per_axis=k)


def _images_trained_on(source: Source, config: TrainConfig, fabric: Fabric) -> int:
    """How many there are in the whole run, each as often as it is met."""
    batches = epoch_batches(len(source), config.batch_size * fabric.world_size, seed=0)
    return config.epochs * images_used(batches, fabric)


@contextmanager
def _opened(
    out: Path, about: dict[str, Any], fabric: Fabric, *, log: str | None, resume: bool
) -> Iterator[tuple[Store | None, Curves]]:
    """The folder of the run and its curves; only process 0 has the folder, and writes curves."""
    check_log(log)
    with ExitStack() as stack:
        with together(fabric):
            drawn = log if fabric.is_global_zero else None
            curves = stack.enter_context(Curves(out / drawn, drawn) if drawn else Curves(None))
            store = None
            if fabric.is_global_zero:
                store = stack.enter_context(Store(out, about, EPOCHS, resume=resume))
        yield store, curves


def _describe(model: nn.Module, spec: ModelSpec, config: TrainConfig, masks: MaskSet) -> dict[str, Any]:
    """What is trained and how, as far as it decides on the weights at the end."""
    return {
        "model": spec.model_dump(mode="json"),
        "initial_weights_sha256": weights_sha256(model),
        "train": config.model_dump(mode="json"),
        "masks": masks.to_json(),
        "fill": torch.as_tensor(find_mean(model)).expand(3).tolist(),
    }


def _describe_processes(fabric: Fabric) -> dict[str, Any]:
    return {
        "device": fabric.device.type,
        "precision": precision_of(fabric),
        "processes": fabric.world_size,
    }


def _check_premises(
    model: nn.Module, source: Source, validation: Source, config: TrainConfig, fabric: Fabric
) -> None:
    """Raise DataError for classes that cannot be trained, and ConfigError for a precision or a batch size."""
    check_training_classes(source, validation)
    if precision_of(fabric) not in AUTOCAST:
        raise ConfigError(
            f"precision {precision_of(fabric)!r}: training keeps float32 weights; expected 32-true, "
            "bf16-mixed or 16-mixed"
        )
    check_batch(model, len(source), config.batch_size, fabric)
    make_optimizer(model, config)  # refused before anything is written


def _describe_data(source: Source, validation: Source, data: str, fabric: Fabric) -> dict[str, Any]:
    """Both data sets. Raises DataError on all processes if one has found other images than process 0."""
    described = {"data": source.describe(), "validation": validation.describe()}
    everywhere = fabric.broadcast(described)
    with together(fabric):
        if described != everywhere:
            raise DataError(
                f"data {data}: expected the same images on every machine, found others on machine "
                f"{fabric.node_rank}"
            )
    return described


def _check_strategy(model: nn.Module, spec: ModelSpec, config: TrainConfig) -> None:
    """Raise ConfigError for an option that the strategy cannot use, or a layer that Grad-CAM cannot use."""
    check_loss(model, config, spec.image_size)
    strategy = STRATEGIES[config.strategy]
    if strategy.by == "heat":
        # One Grad-CAM of a black image, so that such a layer is refused before anything is written.
        device = next(model.parameters()).device
        black = torch.zeros(1, 3, *spec.image_size, device=device)
        label = torch.zeros(1, dtype=torch.int64, device=device)
        saliency(model, black, label, config.gradcam_layer)
    elif config.gradcam_layer is not None:
        raise ConfigError(
            f"gradcam layer {config.gradcam_layer!r}: expected one of the gutout strategies, found "
            f"{config.strategy}"
        )
    if config.windows is not None:
        if strategy.name != "random-band":
            raise ConfigError(f"windows {config.windows}: expected random-band, found {config.strategy}")
        sights_of(config.windows, spec.image_size)  # refuses those that do not fit
    options = {"search every": config.search_every, "search precision": config.search_precision}
    for option, value in options.items():
        if value is not None and not strategy.searches:
            raise ConfigError(f"{option} {value}: expected a strategy that searches, found {config.strategy}")
