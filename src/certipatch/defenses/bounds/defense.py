"""Interval bounds as a certified defense: the network answers as it is, and boxes of images certify it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...config import ROUNDING
from ...errors import ConfigError, SoundnessError
from ...geometry.masks import MaskSet
from ...geometry.patch import Threat
from ...views.intervals import bounds, layers_of
from ...views.masked import check_logits, visible, window_tensor
from ..contract import Verdict, check_images, check_labels, check_model, check_same_type

PRECISION = "32-true"  # of the answers; the bounds are in float64
BOXES = 64  # in one pass
MOST_OFF = 1e-3  # by how much bounds of a single image may differ from the network's logits, of the largest

Rectangle = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True, kw_only=True)
class IntervalVerdict(Verdict):
    """What interval bounds found out about one image; the first six fields are those of every verdict.

    Attributes:
        margin: the smallest lower bound of z_y - z_c over all masks, in logits; None without a certificate.
        weakest: the mask whose box has that bound: the patch is somewhere in it.
        rival: the class c of it.
    """

    weakest: tuple[Rectangle, ...] | None
    rival: int | None


class IntervalDefense:
    """A network whose answer is certified by interval bounds, of IBP (Chiang et al., ICLR 2020).

    The theorem. Let the masks cover every place of the patch. For an image and a mask take the box of all
    images that are the image outside of the mask and anything from 0 to 1 inside. If the lower bound of
    z_y - z_c over the box is above 0 for every mask and every c other than y, no patch changes the answer y:
    whatever the patch, some mask covers it, and the attacked image lies in its box.

    One mask for each place of the patch (k as large as the image) is the paper's; fewer masks are larger,
    cheaper, and certify less.

    Args:
        model: (N, 3, H, W) float in [0, 1] -> (N, classes) logits, of layers that bounds go through.
        masks: a covering set, whose masks are the boxes.

    Raises:
        SoundnessError: a layer that bounds do not go through, or masks that leave a place uncovered.
        ConfigError: a precision other than float32.
    """

    name = "ibp"

    def __init__(self, model: nn.Module, masks: MaskSet, *, precision: str = PRECISION) -> None:
        if precision != PRECISION:
            raise ConfigError(f"precision {precision}: expected {PRECISION} with bounds; drop --precision")
        hole = masks.uncovered_patches()
        if hole is not None:
            raise SoundnessError(
                f"masks: expected every patch to be covered, found {' with '.join(map(str, hole))} that no "
                "mask covers; use MaskSet.covering"
            )
        self.model, self.masks = model, masks
        check_model(model)
        self._check_bounds()

    @torch.no_grad()
    def _check_bounds(self) -> None:
        """The bounds of a single image are its logits: a layer that is not what its name says is found out.

        Raises SoundnessError.
        """
        layers_of(self.model)
        image = torch.rand(1, 3, *self.masks.image_size, generator=torch.Generator().manual_seed(0))
        image = image.to(next(self.model.parameters(), torch.zeros(())))
        logits = check_logits(self.model(image), 1).double()
        label = logits.argmax(dim=1)
        found = bounds(self.model, image.double(), image.double(), label)
        off = float((found - (logits[:, label[0]].unsqueeze(1) - logits)).abs().max())
        if not off <= MOST_OFF * max(1.0, float(logits.abs().max())):
            raise SoundnessError(
                f"bounds: expected those of a single image to be its logits, found them off by {off:.2g}; a "
                "layer does not do what its type says"
            )

    @property
    def threat(self) -> Threat:
        """What the masks cover: every patch of these shapes, anywhere."""
        return self.masks.threat

    @property
    def least_margin(self) -> float:
        """The least margin, in logits, of what counts as proven."""
        return ROUNDING[PRECISION]

    def predict(self, images: Tensor) -> Tensor:
        """The labels (N,) int64 of (N, 3, H, W) float images in [0, 1]: the model's own."""
        answers = [verdict.defended_label for verdict in self.examine(images)]
        return torch.tensor(answers, dtype=torch.int64)

    def certify(self, images: Tensor, labels: Tensor) -> list[IntervalVerdict]:
        """One verdict an image; see :meth:`examine`."""
        return self.examine(images, labels)

    @torch.no_grad()
    def examine(self, images: Tensor, labels: Tensor | None = None) -> list[IntervalVerdict]:
        """The verdicts on (N, 3, H, W) float images in [0, 1], with labels (N,) int64 the certificates too.

        Raises SoundnessError if a premise on the model or the images fails.
        """
        check_model(self.model)
        check_images(images, self.masks.image_size)
        check_labels(labels, images)
        check_same_type(images, self.model)
        if not len(images):
            return []
        logits = check_logits(self.model(images), len(images))
        check_labels(labels, images, logits.shape[1])
        answers = logits.argmax(dim=1).tolist()
        if labels is None:
            nothing: dict[str, Any] = {"label": None, "certified": None, "margin": None}
            nothing |= {"weakest": None, "rival": None, "passes": 1}
            return [IntervalVerdict(vanilla_label=a, defended_label=a, **nothing) for a in answers]
        return [self._verdict(*one) for one in zip(images, labels.tolist(), answers, strict=True)]

    def _verdict(self, image: Tensor, label: int, answer: int) -> IntervalVerdict:
        lowest = self._lowest(image, label)
        least = float(lowest.min())
        mask, rival = divmod(int(lowest.argmin()), lowest.shape[1])
        certified = least > 0 and answer == label
        return IntervalVerdict(
            label=label,
            vanilla_label=answer,
            defended_label=answer,
            certified=certified,
            margin=least if certified else None,
            passes=1 + 2 * len(self.masks),
            weakest=tuple((w.top, w.left, w.height, w.width) for w in self.masks.windows[mask]),
            rival=rival,
        )

    def _lowest(self, image: Tensor, label: int) -> Tensor:
        """(masks, classes) float64: the lower bounds over the box of each mask; infinite for the label."""
        found = []
        for windows in torch.split(window_tensor(self.masks, image.device), BOXES):
            shown = visible(windows, self.masks.image_size).unsqueeze(1)
            lower, upper = (torch.where(shown, image.double(), end) for end in (0.0, 1.0))
            labels = torch.full((len(windows),), label, device=image.device)
            found.append(bounds(self.model, lower, upper, labels))
        lowest = torch.cat(found)
        lowest[:, label] = torch.inf
        return lowest

    def describe(self) -> dict[str, Any]:
        """Masks and precision: what can change a result."""
        return {"masks": self.masks.to_json(), "precision": PRECISION}

    def describe_network(self) -> dict[str, Any]:
        """How the network is run."""
        return {"batch_size": BOXES, "compiled": False, "shared_prefix": None}
