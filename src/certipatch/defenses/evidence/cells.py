"""Evidence of a network whose output cells have limited sight by themselves: one pass for all windows.

Source: PatchGuard (Xiang et al., USENIX Security 2021), Clipped BagNet (Zhang et al., 2020) and BagCert
(Metzen and Yatsura, ICLR 2021), all on networks like BagNet. What a cell sees is measured before a
certificate rests on it. The image is whole, so that a convolution may round a cell otherwise where pixels
change that the cell does not see; the smallest margin is recorded, and how far logits were seen to move.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...config import ROUNDING
from ...errors import ConfigError, SoundnessError
from ...geometry.patch import Size
from ...geometry.sights import sights_of
from ...views.cells import CellLogits, check_sights
from ...views.network import eager, fingerprint
from ..alone import measure_cells
from ..contract import check_model
from ..masked import views_at_once
from .windows import Remembering


class CellWindows(Remembering):
    """A network with cells; a source of evidence (:class:`certipatch.defenses.evidence.windows.Windows`).

    Args:
        model: (N, 3, H, W) float in [0, 1] -> (N, classes) logits, in evaluation mode; its last module has
            ``cells`` and ``sights`` (:class:`certipatch.views.cells.CellLogits`).
        image_size: (height, width) in pixels.
        windows: ``cells:17/8``, the field and the stride of the network.
        batch_size: images in one pass.
        precision: "32-true", "bf16-mixed" or "16-mixed".

    Raises:
        ConfigError: windows that are not those of the network. SoundnessError: a cell that sees more than the
        windows say, or a model whose answers depend on more than the view.
    """

    passes = 1
    classes: int | None  # as many as there were logits when it was last looked at; None before

    def __init__(
        self,
        model: nn.Module,
        image_size: Size,
        windows: str,
        *,
        batch_size: int | None = None,
        precision: str = "32-true",
    ) -> None:
        self.asked, self.image_size, self.sights = windows, image_size, sights_of(windows, image_size)
        self.model, self.precision, self.classes = model, precision, None
        self.images_at_once = views_at_once(model, image_size, batch_size)
        self.batch_size = self.images_at_once
        check_model(model)
        self.cells = CellLogits(model)
        self._check_number()
        self._measure()

    def _check_number(self) -> None:
        """Raises ConfigError where the network does not have a cell for each window."""
        own = self.cells.sights(self.image_size)
        if len(own) != len(self.sights):
            (box,), stride = own[0], getattr(self.cells.network, "stride", "")
            raise ConfigError(
                f"windows {self.asked}: expected those of the network, cells:{box.height}/{stride}, found "
                f"{len(self.sights)} where it has {len(own)}"
            )

    def _measure(self) -> None:
        check_sights(self.cells, self.sights, self.image_size)
        device = next(self.model.parameters()).device
        self._moved = measure_cells(self._logits, self.image_size, self.precision, device)
        self._made_of = fingerprint(self.model)

    @property
    def least_margin(self) -> float:
        """The least margin, in logits, of what counts as proven: more than rounding was seen to move one."""
        return max(ROUNDING[self.precision], self._moved)

    def check(self) -> None:
        """Look at every premise on the model again, and measure it anew if it was changed.

        Raises SoundnessError.
        """
        check_model(self.model)
        if fingerprint(self.model) != self._made_of:
            self._measure()

    @torch.inference_mode()
    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = torch.cat([self._logits(some) for some in torch.split(images, self.images_at_once)])
        if found.ndim != 3 or found.shape[1] != len(self.sights) or found.shape[2] < 2:
            raise SoundnessError(
                f"cells: expected ({len(images)}, {len(self.sights)}, 2 or more classes), found "
                f"{tuple(found.shape)}"
            )
        if not found.isfinite().all():
            raise SoundnessError(
                "cells: expected finite logits, found NaN or infinity; check the weights and the precision"
            )
        self.classes = found.shape[2]
        return found.cpu(), found.mean(dim=1).argmax(dim=1).cpu()

    def _logits(self, images: Tensor) -> Tensor:
        """(N, windows, classes) float32."""
        with torch.inference_mode():
            function = eager(self.cells, self.precision)
            return function(images.contiguous(memory_format=torch.channels_last)).float()

    def trace(self, images: Tensor, which: Tensor, windows: Tensor) -> Tensor:
        """The logits (V, classes) of ``windows[v]`` of image ``which[v]``, with gradients."""
        some, place = torch.unique(which, return_inverse=True)
        cells: Tensor = self.cells(images[some])
        return cells[place, windows].float()

    def describe(self) -> dict[str, Any]:
        """Windows and precision: what can change a result."""
        return {"windows": self.asked, "precision": self.precision}

    def describe_network(self) -> dict[str, Any]:
        """Batch size, which changes rounding only, and what rounding did."""
        return {
            "batch_size": self.images_at_once,
            "compiled": False,
            "shared_prefix": None,
            "moved": self._moved,
        }
