"""PatchCleanser around a model: one examination of images that both ``predict`` and ``certify`` are read from.

The labels of masked views come from the network (``network``), what is asked next from the schedule (``schedule``), and the
decisions from the integer algorithms (``patchcleanser``).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ConfigError, SoundnessError
from .masks import MaskSet
from .models import find_mean
from .network import Network
from .patchcleanser import INFERENCES, UNKNOWN, Case, Inference, answer, two_mask_correct
from .schedule import Schedule, View
from .views import check_logits, default_batch_size, window_tensor


@dataclass(frozen=True)
class Verdict:
    """What was found out about one image.

    Attributes:
        label: the true label, None if none was given.
        vanilla_label: the undefended model's label F(x).
        defended_label: the inference's label.
        case: which case decided: agreed, disagreer or majority of Algorithm 1; agreed or champion of challenger masking.
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


class MaskedClassifier:
    """A classifier that is looked at under masks: the premises of every certificate, and its network.

    Arguments and errors are those of :class:`PatchCleanser`.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: MaskSet,
        *,
        fill: float | tuple[float, ...] | Tensor | None = None,
        batch_size: int | None = None,
        precision: str = "32-true",
        compile: bool = False,
        shared_prefix: bool | str = False,
    ) -> None:
        hole = masks.uncovered_patches()
        if hole is not None:
            raise SoundnessError(
                f"masks: expected every patch to be covered, found {' with '.join(map(str, hole))} that no mask covers; use MaskSet.covering"
            )
        self.masks = masks
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
        if compile or shared_prefix:  # both run the model as it is now
            _check_model(model)
        self.network = Network(
            model, masks, fill=self.fill, batch_size=self.batch_size, precision=precision, compile=compile, shared_prefix=shared_prefix
        )

    @property
    def model(self) -> nn.Module:
        return self.network.model

    def check(self, images: Tensor, labels: Tensor | None) -> None:
        """Every premise that can be looked at, before each use."""
        _check_model(self.model)
        self.network.check_unchanged()
        self._check_images(images, labels)

    def _check_images(self, images: Tensor, labels: Tensor | None) -> None:
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


def _check_model(model: nn.Module) -> None:
    """The premises on the model. Refuse, do not warn."""
    if any(module.training for module in model.modules()):
        raise SoundnessError("model: expected evaluation mode, found training mode; call model.eval() first")
    batch_norm = nn.modules.batchnorm._BatchNorm
    if any(isinstance(module, batch_norm) and module.running_mean is None for module in model.modules()):
        raise SoundnessError(
            "model: expected answers that depend on one image alone, found a BatchNorm without running statistics, "
            "which mixes the images of a batch; set track_running_stats"
        )


class PatchCleanser(MaskedClassifier):
    """A classifier defended by double masking, with a certificate against every patch its masks cover.

    Source: PatchCleanser (USENIX Security 2022), Algorithms 1 (predict) and 2 (certify), and challenger masking from its code.

    Args:
        model: maps (N, 3, H, W) float in [0, 1] to (N, classes) logits, normalisation inside, in evaluation mode.
        masks: cover whatever the attacker may place (``masks.threat``); checked here.
        fill: colour of masked pixels, a number or (3,) in [0, 1]; default: the mean of the model's Normalize
            layer (so 0 after normalisation), or 0.5 for a model without one.
        batch_size: views in one forward pass; default by image size.
        exhaustive: compute every pair of every image, also where the answer is already settled.
        inference: "double-masking" (Algorithm 1), or "challenger": where masks disagree, at most one pass for each mask but one,
            and not one for each pair. Both answer the label of a certified image under every patch; on others they may differ.
        precision: "32-true", or "bf16-mixed" or "16-mixed" for a forward pass under autocast.
        compile: compile the network with torch.compile, its weights frozen as they are now: some times faster after some
            seconds to a minute. Where it cannot be compiled, a line says so and ``network.compiled`` is False.
        shared_prefix: run the first, local layers of a CNN for the one-mask views only, if the model has such; or the
            name of the layer where they end (``network.prefix.layer`` of an earlier one).

    Raises:
        SoundnessError: the masks do not cover every patch; on use: training mode, a model that changed since it was
            compiled or cut, images of another size or outside [0, 1], logits that are not finite.
        ConfigError: an unknown precision or inference, a fill that is no colour.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: MaskSet,
        *,
        fill: float | tuple[float, ...] | Tensor | None = None,
        batch_size: int | None = None,
        exhaustive: bool = False,
        inference: Inference = "double-masking",
        precision: str = "32-true",
        compile: bool = False,
        shared_prefix: bool | str = False,
    ) -> None:
        if inference not in INFERENCES:
            raise ConfigError(f"inference {inference!r}: expected one of {', '.join(INFERENCES)}")
        self.exhaustive, self.inference = exhaustive, inference
        super().__init__(model, masks, fill=fill, batch_size=batch_size, precision=precision, compile=compile, shared_prefix=shared_prefix)

    def check_precision(self, certified: str) -> None:
        """Raises SoundnessError if the network does not run here in the precision that it was certified in."""
        if self.network.precision != certified:
            raise SoundnessError(
                f"precision: expected {certified}, in which it was certified, found {self.network.precision}, in which the model runs here; "
                "certify again on this machine"
            )

    def predict(self, images: Tensor) -> Tensor:
        """The defended labels (N,) int64 of (N, 3, H, W) float images in [0, 1]."""
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
        """The verdicts behind both: with labels the certificates too, without them only what the inference needs.

        All images share the forward passes: batches are filled with the next missing pairs of the images that are
        still undecided, and a decided image makes room for another.
        """
        self.check(images, labels)
        truth: list[int | None] = [None] * len(images) if labels is None else [int(label) for label in labels]
        return _Examination(self.network, self.masks, images, truth, exhaustive=self.exhaustive, inference=self.inference).run()


