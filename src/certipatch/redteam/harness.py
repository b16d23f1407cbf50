"""The harness between an attack and the defense: it believes nothing that the attack says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..data.source import as_float
from ..defenses.contract import CertifiedDefense, Verdict
from ..errors import ConfigError
from ..geometry.patch import Threat, by

D = TypeVar("D", bound=CertifiedDefense)


@dataclass(frozen=True)
class Proposal:
    """What an attack may propose: a patch on one image.

    Attributes:
        image: the number of the image.
        top, left: the place of the patch.
        content: (3, h, w) float in [0, 1]; (h, w) is one of the shapes of the threat.
    """

    image: int
    top: int
    left: int
    content: Tensor


class Harness(Generic[D]):
    """Pastes what an attack proposes, checks that it is one patch, and asks the defense.

    Args:
        pixels: (N, 3, H, W) uint8, the clean images.

    Raises ConfigError for a defense against two patches.
    """

    def __init__(self, defense: D, pixels: Tensor) -> None:
        check_one_patch(defense.threat)
        self.defense, self.pixels = defense, pixels

    def judge(self, proposals: list[Proposal]) -> list[tuple[Tensor, Verdict]]:
        """For each proposal the patched image (3, H, W) uint8, and what the defense says of it.

        The image is rounded to 8 bits before it is judged.

        Raises ConfigError for a proposal that is not one patch with values in [0, 1].
        """
        if not proposals:
            return []
        patched = torch.stack([self._paste(proposal) for proposal in proposals])
        return list(zip(patched, self.defense.examine(as_float(patched)), strict=True))

    def _paste(self, proposal: Proposal) -> Tensor:
        """The patched image, after every check."""
        self._check_place(proposal)
        content, (_, h, w) = proposal.content, proposal.content.shape
        # NaN is neither at least 0 nor at most 1.
        if not content.is_floating_point() or not bool(((content >= 0) & (content <= 1)).all()):
            raise ConfigError("attack: expected finite values in [0, 1], found others")
        clean = self.pixels[proposal.image]
        patched = clean.clone()
        rows, columns = slice(proposal.top, proposal.top + h), slice(proposal.left, proposal.left + w)
        patched[:, rows, columns] = (content * 255).round().to(torch.uint8)
        changed = (patched != clean).any(dim=0).nonzero()
        sides = torch.tensor((h, w), device=changed.device)
        if len(changed) and (changed.amax(0) - changed.amin(0) >= sides).any():
            raise ConfigError(
                f"attack: expected changes within one patch of {by((h, w))}, found some outside"
            )
        return patched

    def _check_place(self, proposal: Proposal) -> None:
        """Raises ConfigError for a patch of another shape than the threat has, or not within the image."""
        shapes, (height, width) = self.defense.threat.patch_sizes, self.pixels.shape[2:]
        found, top, left = tuple(proposal.content.shape), proposal.top, proposal.left
        known = found in [(3, *size) for size in shapes]
        if not known or not (0 <= top <= height - found[1] and 0 <= left <= width - found[2]):
            raise ConfigError(
                f"attack: expected a patch of {' or '.join(map(by, shapes))} pixels within "
                f"{by((height, width))}, found {found} at ({top}, {left})"
            )


def check_one_patch(threat: Threat) -> None:
    """Raises ConfigError for a defense against two patches: goals, places and harness know of one only."""
    if threat.patches != 1:
        raise ConfigError(
            f"attack: expected masks against one patch, found those against {threat.patches}; there is no "
            "attack with more yet"
        )
