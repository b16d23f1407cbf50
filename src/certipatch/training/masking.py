"""From a batch of images to what the model trains on: their masked copies, found now or used again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from ..data.source import Loaded
from ..geometry.masks import MaskSet
from ..runtime.devices import autocast, precision_of
from ..runtime.processes import of_all
from ..views.masked import Masked, default_batch_size, find_mean, frozen, mask_images, visible
from ..views.network import LARGE, Network, fastest_batch_size
from .config import TrainConfig
from .hiding import BatchPart
from .strategies import STRATEGIES


class Masking:
    """Makes of a batch what the model trains on, and counts what the search for the masks costs.

    Args:
        model: the model in training, not wrapped by ``fabric``.
        masks: the fine set.
        images: how many there are in the data set.

    Attributes:
        found: (images, copies, windows, 4) int16, the windows last found for each image of the data set, -1
            where there was no search yet; None if every epoch searches.
    """

    def __init__(
        self, model: nn.Sequential, masks: MaskSet, config: TrainConfig, fabric: Fabric, images: int
    ) -> None:
        self.model, self.masks, self.config, self.fabric, self.images = model, masks, config, fabric, images
        self.strategy = STRATEGIES[config.strategy]
        self.fill = torch.as_tensor(find_mean(model), device=fabric.device)
        self.precision = config.search_precision or precision_of(fabric)
        self.look: Network | Masked | None = None
        self.found: Tensor | None = None
        if config.search_every is not None:
            self.found = torch.full((images, self.strategy.copies, 2, 4), -1, dtype=torch.int16)

    def __call__(self, loaded: Loaded, epoch: int, seed: int) -> tuple[Tensor, Tensor, int]:
        """(copies x N, 3, H, W) views, their labels, and the forward passes of the search.

        Raises DataError if an image could not be read.
        """
        x, y = loaded.on(self.fabric.device)
        rank = self.fabric.global_rank
        torch.manual_seed(seed + rank)  # for the dropout of the gradient step and the like
        part = BatchPart(rank * len(x), self.fabric.world_size * len(x))

        def search(x: Tensor, y: Tensor) -> Tensor:
            return self._search(x, y, part, seed)

        with autocast(self.precision, self.fabric.device), _passes_counted(self.model) as passes:
            windows = (
                search(x, y)
                if self.found is None
                else self._now_or_last(search, epoch, torch.tensor(loaded.indices), x, y)
            )
        keeps = [
            _leave_clean(visible(each, self.masks.image_size), self.config.clean_fraction, part)
            for each in windows.unbind(1)
        ]
        views = torch.cat([mask_images(x, keep, self.fill) for keep in keeps])
        return views, y.repeat(len(keeps)), sum(passes) + self._compiled_passes()

    def _search(self, x: Tensor, y: Tensor, part: BatchPart, seed: int) -> Tensor:
        """(N, copies, windows, 4): what the strategy hides from the images."""
        generator = torch.Generator().manual_seed(seed)
        hidden = self.strategy(
            self.model,
            x,
            y,
            self.masks,
            fill=self.fill,
            generator=generator,
            part=part,
            look=self.look,
            layer=self.config.gradcam_layer,
            windows=self.config.windows,
        )
        return torch.stack(hidden, dim=1)

    def prepare(self, compile: bool | None) -> None:
        """Choose how a search by loss looks at the model: in how large passes, and whether compiled.

        A compiled twin shares the model's weights; its answers differ by rounding.

        ``compile``: whether to make one; None: if the run is so large that it pays.
        """
        if self.strategy.by != "loss":
            return
        most = self._views_at_once()
        if not (self._is_large() if compile is None else compile):
            self.look = Masked(self.model, self.fill, batch_size=most)
            return
        # A power of two, of which the number of views of most batches is a multiple.
        batch_size = 2 ** ((most or default_batch_size(self.masks.image_size)).bit_length() - 1)
        with frozen(self.model):
            look = Network(
                self.model,
                self.masks,
                fill=self.fill.expand(3),
                batch_size=batch_size,
                precision=self.precision,
                compile=True,
                frozen=False,
            )
        self.look = look if look.compiled else Masked(self.model, self.fill, batch_size=most)

    def _views_at_once(self) -> int | None:
        """How many views a pass of the search has: on an accelerator the number that is fastest, by trial.

        None on a CPU: there the number is fixed, as it decides on the rounding, and with that on the weights
        of a run that is resumed.
        """
        if self.fabric.device.type == "cpu":
            return None
        with frozen(self.model):
            return fastest_batch_size(self.model, self.masks, self.precision)

    def _is_large(self) -> bool:
        """Whether the searches of the run see so many pixels that compiling pays."""
        height, width = self.masks.image_size
        pixels = height * width * self.images * self.config.epochs
        return self.strategy.passes(self.masks) * pixels >= LARGE

    def _compiled_passes(self) -> int:
        """Forward passes of the compiled network since the last call."""
        if not isinstance(self.look, Network):
            return 0
        passes, self.look.views = self.look.views, 0
        return passes

    def _now_or_last(
        self, search: Callable[[Tensor, Tensor], Tensor], epoch: int, index: Tensor, x: Tensor, y: Tensor
    ) -> Tensor:
        """(N, copies, windows, 4): found now where a search is due, else what was last found for the image.

        ``index`` (N,) is where the images are in the data set.
        """
        assert self.found is not None
        # A search is due in its epochs, and in any epoch for an image that the last batches so far left out.
        due = self.found[index].flatten(1)[:, 0] < 0
        if epoch % (self.config.search_every or 1) == 0:
            due[:] = True
        if due.any():
            self.found[index[due]] = search(x[due.to(x.device)], y[due.to(x.device)]).to(self.found)
        return self.found[index].to(x.device, torch.int64)

    def share(self, loaded: Loaded) -> None:
        """Tell the other processes what this one has found for its images: in another epoch an image may be
        theirs."""
        if self.found is not None:
            index = torch.tensor(loaded.indices)
            rows = of_all(
                self.fabric, torch.cat([index[:, None], self.found[index].flatten(1).long()], dim=1)
            )
            self.found[rows[:, 0]] = rows[:, 1:].view(-1, *self.found.shape[1:]).to(self.found)


def _leave_clean(keep: Tensor, fraction: float, part: BatchPart) -> Tensor:
    """Unmask the first ``fraction`` of the (shuffled) whole batch; ``keep`` (N, H, W) is one part of it."""
    clean = max(0, round(fraction * part.whole) - part.start)
    return torch.cat([torch.ones_like(keep[:clean]), keep[clean:]])


@contextmanager
def _passes_counted(model: nn.Module) -> Iterator[list[int]]:
    """Counts the images that a search sends through the model, so that a cost in the records is what was
    spent.

    Under a gradient each counts twice: the backward pass of Grad-CAM ends at the last feature map, so the
    papers' count of one pass for it is more than enough.
    """
    passes: list[int] = []

    def count(_model: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        passes.append(len(inputs[0]) * (2 if torch.is_grad_enabled() else 1))

    handle = model.register_forward_hook(count)
    try:
        yield passes
    finally:
        handle.remove()
