"""What a run was asked to do: frozen, validated, written into its manifest, and compared before it is resumed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import ConfigError


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Side = Annotated[int, Field(ge=1, le=10_000)]  # pixels; a manifest is not believed more


class ModelSpec(Frozen):
    """Everything but the weights that makes a file of images into labels.

    ``image_size`` is (height, width) of the tensor the model sees; ``crop_pct``, ``crop_mode`` and
    ``interpolation`` are those of timm's evaluation transform; ``mean`` and ``std`` live inside the model.
    """

    arch: str
    num_classes: int = Field(ge=2, le=1_000_000)
    classes: tuple[str, ...]
    image_size: tuple[Side, Side]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float = 1.0
    crop_mode: str = "center"
    interpolation: str = "bicubic"


class TrainConfig(Frozen):
    """The fine-tuning recipe; the defaults are the Greedy Cutout paper's (``lr`` 0.001 for ViT and ConvNeXt).

    The learning rate is multiplied by ``lr_decay`` after half of the epochs. ``clean_fraction`` of each batch
    is left unmasked (our addition; the paper's value is 0). ``gradcam_layer`` is where the gutout strategies look,
    the model's last feature map if None. A strategy that searches does so in every ``search_every``-th epoch, in each if None, and
    uses again in between what it found last; ``search_precision`` is that of the search, the training's if None.
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
    clean_fraction: float = Field(default=0.0, ge=0, le=1)
    gradcam_layer: str | None = None
    search_every: int | None = Field(default=None, ge=1)
    search_precision: Literal["32-true", "bf16-mixed", "16-mixed"] | None = None
    seed: int = 0

    @field_validator("search_every")
    @classmethod
    def _each(cls, every: int | None) -> int | None:
        """One value for one thing: None, which runs from before there was a choice are read as."""
        return None if every == 1 else every


def train_config(**options: Any) -> TrainConfig:
    """A :class:`TrainConfig`, or a ConfigError that names the first value that cannot be."""
    try:
        return TrainConfig(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{problem['loc'][0]}: {problem['msg']}, found {problem['input']}") from None


def default_lr(arch: str) -> float:
    """The paper's learning rate: 0.001 for ViT and ConvNeXt, 0.01 for ResNet and the rest."""
    return 0.001 if arch.startswith(("vit", "deit", "swin", "convnext")) else 0.01


def differences(found: Any, expected: Any, at: str = "") -> list[str]:
    """Where two JSON values differ: ``["train.lr: 0.1 there, 0.01 here", ...]``."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [*found, *(key for key in expected if key not in found)]
        return [line for key in keys for line in differences(found.get(key), expected.get(key), f"{at}.{key}".lstrip("."))]
    return [] if found == expected else [f"{at}: {_short(found)} there, {_short(expected)} here"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
