"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.source import as_float
from ..defenses.contract import Verdict
from ..defenses.patchcleanser.defense import PatchCleanser
from ..errors import ConfigError
from ..geometry.masks import MaskSet
from ..geometry.patch import by


@dataclass(frozen=True)
class Proposal:
    """What an attack may say: image number ``image`` gets a patch of ``content`` (3, h, w) in [0, 1] at (top,
    left).

    (h, w) is one of the shapes that the masks are against.
    """

    image: int
    top: int
    left: int
    content: Tensor


class Harness:
    """Pastes what an attack proposes, checks that it is one patch, and asks the defended model.

    Args:
        pixels: (N, 3, H, W) uint8, the clean images.

    Raises ConfigError for a defense against two patches.
    """

    def __init__(self, defense: PatchCleanser, pixels: Tensor) -> None:
        check_one_patch(defense.masks)
        self.defense, self.pixels = defense, pixels

    def judge(self, proposals: list[Proposal]) -> list[tuple[Tensor, Verdict]]:
        """For each proposal the patched image (3, H, W) uint8, rounded to 8 bits before it is judged, and
        what the defense says of it.

        Raises ConfigError for a proposal that is not one patch with values in [0, 1].
        """
        if not proposals:
            return []
        patched = torch.stack([self._paste(proposal) for proposal in proposals])
        return list(zip(patched, self.defense.examine(as_float(patched)), strict=True))

    def _paste(self, proposal: Proposal) -> Tensor:
        shapes, (height, width) = self.defense.masks.patch_sizes, self.defense.masks.image_size
        content, top, left = proposal.content, proposal.top, proposal.left
        found = tuple(content.shape)
        if found not in [(3, *size) for size in shapes] or not (
            0 <= top <= height - found[1] and 0 <= left <= width - found[2]
        ):
            raise ConfigError(
                f"attack: expected a patch of {' or '.join(map(by, shapes))} pixels within "
                f"{by((height, width))}, found {found} at ({top}, {left})"
            )
        _, h, w = found
        if not content.is_floating_point() or not bool(
            ((content >= 0) & (content <= 1)).all()
        ):  # NaN is neither
            raise ConfigError("attack: expected finite values in [0, 1], found others")
        clean = self.pixels[proposal.image]
        patched = clean.clone()
        patched[:, top : top + h, left : left + w] = (content * 255).round().to(torch.uint8)
        changed = (patched != clean).any(dim=0).nonzero()
        if (
            len(changed)
            and (changed.amax(0) - changed.amin(0) >= torch.tensor((h, w), device=changed.device)).any()
        ):
            raise ConfigError(
                f"attack: expected changes within one patch of {by((h, w))}, found some outside"
            )
        return patched


def check_one_patch(masks: MaskSet) -> None:
    """Refuse masks against two patches: goals, places and harness are those of one."""
    if masks.patches != 1:
        raise ConfigError(
            f"attack: expected masks against one patch, found those against {masks.patches}; there is no "
            "attack with more yet"
        )
