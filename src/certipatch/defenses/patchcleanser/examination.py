"""TODO."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...geometry.masks import MaskSet
from ...views.masked import check_logits, window_tensor
from ...views.network import Network
from ..contract import Verdict
from .algorithms import UNKNOWN, Inference, answer, two_mask_correct
from .schedule import Schedule, View


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
        return Verdict(
            label,
            self.vanilla,
            defended,
            case,
            certified,
            failing,
            failing_label,
            float(self.margins.min()),
            passes,
        )


class _Examination:
    """One way through some images: the network's answers go into tables, tables become verdicts.

    Activations of the shared prefix are kept for as many images as fit; an image that is decided makes room
    for the next.
    """

    def __init__(
        self,
        network: Network,
        masks: MaskSet,
        images: Tensor,
        truth: list[int | None],
        *,
        exhaustive: bool,
        inference: Inference,
    ) -> None:
        self.network, self.images, self.truth, self.masks, self.inference = (
            network,
            images,
            truth,
            len(masks),
            inference,
        )
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
            if new and (
                new * len(self.windows) >= self.network.batch_size
                or new == len(waiting)
                or not self.schedule.images
            ):
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
        for image, found, gap in zip(
            images, labels.reshape(n, k + 1), margins.reshape(n, k + 1), strict=True
        ):
            gap = gap[1:]
            one = _Answers(
                int(found[0]),
                np.full((k, k), UNKNOWN),
                np.full((k, k), np.inf, np.float32),
                gap[:, None] + gap[None, :],
            )
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
        return self._index(
            np.array([self.place[image] for image in which.tolist()]) * len(self.windows) + mask
        )


def _read(logits: Tensor, views: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (the first of equals, which topk does not promise) and margins (best minus second-best logit) of
    so many views."""
    logits = check_logits(logits, views)
    best = logits.topk(2, dim=1).values
    return logits.argmax(dim=1).cpu().numpy(), (best[:, 0] - best[:, 1]).cpu().numpy()
