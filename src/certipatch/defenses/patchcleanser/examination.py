"""One examination of some images: which views the network looks at, and the verdicts that follow from its
answers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...geometry.masks import MaskSet
from ...views.masked import check_logits, window_tensor
from ...views.network import Network
from ..contract import Verdict
from .algorithms import (
    UNKNOWN,
    Case,
    Inference,
    answer,
    forgeable,
    proven_rows,
    two_mask_correct,
    unchangeable,
)
from .schedule import Schedule, View


@dataclass(frozen=True, kw_only=True)
class PatchCleanserVerdict(Verdict):
    """What PatchCleanser found out about one image; the first six fields are those of every verdict.

    Attributes:
        defended_label: the answer of the inference.
        certified: Algorithm 2 for the true label; None if no label was given.
        margin: the smallest best-minus-second-best logit over the masked views that were computed.
        case: which case decided: agreed, disagreer or majority of Algorithm 1; agreed or champion of
            challenger masking.
        one_mask: the label under each mask alone.
        failing_pair: indices (i <= j) of the first wrong pair of masks, one-mask views (i = j) before others;
            None if no view that was computed is wrong. Of a proof without a label, the first that says
            something else than the answer.
        failing_label: the label under that pair, else None.
        proven: by place, for each mask 1 if its row is proven for the true label (without a label, for the
            answer), else 0, as one text; None if it was not asked for.
        proven_margins: the smallest margin in each row that is proven, in the order of the masks.
        unchangeable: the whole table is one label, so no single patch changed this answer or can; known
            without the true label, and no word about whether the answer is right. None if it was not asked
            for. All views were looked at, so ``margin`` is the smallest of them.
        forgeable: a patch on this image may lead to a wrong answer that is proven unchangeable; None if it
            was not asked for or no label was given.
    """

    defended_label: int
    margin: float
    case: Case
    one_mask: tuple[int, ...] = ()
    failing_pair: tuple[int, int] | None
    failing_label: int | None
    proven: str | None = None
    proven_margins: tuple[float, ...] | None = None
    unchangeable: bool | None = None
    forgeable: bool | None = None


@dataclass
class Answers:
    """What the network has said about one image so far.

    Attributes:
        vanilla: the label of the image without a mask.
        labels: (masks, masks) the table of labels, ``UNKNOWN`` where no view was looked at.
        margins: (masks, masks) the margin of each view, infinite where none was looked at.
        order: (masks, masks) the summed one-mask margins of each pair: a pair with a small sum is likely to
            be wrong.
    """

    vanilla: int
    labels: np.ndarray
    margins: np.ndarray
    order: np.ndarray

    @classmethod
    def of_first_round(cls, labels: np.ndarray, margins: np.ndarray) -> Answers:
        """The answers to the view without a mask and then those with one mask each: (masks + 1,) arrays."""
        k, gap = len(labels) - 1, margins[1:]
        table, gaps = np.full((k, k), UNKNOWN), np.full((k, k), np.inf, np.float32)
        np.fill_diagonal(table, labels[1:])
        np.fill_diagonal(gaps, gap)
        return cls(int(labels[0]), table, gaps, gap[:, None] + gap[None, :])

    def verdict(
        self, label: int | None, inference: Inference, *, places: bool, prove: bool
    ) -> PatchCleanserVerdict:
        """What follows from the answers, once the schedule has no more to ask."""
        defended, case = answer(self.labels, inference)
        by_place = self._by_place(defended if label is None else label) if places else {}
        proof = self._proof(label, defended) if prove else {}
        expected = defended if label is None and prove else label
        failing = None if expected is None else self._failing_pair(expected)
        return PatchCleanserVerdict(
            label=label,
            vanilla_label=self.vanilla,
            defended_label=defended,
            case=case,
            one_mask=tuple(self.labels.diagonal().tolist()),
            certified=None if label is None else two_mask_correct(self.labels, label),
            failing_pair=failing,
            failing_label=None if failing is None else int(self.labels[failing]),
            margin=float(self.margins.min()),
            passes=1 + int(np.triu(self.labels != UNKNOWN).sum()),
            **by_place,
            **proof,
        )

    def _proof(self, label: int | None, defended: int) -> dict[str, Any]:
        """Whether the answer is proven without its label; and of a labelled image, whether a wrong one can
        be."""
        forged = None if label is None else forgeable(self.labels, label, defended)
        return {"unchangeable": unchangeable(self.labels), "forgeable": forged}

    def _by_place(self, label: int) -> dict[str, Any]:
        """The rows that are proven, and how near the closest decision in each was."""
        rows = proven_rows(self.labels, label)
        smallest = np.minimum(self.margins, self.margins.T).min(axis=1)
        return {
            "proven": "".join("1" if row else "0" for row in rows),
            "proven_margins": tuple(smallest[rows].tolist()),
        }

    def _failing_pair(self, label: int) -> tuple[int, int] | None:
        """The wrong pair that is first in the order: of single masks if one is wrong, else of two."""
        wrong = np.argwhere(np.diag(self.labels.diagonal() != label))
        if not len(wrong):
            wrong = np.argwhere(np.triu((self.labels != label) & (self.labels != UNKNOWN)))
        if not len(wrong):
            return None
        first = self.order[wrong[:, 0], wrong[:, 1]].argmin()
        return int(wrong[first, 0]), int(wrong[first, 1])


class Examination:
    """One way through some images: the network's answers go into tables, tables become verdicts.

    The activations of the shared prefix are kept for as many images as fit into memory; an image that is
    decided makes room for the next.

    Args:
        images: (N, 3, H, W) float in [0, 1]. truth: the true label of each, or None.
        exhaustive, inference, places, prove: as of :class:`certipatch.PatchCleanser`, here for images
            without a label too.
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
        places: bool,
        prove: bool,
    ) -> None:
        self.network, self.images, self.truth = network, images, truth
        self.masks, self.inference, self.extra = len(masks), inference, {"places": places, "prove": prove}
        windows = window_tensor(masks, images.device)
        self.windows = torch.cat([torch.zeros_like(windows[:1]), windows])  # the first hides nothing
        self.schedule = Schedule(network.apart, exhaustive=exhaustive, inference=inference, **self.extra)
        self.room = list(range(min(len(images), network.images_at_once)))
        self.shared = network.room_for(len(self.room) * len(self.windows))
        self.place: dict[int, int] = {}  # where in ``shared`` the activations of an image are
        self.answers: dict[int, Answers] = {}
        self.verdicts: dict[int, PatchCleanserVerdict] = {}

    def run(self) -> list[PatchCleanserVerdict]:
        """The verdict on each image, in order."""
        waiting = deque(range(len(self.images)))
        while waiting or self.schedule.images:
            new = min(len(waiting), len(self.room))
            if new and self._first_round_pays(new, len(waiting)):
                self._first_round([waiting.popleft() for _ in range(new)])
            else:
                self._second_round(*self.schedule.next(self.network.batch_size))
        return [self.verdicts[image] for image in range(len(self.images))]

    def _first_round_pays(self, new: int, waiting: int) -> bool:
        """Whether so many new images fill a batch, are all that wait, or are all there is to do."""
        return (
            new * len(self.windows) >= self.network.batch_size or new == waiting or not self.schedule.images
        )

    def _first_round(self, images: list[int]) -> None:
        """Look at the unmasked and the one-mask views of new images."""
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
        tables = zip(images, labels.reshape(n, k + 1), margins.reshape(n, k + 1), strict=True)
        for image, found, gap in tables:
            one = self.answers[image] = Answers.of_first_round(found, gap)
            if not self.schedule.add(image, one.labels, self.truth[image], one.order):
                self._decided(image)

    def _second_round(self, views: list[View], apart: bool) -> None:
        """Look at two-mask views, all of masks that are apart (their activations can be pasted) or none."""
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
        answers = self.answers.pop(image)
        self.verdicts[image] = answers.verdict(self.truth[image], self.inference, **self.extra)
        self.room.append(self.place.pop(image))
        self.network.decided(1)

    def _index(self, numbers: np.ndarray) -> Tensor:
        return torch.as_tensor(numbers, device=self.images.device)

    def _at(self, which: np.ndarray, mask: np.ndarray) -> Tensor:
        """Where the activations of images under masks are kept."""
        return self._index(
            np.array([self.place[image] for image in which.tolist()]) * len(self.windows) + mask
        )


def _read(logits: Tensor, views: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels and margins (best minus second-best logit) of so many views.

    The label is the first of equals, which ``topk`` does not promise.
    """
    logits = check_logits(logits, views)
    best = logits.topk(2, dim=1).values
    return logits.argmax(dim=1).cpu().numpy(), (best[:, 0] - best[:, 1]).cpu().numpy()
