"""The toy defense around a model: each band of columns is shown alone, and the labels of these views vote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from certipatch.defenses.contract import Verdict, check_images, check_labels, check_model
from certipatch.geometry.patch import Size, Threat
from certipatch.views.masked import Masked, check_logits, find_mean
from defenses.toy.votes import bands_of, reached, slack, winner


@dataclass(frozen=True, kw_only=True)
class ToyVerdict(Verdict):
    """What the toy found out about one image; ``votes`` of each label, and the ``slack`` of the true one."""

    votes: list[int]
    slack: int | None


class ToyDefense:
    """A classifier of which each of some bands of columns is shown alone, and the most frequent label is the
    answer."""

    name = "toy"

    def __init__(
        self, model: nn.Module, image_size: Size, threat: Threat, *, bands: int = 8, most: int | None = None
    ):
        self.model, self.image_size, self.threat, self.bands = model, image_size, threat, bands
        width = image_size[1]
        self.most = max(reached(width, bands, w) for _, w in threat.patch_sizes) if most is None else most
        self.fill = find_mean(model)

    @torch.inference_mode()
    def examine(self, images: Tensor, labels: Tensor | None = None) -> list[ToyVerdict]:
        check_model(self.model)
        check_images(images, self.image_size)
        check_labels(labels, images)
        truth = [None] * len(images) if labels is None else labels.tolist()
        look, n = Masked(self.model, torch.as_tensor(self.fill)), len(images)
        vanilla = check_logits(self.model(images), n).argmax(dim=1).tolist()
        height, width = self.image_size
        votes = []
        for start, end in bands_of(width, self.bands):
            hidden = torch.tensor([[0, 0, height, start], [0, end, height, width]], device=images.device)
            logits = check_logits(look(images, hidden.expand(n, -1, -1)), n)
            votes.append(nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1]))
        counts = torch.stack(votes).sum(dim=0).tolist()
        return [self._verdict(*one) for one in zip(truth, vanilla, counts, strict=True)]

    def _verdict(self, label: int | None, vanilla: int, votes: list[int]) -> ToyVerdict:
        spare = None if label is None else slack(votes, label, self.most)
        return ToyVerdict(
            label=label,
            vanilla_label=vanilla,
            defended_label=winner(votes),
            certified=None if spare is None else spare >= 0,
            margin=None,
            passes=1 + self.bands,
            votes=votes,
            slack=spare,
        )

    def describe(self) -> dict[str, Any]:
        threat = {"image_size": self.image_size, **self.threat.keywords}
        return {"threat": threat, "bands": self.bands, "precision": "32-true"}

    def describe_network(self) -> dict[str, Any]:
        return {"batch_size": 1, "compiled": False, "shared_prefix": None}
