"""TODO."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ..data.source import Item, as_float, collate
from ..geometry.masks import MaskSet
from ..runtime.devices import autocast, precision_of
from ..runtime.processes import of_all
from ..views.masked import default_batch_size, find_mean, frozen, mask_images, visible
from ..views.network import Network
from .config import TrainConfig
from .cost import copies
from .strategies import STRATEGIES


class _Masking:
    """Makes of a batch what the model trains on: masked copies, and what the search for the masks cost.

    ``found`` are the windows last found for each image, (images, copies, windows, 4), -1 where no search was
    yet; None without epochs that use them again.
    """

    def __init__(
        self, model: nn.Sequential, masks: MaskSet, config: TrainConfig, fabric: Fabric, images: int
    ) -> None:
        self.model, self.masks, self.config, self.fabric = model, masks, config, fabric
        self.strategy, self.fill = STRATEGIES[config.strategy], torch.as_tensor(find_mean(model))
        self.look: Network | None = None
        self.found: Tensor | None = None
        if config.search_every is not None:
            self.found = torch.full((images, copies(config.strategy), 2, 4), -1, dtype=torch.int16)

    def __call__(self, items: list[Item], epoch: int, seed: int) -> tuple[Tensor, Tensor, int]:
        """(copies x N, 3, H, W) views, their labels, and the forward passes of the search."""
        pixels, labels = collate(
            items
        )  # here and not in a worker, so that an unreadable image is one clear line
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
            autocast(self.config.search_precision or precision_of(self.fabric), self.fabric.device),
            _passes_counted(self.model) as passes,
        ):
            windows = (
                search(x, y) if self.found is None else self._now_or_last(search, epoch, _index(items), x, y)
            )
        keeps = [
            _leave_clean(visible(each, self.masks.image_size), self.config.clean_fraction, place)
            for each in windows.unbind(1)
        ]
        return (
            torch.cat([mask_images(x, keep, self.fill) for keep in keeps]),
            y.repeat(len(keeps)),
            sum(passes) + self._compiled_passes(),
        )

    def compile(self) -> None:
        """Search with a compiled twin of the model, which shares its weights; its answers differ by
        rounding."""
        size, precision = self.masks.image_size, self.config.search_precision or precision_of(self.fabric)
        batch_size = 2 ** (
            default_batch_size(size).bit_length() - 1
        )  # of which the views of most batches are a multiple
        with frozen(self.model):
            look = Network(
                self.model,
                self.masks,
                fill=self.fill.expand(3),
                batch_size=batch_size,
                precision=precision,
                compile=True,
                frozen=False,
            )
        self.look = look if look.compiled else None

    def _compiled_passes(self) -> int:
        """Those since the last call."""
        if self.look is None:
            return 0
        passes, self.look.views = self.look.views, 0
        return passes

    def _now_or_last(
        self, search: Callable[[Tensor, Tensor], Tensor], epoch: int, index: Tensor, x: Tensor, y: Tensor
    ) -> Tensor:
        """(N, copies, windows, 4): found now where a search is due, else what was last found for the
        image."""
        assert self.found is not None
        due = (
            self.found[index].flatten(1)[:, 0] < 0
        )  # also in other epochs: the last batch may have left an image out
        if epoch % (self.config.search_every or 1) == 0:
            due[:] = True
        if due.any():
            self.found[index[due]] = search(x[due.to(x.device)], y[due.to(x.device)]).to(self.found)
        return self.found[index].to(x.device, torch.int64)

    def share(self, items: list[Item]) -> None:
        """What one process has found all will know: in another epoch an image may be another's."""
        if self.found is not None:
            index = _index(items)
            rows = of_all(
                self.fabric, torch.cat([index[:, None], self.found[index].flatten(1).long()], dim=1)
            )
            self.found[rows[:, 0]] = rows[:, 1:].view(-1, *self.found.shape[1:]).to(self.found)


def _index(items: list[Item]) -> Tensor:
    return torch.tensor([item.index for item in items])


def _leave_clean(keep: Tensor, fraction: float, place: tuple[int, int]) -> Tensor:
    """Unmask the first ``fraction`` of the (shuffled) batch, of which this is the part at ``place``."""
    clean = max(0, round(fraction * place[1]) - place[0])
    return torch.cat([torch.ones_like(keep[:clean]), keep[clean:]])


@contextmanager
def _passes_counted(model: nn.Module) -> Iterator[list[int]]:
    """Counts the images that a search sends through the model, so that a cost in the records is what was
    spent.

    Under a gradient twice: the backward pass of Grad-CAM ends at the last feature map, so the papers' count
    of one pass for it is more than enough.
    """
    passes: list[int] = []

    def count(_model: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        passes.append(len(inputs[0]) * (2 if torch.is_grad_enabled() else 1))

    handle = model.register_forward_hook(count)
    try:
        yield passes
    finally:
        handle.remove()
