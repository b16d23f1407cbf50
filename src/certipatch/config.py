"""What a command was asked for: frozen, validated, written into manifests, and compared before a run is
resumed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field


class Frozen(BaseModel):
    """A value that cannot be changed, with no entries but the stated ones and no number that is not
    finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# The least logit margin of a certificate or proof that is counted by default, by precision: more than
# rounding in other batches, with other threads or after a resume was found to move one (docs/trust.md: 1e-5
# and 0.031).
ROUNDING = {"32-true": 1e-3, "16-mixed": 2**-7, "bf16-mixed": 2**-4}

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
    crop_pct: float = Field(default=1.0, ge=0.01, le=10)
    crop_mode: Literal["center", "squash", "border"] = "center"
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] = "bicubic"


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


def versions() -> dict[str, str]:
    """Of the packages that decide on numbers."""
    return {name: metadata.version(name) for name in ("certipatch", "torch", "timm", "numpy")}


def is_path(text: str) -> bool:
    """Whether a text names a path and no name of a model or data set: it has a separator of any system."""
    return "/" in text or "\\" in text


def parse_json(data: bytes) -> Any:
    """What a file of JSON says, where every reader must take it in the same sense.

    Raises ValueError for text that is not UTF-8, a key that occurs twice (readers differ in which of them
    counts), and numbers that are not finite.
    """
    return json.loads(
        data.decode(), object_pairs_hook=_once_each, parse_constant=_refuse_number, parse_float=_finite
    )


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


def differences(found: Any, expected: Any, at: str = "") -> list[str]:
    """Where two JSON values differ: ``["train.lr: 0.1 there, 0.01 here", ...]``.

    They are the same where they are written the same: true is not 1, and 1 is not 1.0.
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [*found, *(key for key in expected if key not in found)]
        return [
            line
            for key in keys
            for line in differences(found.get(key), expected.get(key), f"{at}.{key}".lstrip("."))
        ]
    same = found == expected and json.dumps(found) == json.dumps(expected)
    return [] if same else [f"{at}: {_short(found)} there, {_short(expected)} here"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
