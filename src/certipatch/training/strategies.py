"""The masking strategies for fine-tuning, one row each: what chooses the masks, and what that costs.

Source: Greedy Cutout, whose Table 3 compares them and whose cost model this is; random-band is that of the
defenses by windows, De-randomized Smoothing and Smoothed ViT. What a strategy does stands
in ``hiding.py``, under the name in its row. This table needs no torch, so that the command line can name
strategies and their costs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import ConfigError
from ..geometry.masks import MaskSet
from ..geometry.patch import Window

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..views.masked import Look
    from .hiding import BatchPart

FORWARD, BACKWARD = 1, 2  # what a pass of one image costs: a backward pass is worth two forward passes


@dataclass(frozen=True)
class Strategy:
    """A way to choose the windows that are hidden from training images.

    Attributes:
        name: as on the command line.
        function: the name of the function of ``hiding.py`` that chooses the windows.
        by: what it goes by: nothing, chance, the heat of Grad-CAM, or the loss under each mask.
        copies: masked copies of each image in the gradient step, whose batch is so many times as large.
        passes: extra forward passes of search for one training image, given the fine set of masks.
            Grad-CAM's backward passes count like forward ones, as in the paper. What is run may be less:
            greedy-multisize knows the loss of one of its passes, and an epoch may have no search. Records
            hold what was counted on the model.
    """

    name: str
    function: str
    by: Literal["nothing", "chance", "heat", "loss"]
    copies: int
    passes: Callable[[MaskSet], int]

    @property
    def searches(self) -> bool:
        """Whether it looks at the model to choose the masks."""
        return self.by in ("heat", "loss")

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        masks: MaskSet,
        *,
        fill: float | Tensor | None = None,
        generator: torch.Generator | None = None,
        part: BatchPart | None = None,
        look: Look | None = None,
        layer: str | None = None,
        windows: str | None = None,
    ) -> list[Tensor]:
        """The windows to hide from each image, one tensor (N, windows, 4) of int64 for each masked copy.

        The arguments are the attributes of :class:`certipatch.training.hiding.Batch`; without a ``fill`` it
        is the mean of the model's Normalize layer, as in :class:`certipatch.PatchCleanser`. The model is left
        as it was found: a search runs its current weights in evaluation mode.

        Raises ConfigError for a strategy that draws at random without a ``generator``, and for a model in
        which Grad-CAM finds no map of the image; SoundnessError for logits that are not finite.
        """
        from ..views.masked import check_finite, find_mean
        from . import hiding

        colour = find_mean(model) if fill is None else fill
        batch = hiding.Batch(
            model,
            images,
            labels,
            masks,
            fill=colour,
            generator=generator,
            part=part,
            look=look,
            layer=layer,
            windows=windows,
        )
        hidden: list[Tensor] = getattr(hiding, self.function)(batch)
        check_finite(batch.finite)
        return hidden


def _no_search(_masks: MaskSet) -> int:
    return 0


def _coarse(masks: MaskSet) -> int:
    """Masks of the coarse set: 9 where the fine one has 36."""
    return len(masks.coarsen()[0])


def _greedy(k: int) -> int:
    """Passes of Greedy Cutout on a set of ``k`` masks: all of them, then all but the one found first."""
    return 2 * k - 1


def _grid(k: int) -> int:
    """Passes of the grid on a set of ``k`` masks: all pairs, each mask with itself among them."""
    return k * (k + 1) // 2


def _multisize(masks: MaskSet) -> int:
    """Passes of Multi-size Greedy Cutout: in each of two rounds the coarse masks, and the fine ones of the
    worst."""
    coarse, children = masks.coarsen()
    return 2 * (len(coarse) + len(children[0]))


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("vanilla", "vanilla", by="nothing", copies=1, passes=_no_search),
        Strategy("random-cutout", "random_cutout", by="chance", copies=1, passes=_no_search),
        Strategy("random-coarse", "random_coarse", by="chance", copies=1, passes=_no_search),
        Strategy("random-fine", "random_fine", by="chance", copies=1, passes=_no_search),
        Strategy("random-both", "random_both", by="chance", copies=2, passes=_no_search),
        Strategy("random-band", "random_band", by="chance", copies=1, passes=_no_search),
        Strategy("gutout-coarse", "gutout_coarse", by="heat", copies=1, passes=lambda _: 4),
        Strategy("gutout-fine", "gutout_fine", by="heat", copies=1, passes=lambda _: 4),
        Strategy("gutout-both", "gutout_both", by="heat", copies=2, passes=lambda _: 8),
        Strategy("greedy-coarse", "greedy_coarse", by="loss", copies=1, passes=lambda m: _greedy(_coarse(m))),
        Strategy("greedy-fine", "greedy_fine", by="loss", copies=1, passes=lambda m: _greedy(len(m))),
        Strategy("greedy-multisize", "greedy_multisize", by="loss", copies=2, passes=_multisize),
        Strategy("grid-coarse", "grid_coarse", by="loss", copies=1, passes=lambda m: _grid(_coarse(m))),
        Strategy("grid-fine", "grid_fine", by="loss", copies=1, passes=lambda m: _grid(len(m))),
    )
}


def forward_equivalents(strategy: str, masks: MaskSet) -> int:
    """What one training image costs in one epoch, search and gradient step, in forward passes."""
    row = STRATEGIES[strategy]
    return row.passes(masks) + row.copies * (FORWARD + BACKWARD)


def on_one_image(
    model: nn.Module, image: Tensor, label: int, masks: MaskSet, *, fill: float | Tensor
) -> Iterator[tuple[str, list[list[Window]]]]:
    """What each strategy hides in every copy of an image (3, H, W), by the strategy's name; without those
    that cannot look at the model (Gutout)."""
    import torch

    for name, strategy in STRATEGIES.items():
        generator = torch.Generator().manual_seed(0)
        try:
            copies = strategy(
                model, image[None], torch.tensor([label]), masks, fill=fill, generator=generator
            )
        except ConfigError:
            continue
        yield name, [[_window(*corners) for corners in copy[0].tolist()] for copy in copies]


def _window(top: int, left: int, bottom: int, right: int) -> Window:
    return Window(top, left, bottom - top, right - left)
