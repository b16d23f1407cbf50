"""PatchCleanser around a model: one examination of images that both ``predict`` and ``certify`` are read from.

The labels of masked views come from the network (``views``), the decisions from the integer algorithms
(``patchcleanser``); here is the schedule between the two, which computes no view that cannot matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ConfigError, SoundnessError
from .masks import MaskSet
from .models import find_mean
from .patchcleanser import UNKNOWN, Case, double_masking, missing_pairs, two_mask_correct
from .views import default_batch_size, predictions, window_tensor

EXAMINED_AT_ONCE = 128


@dataclass(frozen=True)
class Verdict:
    """What was found out about one image.

    Attributes:
        label: the true label, None if none was given.
        vanilla_label: the undefended model's label F(x).
        defended_label: Algorithm 1's label.
        case: which case of Algorithm 1 decided: agreed, disagreer, majority.
        certified: Algorithm 2 for the true label; None if no label was given.
        failing_pair: indices (i <= j) of the first wrong pair of masks, one-mask views (i = j) before others; else None.
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


class PatchCleanser:
    """A classifier defended by double masking, with a certificate against every patch its masks cover.

    Source: PatchCleanser (USENIX Security 2022), Algorithms 1 (predict) and 2 (certify).

    Args:
        model: maps (N, 3, H, W) float in [0, 1] to (N, classes) logits, normalisation inside, in evaluation mode.
        masks: covers every position of a patch of ``masks.patch_size``; checked here.
        fill: colour of masked pixels, a number or (3,) in [0, 1]; default: the mean of the model's Normalize
            layer (so 0 after normalisation), or 0.5 for a model without one.
        batch_size: views in one forward pass; default by image size.
        exhaustive: compute every pair of every image, also where the answer is already settled.

    Raises:
        SoundnessError: the masks do not cover the patch; on use: training mode, images of another size or
            outside [0, 1], logits that are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: MaskSet,
        *,
        fill: float | tuple[float, ...] | Tensor | None = None,
        batch_size: int | None = None,
        exhaustive: bool = False,
    ) -> None:
        hole = masks.uncovered_patch(masks.patch_size)
        if hole is not None:
            raise SoundnessError(f"masks: expected every patch to be covered, found {hole} that no mask covers; use MaskSet.covering")
        self.model, self.masks, self.exhaustive = model, masks, exhaustive
        colour = torch.as_tensor(find_mean(model) if fill is None else fill, dtype=torch.float32).reshape(-1)
        if len(colour) not in (1, 3) or not ((colour >= 0) & (colour <= 1)).all():
            raise ConfigError(f"fill: expected one value or three in [0, 1], found {colour.tolist()}")
        self.fill = colour.expand(3)
        parameter = next(model.parameters(), None)
        on_cpu = parameter is None or parameter.device.type == "cpu"
        # A CPU is fastest while a batch stays in its caches, an accelerator wants large ones.
        default = default_batch_size(masks.image_size, pixels=2**17 if on_cpu else 2**23)
        self.batch_size = default if batch_size is None else batch_size
        if self.batch_size < 1:
            raise ConfigError(f"batch size {batch_size}: expected at least 1 view")

    def predict(self, images: Tensor) -> Tensor:
        """Algorithm 1: the defended labels (N,) int64 of (N, 3, H, W) float images in [0, 1]."""
        return torch.tensor([verdict.defended_label for verdict in self.examine(images)], dtype=torch.int64)

    def certify(self, images: Tensor, labels: Tensor) -> list[Verdict]:
        """Algorithm 2: one verdict an image. Certified: ``predict`` answers the label under every patch.

        Args:
            images: (N, 3, H, W) float in [0, 1].
            labels: (N,) int64, the true classes.
        """
        return self.examine(images, labels)

    @torch.inference_mode()
    def examine(self, images: Tensor, labels: Tensor | None = None) -> list[Verdict]:
        """The verdicts behind both: with labels the certificates too, without them only what Algorithm 1 needs.

        All images share the forward passes: after the one-mask views, every batch is filled with the next
        missing pairs of the images that are still undecided. Which pair of an image comes next depends on its
        one-mask margins alone (smallest sum first: the likeliest to be wrong), so a wrong pair is met early.
        """
        self._check(images, labels)
        n, k = len(images), len(self.masks)
        if n == 0:
            return []
        if n > EXAMINED_AT_ONCE:  # the tables of all undecided images are looked at for every batch
            parts = [slice(i, i + EXAMINED_AT_ONCE) for i in range(0, n, EXAMINED_AT_ONCE)]
            return [verdict for part in parts for verdict in self.examine(images[part], None if labels is None else labels[part])]
        truth: list[int | None] = [None] * n if labels is None else [int(label) for label in labels]
        device = images.device
        nothing = torch.zeros(1, 1, 4, dtype=torch.int64, device=device)
        windows = window_tensor(self.masks, device)

        def look(which: np.ndarray, shown: Tensor) -> tuple[np.ndarray, np.ndarray]:
            index = torch.as_tensor(which, device=device)
            found = predictions(self.model, images, index, shown, fill=self.fill, batch_size=self.batch_size)
            return found[0].numpy(), found[1].numpy()

        table = np.full((n, k, k), UNKNOWN, dtype=np.int64)
        margin = np.full((n, k, k), np.inf, dtype=np.float32)
        vanilla, _ = look(np.arange(n), nothing.expand(n, 1, 4))
        which, mask = np.divmod(np.arange(n * k), k)
        table[which, mask, mask], margin[which, mask, mask] = look(which, windows[torch.as_tensor(mask, device=device)])

        single = margin.diagonal(axis1=1, axis2=2)
        order = single[:, :, None] + single[:, None, :]
        while True:
            batch = self._next_views(table, truth, order)
            if not len(batch):
                break
            which, i, j = batch.T
            pair = windows[torch.as_tensor(batch[:, 1:], device=device)].flatten(1, 2)
            found, gap = look(which, pair)
            if (found == UNKNOWN).any():
                raise SoundnessError("views: expected a label for each, found some not computed")
            table[which, i, j] = table[which, j, i] = found
            margin[which, i, j] = gap  # the upper triangle is enough for the minimum

        return [self._verdict(truth[a], int(vanilla[a]), table[a], margin[a], order[a]) for a in range(n)]

    def _next_views(self, table: np.ndarray, truth: list[int | None], order: np.ndarray) -> np.ndarray:
        """Up to ``batch_size`` views (image, i, j): the undecided images in turn, each in the order of its margins."""
        queues = []
        for a, label in enumerate(truth):
            pairs = np.argwhere(np.triu(table[a] == UNKNOWN)) if self.exhaustive else missing_pairs(table[a], label)
            if len(pairs):
                i, j = pairs[np.argsort(order[a][pairs[:, 0], pairs[:, 1]], kind="stable")[: self.batch_size]].T
                queues.append(np.stack([np.arange(len(i)), np.full_like(i, a), i, j], axis=1))
        if not queues:
            return np.empty((0, 3), dtype=np.int64)
        views = np.concatenate(queues)
        return views[np.argsort(views[:, 0], kind="stable")[: self.batch_size], 1:]

    @staticmethod
    def _verdict(label: int | None, vanilla: int, table: np.ndarray, margin: np.ndarray, order: np.ndarray) -> Verdict:
        defended, case = double_masking(table.diagonal().tolist(), lambda i: table[i].tolist())
        certified, failing, failing_label = None, None, None
        if label is not None:
            certified = two_mask_correct(table, label)
            wrong = np.argwhere(np.diag(table.diagonal() != label))
            if not len(wrong):
                wrong = np.argwhere(np.triu((table != label) & (table != UNKNOWN)))
            if len(wrong):
                first = order[wrong[:, 0], wrong[:, 1]].argmin()
                failing = (int(wrong[first, 0]), int(wrong[first, 1]))
                failing_label = int(table[failing])
        passes = 1 + int(np.triu(table != UNKNOWN).sum())
        return Verdict(label, vanilla, defended, case, certified, failing, failing_label, float(margin.min()), passes)

    def _check(self, images: Tensor, labels: Tensor | None) -> None:
        """The premises on the model and the images. Refuse, do not warn."""
        if any(module.training for module in self.model.modules()):
            raise SoundnessError("model: expected evaluation mode, found training mode; call model.eval() first")
        batch_norm = nn.modules.batchnorm._BatchNorm
        if any(isinstance(module, batch_norm) and module.running_mean is None for module in self.model.modules()):
            raise SoundnessError(
                "model: expected answers that depend on one image alone, found a BatchNorm without running statistics, "
                "which mixes the images of a batch; set track_running_stats"
            )
        expected = (3, *self.masks.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise SoundnessError(
                f"images: expected (N, {', '.join(map(str, expected))}), found {tuple(images.shape)}; resize them or build masks of that size"
            )
        if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
            raise SoundnessError("images: expected float values in [0, 1], found others; normalisation belongs inside the model")
        if labels is None:
            return
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != images.shape[:1] or (labels < 0).any():
            found = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise SoundnessError(f"labels: expected an int64 tensor ({len(images)},) of classes from 0 up, found {found}")
