"""Where evidence comes from: a network that says of each window of limited sight what it shows.

Two kinds of network do. Any classifier, of an image of which everything but one window is hidden
(:mod:`certipatch.defenses.evidence.shown`): a forward pass for each window. And a network whose output cells
have limited sight by themselves, such as a BagNet: one forward pass for all. A defense does not ask which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...geometry.patch import Size
from ...geometry.sights import Sight


class Windows(Protocol):
    """A source of logits for each window. What a window says depends on the pixels of its sight alone.

    Attributes:
        model: the undefended model: (N, 3, H, W) float in [0, 1] -> (N, classes) logits.
        image_size: (height, width) in pixels.
        sights: of each window the rectangles that it shows.
        precision: in which the network runs: "32-true", "bf16-mixed" or "16-mixed".
        batch_size: of an attack on it: views, or images, in one pass with gradients.
        passes: forward passes of the model for one image, its undefended answer among them.
        least_margin: the least margin, in logits, of what counts as proven: more than rounding moves.
        classes: how many classes the model tells apart; None before it was looked at.
    """

    model: nn.Module
    image_size: Size
    sights: tuple[Sight, ...]
    precision: str
    batch_size: int
    passes: int

    @property
    def least_margin(self) -> float: ...

    @property
    def classes(self) -> int | None: ...

    def check(self) -> None:
        """Look at every premise on the model that can be looked at, before each use.

        Raises SoundnessError, for a network that sees more than it says among others.
        """
        ...

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the windows say of images (N, 3, H, W), as it is certified: without gradients.

        Returns:
            (N, windows, classes) float32 logits on the CPU, and the undefended labels (N,) int64. They are
            finite: others are refused with SoundnessError.
        """
        ...

    def remembering(self) -> AbstractContextManager[None]:
        """Inside, :meth:`look` at images that were looked at last says again what it said: for several rules,
        or sizes of the patch, on the same images. The model must not change inside."""
        ...

    def trace(self, images: Tensor, which: Tensor, windows: Tensor) -> Tensor:
        """The logits (V, classes) of window ``windows[v]`` of image ``which[v]``, with gradients for an
        attack; the same function up to rounding. At most ``batch_size`` at a time."""
        ...

    def describe(self) -> dict[str, Any]:
        """Whatever of it can change a result, as JSON: ``windows`` as it is typed, ``precision``, the fill
        colour of hidden pixels if there are some."""
        ...

    def describe_network(self) -> dict[str, Any]:
        """How the network is run: ``batch_size``, ``compiled``, ``shared_prefix`` and ``moved``."""
        ...


class Remembering(ABC):
    """What sources of evidence share: inside of ``remembering`` they look once at equal images."""

    _last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None  # images, and what was said of them

    @abstractmethod
    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`look` answers, of any images."""

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside, what was said of the images that were looked at last is said again, if they are equal."""
        self._last = (torch.empty(0), (torch.empty(0), torch.empty(0)))
        try:
            yield
        finally:
            self._last = None

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, windows, classes) float32 logits on the CPU, and the undefended labels (N,)."""
        if self._last is None:
            return self._look(images)
        if self._last[0].device != images.device or not torch.equal(self._last[0], images):
            self._last = images.clone(), self._look(images)  # the caller may write into his
        return self._last[1]


class Cells(Protocol):
    """A network (an ``nn.Module``) that answers for all windows in one forward pass, such as a BagNet.

    ``forward`` of it gives the mean of the cells' logits (N, classes), so that it is an ordinary model too.
    """

    def cells(self, images: Tensor) -> Tensor:
        """(N, windows, classes) logits of images (N, 3, H, W) in [0, 1]; row by row as :meth:`sights`."""
        ...

    def sights(self, image_size: Size) -> tuple[Sight, ...]:
        """What each cell sees of an image of that size; to be measured and not believed."""
        ...
