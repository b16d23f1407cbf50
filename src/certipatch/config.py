"""What a command was asked for: frozen, validated, written into manifests, and compared before a run is
resumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """A value that cannot be changed, with no entries but the stated ones and no number that is not
    finite."""

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


@dataclass(frozen=True)
class DataAsked:
    """Where images are, as ``--data``, ``--split`` and ``--class-map`` say it."""

    place: str
    split: str | None = None
    class_map: str | None = None


@dataclass(frozen=True)
class ModelAsked:
    """A model as ``--model``, ``--weights``, ``--pretrained``, ``--image-size`` and ``--crop-pct`` ask for
    it.

    ``name`` is a training run (a folder) or the name of an architecture; the rest goes with the latter only.
    """

    name: str
    weights: str | None = None
    pretrained: bool = False
    image_size: str | None = None
    crop_pct: float | None = None

    @property
    def has_weights(self) -> bool:
        """Whether weights were asked for besides the name."""
        return bool(self.weights or self.pretrained)

    @property
    def bare(self) -> bool:
        """Whether nothing was asked for besides the name, as it must be for a training run."""
        return not (self.has_weights or self.image_size or self.crop_pct)


def differences(found: Any, expected: Any, at: str = "") -> list[str]:
    """Where two JSON values differ: ``["train.lr: 0.1 there, 0.01 here", ...]``."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [*found, *(key for key in expected if key not in found)]
        return [
            line
            for key in keys
            for line in differences(found.get(key), expected.get(key), f"{at}.{key}".lstrip("."))
        ]
    return [] if found == expected else [f"{at}: {_short(found)} there, {_short(expected)} here"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
