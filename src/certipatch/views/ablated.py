"""Views of which everything but one window is hidden; a transformer drops the tokens that show nothing.

Source of the dropping: Smoothed ViT (Salman et al., CVPR 2022). timm's ``VisionTransformer`` hands its
tokens, position embedded, to its module ``patch_drop`` before the first block, so what that module gives back
is all that the rest of the network sees: no forward pass of timm's is copied here. Hidden pixels are filled
all the same, so tokens are dropped for speed and for what the network makes of it, and no certificate depends
on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SoundnessError
from ..geometry.coverage import Mask
from ..geometry.patch import Size
from ..geometry.sights import Sight, hidden_by


@dataclass(frozen=True)
class Ablated:
    """What is hidden in the view of each window: all that the window does not show.

    Attributes:
        image_size: (height, width) in pixels.
        windows: for each view the rectangles that are hidden, as :class:`~certipatch.views.masked.Hiding`
            has them.
    """

    image_size: Size
    windows: tuple[Mask, ...]

    @classmethod
    def but(cls, sights: Sequence[Sight], image_size: Size) -> Ablated:
        """The views that show one sight each, and nothing else."""
        return cls(image_size, tuple(hidden_by(sight, image_size) for sight in sights))

    def __len__(self) -> int:
        return len(self.windows)


class Tokens:
    """The tokens of a plain vision transformer, of which some are kept for a while.

    Attributes:
        size: (height, width) of a token in pixels. prefix: class token and registers, which are always kept.
    """

    def __init__(self, transformer: nn.Module, image_size: Size) -> None:
        parts: Any = transformer
        height, width = parts.patch_embed.patch_size
        self.size: Size = (int(height), int(width))
        self.grid: Size = (image_size[0] // self.size[0], image_size[1] // self.size[1])
        self.prefix = int(parts.num_prefix_tokens)
        self._drop: nn.Module = parts.patch_drop

    @classmethod
    def of(cls, model: nn.Module, image_size: Size) -> Tokens:
        """The tokens of a model, which is a ``VisionTransformer`` of timm or has one in it.

        Raises SoundnessError for any other: one that turns its tokens by their place (rotary embedding) or
        looks at them in windows needs all of them where they were.
        """
        found = [module for module in model.modules() if is_plain(module)]
        if len(found) != 1:
            kind = next((type(each).__name__ for each in model.modules() if has_tokens(each)), None)
            raise SoundnessError(
                "tokens dropped: expected a VisionTransformer of timm that looks at all tokens at once, "
                f"found {kind or 'a network without tokens'}; take --tokens filled"
            )
        tokens = cls(found[0], image_size)
        tokens.check(model)
        return tokens

    def kept(self, sight: Sight) -> tuple[int, ...]:
        """The numbers of the tokens, row by row, that show a pixel of a sight."""
        shown = np.zeros(self.grid, dtype=bool)
        (h, w) = self.size
        for r in sight:
            if r.height and r.width:
                rows = slice(r.top // h, -(-(r.top + r.height) // h))
                shown[rows, r.left // w : -(-(r.left + r.width) // w)] = True
        return tuple(np.flatnonzero(shown).tolist())

    @contextmanager
    def keep(self, tokens: Sequence[int], device: torch.device) -> Iterator[None]:
        """Inside, the transformer sees the tokens of these numbers only, and those of its own in front."""
        places = [*range(self.prefix), *(self.prefix + number for number in tokens)]
        index = torch.tensor(places, device=device)

        def some(_module: nn.Module, _inputs: tuple[Tensor, ...], every: Tensor) -> Tensor:
            return every[:, index]

        handle = self._drop.register_forward_hook(some)
        try:
            yield
        finally:
            handle.remove()

    @torch.inference_mode()
    def check(self, model: nn.Module) -> None:
        """Raises SoundnessError unless ``patch_drop`` is given all tokens, once, for an image."""
        seen: list[int] = []
        handle = self._drop.register_forward_hook(lambda _m, _i, every: seen.append(every.shape[1]))
        parameter = next(model.parameters(), torch.zeros(()))
        image_size = (self.grid[0] * self.size[0], self.grid[1] * self.size[1])
        try:
            model(torch.zeros(1, 3, *image_size).to(parameter))
        finally:
            handle.remove()
        expected = self.prefix + self.grid[0] * self.grid[1]
        if seen != [expected]:
            raise SoundnessError(f"tokens dropped: expected {expected} tokens in one row, found {seen}")


def is_plain(module: nn.Module) -> bool:
    """Whether a module is timm's ``VisionTransformer`` or a kind of it: all tokens look at all others, and
    their places are added to them in front."""
    return any(
        (kind.__name__, kind.__module__) == ("VisionTransformer", "timm.models.vision_transformer")
        for kind in type(module).__mro__
    ) and hasattr(module, "patch_drop")


def has_tokens(module: nn.Module) -> bool:
    """Whether a module looks like a transformer on patches of an image."""
    return hasattr(module, "patch_embed")
