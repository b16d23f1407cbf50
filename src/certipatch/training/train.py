"""TODO."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from ..config import ModelSpec
from ..data.source import Images, Source, check_training_classes
from ..errors import ConfigError, DataError
from ..geometry.masks import MaskSet
from ..models.weights import weights_sha256
from ..records.manifest import manifest
from ..records.store import Store
from ..runtime.devices import environment, precision_of
from ..runtime.processes import together
from ..runtime.progress import progress_bar
from ..views.masked import find_mean
from .batches import _check_batch, _used, epoch_batches
from .config import TrainConfig
from .cost import RANDOM
from .curves import Curves
from .gradcam import saliency
from .loop import _fit


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
    """Fine-tune ``model`` into the folder ``out``: ``model.safetensors``, ``manifest.json``,
    ``epochs.jsonl``.

    Args:
        model: ``Sequential(Normalize, network)`` as :func:`certipatch.models.build` gives it; changed in
            place.
        source, validation: images to train on, and to measure vanilla accuracy on after each epoch.
        fabric: launched, if it has several processes. ``config.batch_size`` is that of each. BatchNorm
            normalises the whole batch on CUDA; on the CPU, where torch cannot, each process normalises its
            part.
        data: how the data set is called in tables.
        compile: search with the model compiled; None: in a large run, where it pays. It changes rounding
            only.
        tensorboard: write curves of each step and epoch into ``out``/tensorboard as well.

    Returns:
        The last line of ``epochs.jsonl``.

    Raises:
        DataError: unusable data, or an unreadable image. RecordsError: ``out`` cannot be used.
        SoundnessError: a loss that is not finite.
    """
    check_training_classes(source, validation)
    if precision_of(fabric) not in ("32-true", "16-mixed", "bf16-mixed"):
        raise ConfigError(
            f"precision {precision_of(fabric)!r}: training keeps float32 weights; expected 32-true, "
            "bf16-mixed or 16-mixed"
        )
    _check_batch(model, len(source), config.batch_size, fabric)
    described = {"data": source.describe(), "validation": validation.describe()}
    everywhere = fabric.broadcast(described)
    with together(fabric):
        if described != everywhere:
            raise DataError(
                f"data {data}: expected the same images on every machine, found others on machine "
                f"{fabric.node_rank}"
            )
    masks = MaskSet.covering(
        image_size=spec.image_size, patch_size=config.patch_size, masks_per_axis=config.masks_per_axis
    )
    if config.strategy.startswith(
        "gutout"
    ):  # one Grad-CAM, so that a layer it cannot use is refused before anything is written
        device = next(model.parameters()).device
        black, label = (
            torch.zeros(1, 3, *spec.image_size, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        saliency(model, black, label, config.gradcam_layer)
    elif config.gradcam_layer is not None:
        raise ConfigError(
            f"gradcam layer {config.gradcam_layer!r}: expected one of the gutout strategies, found "
            f"{config.strategy}"
        )
    for option, value in (
        ("search every", config.search_every),
        ("search precision", config.search_precision),
    ):
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
        "precision": precision_of(fabric),
        "processes": fabric.world_size,
    }
    about = {**manifest("train", experiment, **environment(fabric)), "data": data}
    with ExitStack() as stack:
        with together(fabric):
            curves = stack.enter_context(
                Curves(out / "tensorboard" if tensorboard and fabric.is_global_zero else None)
            )
            store = (
                stack.enter_context(Store(out, about, "epochs.jsonl", resume=resume))
                if fabric.is_global_zero
                else None
            )
        if fabric.broadcast(store and store.manifest["finished"]) is None:
            batches = epoch_batches(len(source), config.batch_size * fabric.world_size, seed=0)
            with progress_bar(config.epochs * _used(batches, fabric), "train") as progress:
                _fit(
                    model, Images(source, spec), Images(validation, spec), masks, config, store,
                    fabric=fabric, workers=workers, compile=compile, progress=progress, curves=curves,
                )  # fmt: skip
        last: dict[str, Any] = fabric.broadcast(store.lines[-1] if store else {})
        return last