@dataclass
class _Answers:
    """What the network has said about one image. ``order``: summed one-mask margins."""

    vanilla: int
    labels: np.ndarray
    margins: np.ndarray
    order: np.ndarray

    def verdict(self, label: int | None, inference: Inference) -> Verdict:
        table = self.labels
        defended, case = answer(table, inference)
        certified, failing, failing_label = None, None, None
        if label is not None:
            certified = two_mask_correct(table, label)
            wrong = np.argwhere(np.diag(table.diagonal() != label))
            if not len(wrong):
                wrong = np.argwhere(np.triu((table != label) & (table != UNKNOWN)))
            if len(wrong):
                first = self.order[wrong[:, 0], wrong[:, 1]].argmin()
                failing = (int(wrong[first, 0]), int(wrong[first, 1]))
                failing_label = int(table[failing])
        passes = 1 + int(np.triu(table != UNKNOWN).sum())
        return Verdict(label, self.vanilla, defended, case, certified, failing, failing_label, float(self.margins.min()), passes)


class _Examination:
    """One way through some images: the network's answers go into tables, tables become verdicts.

    Activations of the shared prefix are kept for as many images as fit; an image that is decided makes room for the next.
    """

    def __init__(
        self, network: Network, masks: MaskSet, images: Tensor, truth: list[int | None], *, exhaustive: bool, inference: Inference
    ) -> None:
        self.network, self.images, self.truth, self.masks, self.inference = network, images, truth, len(masks), inference
        windows = window_tensor(masks, images.device)
        self.windows = torch.cat([torch.zeros_like(windows[:1]), windows])  # the first hides nothing
        self.schedule = Schedule(network.apart, exhaustive=exhaustive, inference=inference)
        self.room = list(range(min(len(images), network.images_at_once)))
        self.shared = network.room_for(len(self.room) * len(self.windows))
        self.place: dict[int, int] = {}  # of an image's activations
        self.answers: dict[int, _Answers] = {}
        self.verdicts: dict[int, Verdict] = {}

    def run(self) -> list[Verdict]:
        waiting = deque(range(len(self.images)))
        while waiting or self.schedule.images:
            new = min(len(waiting), len(self.room))
            if new and (new * len(self.windows) >= self.network.batch_size or new == len(waiting) or not self.schedule.images):
                self._first_round([waiting.popleft() for _ in range(new)])
            else:
                self._second_round(*self.schedule.next(self.network.batch_size))
        return [self.verdicts[image] for image in range(len(self.images))]

    def _first_round(self, images: list[int]) -> None:
        """The unmasked and the one-mask views of new images."""
        for image in images:
            self.place[image] = self.room.pop()
        n, k = len(images), self.masks
        which, mask = np.repeat(images, k + 1), np.tile(np.arange(k + 1), n)
        labels, margins = np.full(n * (k + 1), UNKNOWN), np.zeros(n * (k + 1), np.float32)
        for start in range(0, len(which), self.network.batch_size):
            part = slice(start, start + self.network.batch_size)
            shown = self._index(mask[part])
            activations = self.network.head(self.images[self._index(which[part])], self.windows[shown])
            if self.shared is not None:
                self.shared[self._at(which[part], mask[part])] = activations.permute(0, 2, 3, 1)
            labels[part], margins[part] = _read(self.network.tail(activations), len(shown))
        for image, found, gap in zip(images, labels.reshape(n, k + 1), margins.reshape(n, k + 1), strict=True):
            gap = gap[1:]
            one = _Answers(int(found[0]), np.full((k, k), UNKNOWN), np.full((k, k), np.inf, np.float32), gap[:, None] + gap[None, :])
            np.fill_diagonal(one.labels, found[1:])
            np.fill_diagonal(one.margins, gap)
            self.answers[image] = one
            if not self.schedule.add(image, one.labels, self.truth[image], one.order):
                self._decided(image)

    def _second_round(self, views: list[View], apart: bool) -> None:
        """Two-mask views."""
        which, i, j = np.array(views).T
        if apart and self.network.prefix and self.shared is not None:
            one, other = self.shared[self._at(which, i + 1)], self.shared[self._at(which, j + 1)]
            activations = self.network.prefix.paste(one, other, self._index(j)).permute(0, 3, 1, 2)
        else:
            pairs = torch.cat([self.windows[self._index(i + 1)], self.windows[self._index(j + 1)]], dim=1)
            activations = self.network.head(self.images[self._index(which)], pairs)
        labels, margins = _read(self.network.tail(activations), len(views))
        for (image, a, b), margin in zip(views, margins.tolist(), strict=True):
            self.answers[image].margins[a, b] = margin  # the upper triangle is enough for the minimum
        for image in self.schedule.tell(views, labels.tolist()):
            self._decided(image)

    def _decided(self, image: int) -> None:
        self.verdicts[image] = self.answers.pop(image).verdict(self.truth[image], self.inference)
        self.room.append(self.place.pop(image))

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.as_tensor(numbers, device=self.images.device)

    def _at(self, which: np.ndarray, mask: np.ndarray) -> Tensor:
        """Where the activations of images under masks are kept."""
        return self._index(np.array([self.place[image] for image in which.tolist()]) * len(self.windows) + mask)


def _read(logits: Tensor, views: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (the first of equals, which topk does not promise) and margins (best minus second-best logit) of so many views."""
    logits = check_logits(logits, views)
    best = logits.topk(2, dim=1).values
    return logits.argmax(dim=1).cpu().numpy(), (best[:, 0] - best[:, 1]).cpu().numpy()
