"""PatchCleanser around a model: one examination of images that both ``predict`` and ``certify`` are read
from.

The labels of masked views come from the network (``network``), what is asked next from the schedule
(``schedule``), and the decisions from the integer algorithms (``patchcleanser``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ..errors import SoundnessError
from .patchcleanser.algorithms import Case


@dataclass(frozen=True)
class Verdict:
    """What was found out about one image.

    Attributes:
        label: the true label, None if none was given.
        vanilla_label: the undefended model's label F(x).
        defended_label: the inference's label.
        case: which case decided: agreed, disagreer or majority of Algorithm 1; agreed or champion of
            challenger masking.
        certified: Algorithm 2 for the true label; None if no label was given.
        failing_pair: indices (i <= j) of the first wrong pair of masks, one-mask views (i = j) before others;
            else None.
        failing_label: the label under that pair, else None.
        margin: the smallest best-minus-second-best logit over the masked views that were computed.
        passes: forward passes spent on this image.
    """

    label: int | None
    vanilla_label: int
    defended_label: int
    case: Case
    certified: bool | None
    failing_pair: tuple[int, int] | None
    failing_label: int | None
    margin: float
    passes: int


class CertifiedDefense(Protocol):
    """What every certified defense offers; others may later stand beside PatchCleanser."""

    def predict(self, images: Tensor) -> Tensor: ...

    def certify(self, images: Tensor, labels: Tensor) -> list[Verdict]: ...


def _check_model(model: nn.Module) -> None:
    """The premises on the model. Refuse, do not warn."""
    if any(module.training for module in model.modules()):
        raise SoundnessError("model: expected evaluation mode, found training mode; call model.eval() first")
    batch_norm = nn.modules.batchnorm._BatchNorm
    if any(isinstance(module, batch_norm) and module.running_mean is None for module in model.modules()):
        raise SoundnessError(
            "model: expected answers that depend on one image alone, found a BatchNorm without running "
            "statistics, "
            "which mixes the images of a batch; set track_running_stats"
        )
