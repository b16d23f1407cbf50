"""Evidence of any classifier: an image of which everything but one window is hidden, a pass for each window.

Sources: De-randomized Smoothing (Levine and Feizi, NeurIPS 2020), with the fill colour of this library where
the paper has a symbol for "nothing"; Smoothed ViT (Salman et al., CVPR 2022), which drops the tokens that
show nothing. What is hidden is filled before the network sees it, so evidence depends on the sight alone.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...config import ROUNDING
from ...geometry.patch import Size
from ...geometry.sights import sights_of
from ...views.ablated import Ablated, Tokens
from ...views.masked import Masked, check_logits, window_tensor
from ...views.network import Network
from ..alone import measure_movement
from ..contract import check_model
from ..masked import colour, mean_as_fill, views_at_once
from .windows import Remembering

TokensShown = Literal["dropped", "filled"]


class ShownWindows(Remembering):
    """A classifier that is shown one window of an image after the other; a source of evidence
    (:class:`certipatch.defenses.evidence.windows.Windows`).

    Args:
        model: maps (N, 3, H, W) float in [0, 1] to (N, classes) logits, in evaluation mode.
        image_size: (height, width) in pixels.
        windows: ``columns:4``, ``columns:19/5`` (width/stride) or ``blocks:75/10``.
        tokens: "dropped": a plain vision transformer does not see tokens that show nothing.
        fill, batch_size, precision, compile: as of :class:`certipatch.PatchCleanser`.

    Raises:
        ConfigError: windows that do not fit or leave a gap, a fill that is no colour. SoundnessError: a model
        whose answers depend on more than the view, or whose tokens cannot be dropped.
    """

    def __init__(
        self,
        model: nn.Module,
        image_size: Size,
        windows: str,
        *,
        tokens: TokensShown = "filled",
        fill: float | tuple[float, ...] | Tensor | None = None,
        batch_size: int | None = None,
        precision: str = "32-true",
        compile: bool = False,
    ) -> None:
        self.asked, self.image_size, self.sights = windows, image_size, sights_of(windows, image_size)
        self.model, self.tokens_shown = model, tokens
        self.fill = mean_as_fill(model) if fill is None else colour(fill)
        self.batch_size = views_at_once(model, image_size, batch_size)
        check_model(model)
        self.tokens = Tokens.of(model, image_size) if tokens == "dropped" else None
        compile = compile and self.tokens is None  # compiled code is for one number of tokens
        hiding = Ablated.but(self.sights, image_size)
        how: dict[str, Any] = {"batch_size": self.batch_size, "precision": precision, "compile": compile}
        self.network = Network(model, hiding, fill=self.fill, **how)
        self._moved = measure_movement(self.network, image_size)
        self.precision, self.passes = self.network.precision, len(self.sights) + 1
        self._hidden = window_tensor(hiding, self.network.device)
        self._groups = self._grouped()

    def _grouped(self) -> list[tuple[tuple[int, ...], Tensor]]:
        """Windows that may be in one batch: those that keep the same tokens, which all are without tokens."""
        kept = [self.tokens.kept(sight) if self.tokens else () for sight in self.sights]
        order = sorted(range(len(kept)), key=kept.__getitem__)
        device = self.network.device
        return [
            (tokens, torch.tensor(list(group), device=device))
            for tokens, group in groupby(order, kept.__getitem__)
        ]

    @property
    def least_margin(self) -> float:
        """The least margin, in logits, of what counts as proven: more than rounding was seen to move one."""
        return max(ROUNDING[self.precision], self._moved)

    @property
    def classes(self) -> int | None:
        """How many classes the model tells apart; None before it was looked at."""
        return self.network.classes

    def check(self) -> None:
        """Look at every premise on the model again. Raises SoundnessError."""
        check_model(self.model)
        self.network.check_unchanged()

    @torch.inference_mode()
    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        n, everything = len(images), torch.zeros_like(self._hidden[:1])
        parts = [
            self._logits(images, torch.arange(n, device=images.device), everything.expand(n, -1, -1)).cpu()
        ]
        vanilla = parts[0].argmax(dim=1)
        found = torch.empty(n, len(self.sights), parts[0].shape[1])
        for tokens, windows in self._groups:
            which = torch.arange(n, device=images.device).repeat_interleave(len(windows))
            hidden = self._hidden[windows.repeat(n)]
            with self._seeing(tokens):
                logits = self._logits(images, which, hidden)
            found[:, windows.cpu()] = logits.cpu().view(n, len(windows), -1)
        return found, vanilla

    def _seeing(self, tokens: tuple[int, ...]) -> AbstractContextManager[None]:
        """Inside, only these tokens are seen, if the network has tokens to drop."""
        return self.tokens.keep(tokens, self.network.device) if self.tokens else nullcontext()

    def _logits(self, images: Tensor, which: Tensor, hidden: Tensor) -> Tensor:
        """The logits of images ``which`` (V,) under what is hidden (V, windows, 4), batch by batch."""
        batches = zip(torch.split(which, self.batch_size), torch.split(hidden, self.batch_size), strict=True)
        return torch.cat(
            [check_logits(self.network(images[some], windows), len(some)) for some, windows in batches]
        )

    def trace(self, images: Tensor, which: Tensor, windows: Tensor) -> Tensor:
        """The logits (V, classes) of ``windows[v]`` of image ``which[v]``, with gradients."""
        look = Masked(self.model, self.fill.to(images.device))
        found: dict[int, Tensor] = {}
        for tokens, group in self._groups:
            mine = torch.isin(windows, group).nonzero()[:, 0]
            if len(mine):
                with self._seeing(tokens):
                    logits = look(images[which[mine]], self._hidden[windows[mine]])
                found |= dict(zip(mine.tolist(), check_logits(logits, len(mine)), strict=True))
        return torch.stack([found[v] for v in range(len(which))])

    def describe(self) -> dict[str, Any]:
        """Windows, tokens, fill colour and precision: what can change a result."""
        return {
            "windows": self.asked,
            "tokens": self.tokens_shown,
            "fill": self.fill.tolist(),
            "precision": self.precision,
        }

    def describe_network(self) -> dict[str, Any]:
        """Batch size and compilation, which change rounding only, and what rounding did."""
        return {**self.network.describe(), "moved": self._moved}
