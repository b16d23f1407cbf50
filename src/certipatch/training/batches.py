"""Which images each process takes in each step of an epoch, and how they are loaded; too few are refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from ..data.source import Images, Loaded, stack
from ..errors import ConfigError
from .augment import Augmented


def epoch_batches(n: int, batch_size: int, seed: int) -> list[list[int]]:
    """The batches of one epoch: a seeded permutation of ``n`` images, cut up.

    A last batch that is not full is left out, unless it is the only one.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [order[i : i + batch_size] for i in range(0, n, batch_size)]
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) < batch_size else batches


def part_of(batch: list[int], rank: int, processes: int) -> list[int]:
    """What process ``rank`` takes of a batch; a remainder that cannot be split equally is left out."""
    each = len(batch) // processes
    return batch[rank * each : (rank + 1) * each]


def load(images: Images, batches: Iterable[Sequence[Any]], fabric: Fabric, workers: int) -> DataLoader[Any]:
    """The batches, each as one :class:`~certipatch.data.source.Loaded`, by so many processes that stay."""
    return DataLoader(
        images,
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=stack,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=fabric.device.type == "cuda",
    )


class Loader:
    """Loads this process's part of each batch; the processes that load stay from epoch to epoch."""

    def __init__(self, images: Images, fabric: Fabric, workers: int) -> None:
        self.fabric, self.augmented = fabric, isinstance(images, Augmented)
        self._parts: list[list[Any]] = []
        self._loader = load(images, self._parts, fabric, workers)

    def epoch(self, batches: list[list[int]], epoch: int) -> Iterator[Loaded]:
        """The images of the batches, as they are in this epoch."""
        parts = [part_of(batch, self.fabric.global_rank, self.fabric.world_size) for batch in batches]
        self._parts[:] = [[(i, epoch) for i in part] for part in parts] if self.augmented else parts
        return iter(self._loader)


def spread(n: int, batch_size: int, fabric: Fabric) -> list[range]:
    """Of ``n`` images those that this process looks at, in batches."""
    mine = range(fabric.global_rank, n, fabric.world_size)
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]


def images_used(batches: list[list[int]], fabric: Fabric) -> int:
    """How many images of the batches all processes together train on."""
    return fabric.world_size * sum(len(part_of(batch, 0, fabric.world_size)) for batch in batches)


def check_batch(model: nn.Module, images: int, batch_size: int, fabric: Fabric) -> None:
    """Raise ConfigError where a process would have no image, or BatchNorm only one to normalise."""
    each = min(batch_size, images // fabric.world_size)
    if not each:
        raise ConfigError(
            f"{images} images for {fabric.world_size} processes: expected at least one for each; use fewer "
            "--devices or --nodes"
        )
    # On CUDA, BatchNorm normalises the images of all processes together.
    normalised = each * (fabric.world_size if fabric.device.type == "cuda" else 1)
    if normalised < 2 and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ConfigError(
            "a batch of 1 image: BatchNorm expects at least 2 in each process; raise --batch-size or use "
            "more images"
        )
