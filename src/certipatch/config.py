"""What a run was asked to do: frozen, validated, written into its manifest, and compared before it is
resumed."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


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
