"""The recipe of a training run: every option that decides on the weights at its end, validated."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from ..config import Frozen
from ..errors import ConfigError

LOSSES = ("cross-entropy", "best-window-removed", "region-margin", "interval")
Loss = Literal["best-window-removed", "region-margin", "interval"]
# The paper's choices as the command line calls them. Each has one value in a manifest, None: runs from before
# there was a choice have no other.
PAPERS: dict[str, Any] = {"optimizer": "momentum", "schedule": "step", "augment": "none", "keep": "last"}
PAPERS |= {"compile_step": False}


class TrainConfig(Frozen):
    """The fine-tuning recipe; the defaults are the Greedy Cutout paper's (``lr`` 0.001 for ViT and ConvNeXt).

    Attributes:
        strategy: a name in :data:`certipatch.training.strategies.STRATEGIES`.
        patch_size, masks_per_axis: of the fine set of masks; (height, width) in pixels, and k.
        batch_size: images in each step of each process.
        lr, lr_decay: the learning rate, and what the schedule "step" multiplies it by after half of the
            epochs.
        momentum: of an optimizer that has one.
        weight_decay: 0, or the decay of weights; biases and the weights of normalisations have none.
        optimizer: timm's name of one, such as "adamw"; None: "momentum", SGD with classical momentum.
        schedule: how the learning rate goes on: "constant", or from step to step along a "cosine" or "linear"
            to 0; None: "step".
        augment: what happens to an image before it is masked: "flip" (half of them, left to right), "crop"
            (to a random part of 70 to 100 % of its area) or "flip,crop"; None: "none".
        ema: the run ends with an average of the weights in which those before each step weigh so much, less
            in the first steps; None: with the weights as they are.
        keep: "best": the run ends with the weights of the epoch after which most of some held-out training
            images were certified; None: "last".
        clean_fraction: the share of each batch that is left unmasked (our addition; the paper's value is 0).
        gradcam_layer: where the gutout strategies look; None: the model's last feature map.
        compile_step: run forward and backward pass of the step compiled, which changes rounding; None: False.
        search_every: a strategy that searches does so in every so many epochs, and uses again in between what
            it found last; None: in each epoch.
        search_precision: the precision of the search; None: that of the training.
        loss: what a step minimises (:mod:`certipatch.training.losses`); None: cross-entropy.
        windows: which bands or blocks random-band shows one of, as ``certify --windows`` takes them; None:
            columns of an eighth of the width.
    """

    strategy: str
    patch_size: tuple[int, int]
    masks_per_axis: int
    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=64, ge=1)
    lr: float = Field(default=0.01, gt=0)
    lr_decay: float = Field(default=0.1, gt=0, le=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    optimizer: str | None = None
    schedule: Literal["constant", "cosine", "linear"] | None = None
    augment: Literal["flip", "crop", "flip,crop"] | None = None
    ema: float | None = Field(default=None, gt=0, lt=1)
    keep: Literal["best"] | None = None
    compile_step: Literal[True] | None = None
    clean_fraction: float = Field(default=0.0, ge=0, le=1)
    gradcam_layer: str | None = None
    search_every: int | None = Field(default=None, ge=1)
    search_precision: Literal["32-true", "bf16-mixed", "16-mixed"] | None = None
    windows: str | None = None
    loss: Loss | None = None
    seed: int = 0

    @field_validator("loss", mode="before")
    @classmethod
    def _plain(cls, loss: Any) -> Any:
        """Cross-entropy has one value, None: runs from before there was a choice have no other."""
        return None if loss == LOSSES[0] else loss

    @field_validator("search_every")
    @classmethod
    def _each(cls, every: int | None) -> int | None:
        """Searching in every epoch has one value, None: runs from before there was a choice have no other."""
        return None if every == 1 else every

    @field_validator(*PAPERS, mode="before")
    @classmethod
    def _papers(cls, value: Any, info: ValidationInfo) -> Any:
        return None if value == PAPERS[str(info.field_name)] else value


def train_config(**options: Any) -> TrainConfig:
    """A :class:`TrainConfig`. Raises ConfigError that names the first value that cannot be."""
    try:
        return TrainConfig(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        choice = f" or '{PAPERS[name]}'" if name in PAPERS else ""
        raise ConfigError(f"{name}: {problem['msg']}{choice}, found {problem['input']}") from None


def default_lr(arch: str, optimizer: str | None = None) -> float:
    """The paper's learning rate: 0.001 for ViT and ConvNeXt, 0.01 for ResNet and the rest.

    Raises ConfigError for another optimizer than the paper's, for which the paper has none.
    """
    if optimizer not in (None, PAPERS["optimizer"]):
        raise ConfigError(
            f"optimizer {optimizer}: expected a learning rate (the paper's are for SGD with momentum), found "
            "none; give --lr"
        )
    return 0.001 if arch.startswith(("vit", "deit", "swin", "convnext")) else 0.01
