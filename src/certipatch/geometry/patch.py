"""TODO."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import isqrt
from typing import Any

from ..errors import ConfigError

Size = tuple[int, int]  # (height, width) in pixels of the tensor the model sees


@dataclass(frozen=True, order=True)
class Window:
    """A rectangle of pixels: rows ``top .. top+height-1``, columns ``left .. left+width-1``."""

    top: int
    left: int
    height: int
    width: int


def patch_side(percent: Fraction, image_size: Size) -> int:
    """Side of the smallest square patch that is at least ``percent`` % of the image: rounded *up*, exactly.

    >>> [patch_side(Fraction(p), (224, 224)) for p in (1, 2, 3)]
    [23, 32, 39]
    """
    area = percent / 100 * image_size[0] * image_size[1]
    return isqrt(-(-area.numerator // area.denominator) - 1) + 1 if area > 0 else 0


def parse_patch(text: str, image_size: Size) -> Size:
    """``"3%"`` (share of the area, a square), ``"39"`` (square) or ``"39x20"`` (height x width) -> (height,
    width).

    Raises ConfigError for anything else, and for a patch that is empty or larger than the image.
    """
    try:
        if text.strip().endswith("%"):
            if len(text) > 20 or "e" in text.lower():  # 1e9000% would be computed to the last digit
                raise ValueError
            percent = Fraction(text.strip()[:-1])
            size = (patch_side(percent, image_size),) * 2
        else:
            sides = [int(side) for side in text.lower().split("x")]
            size = (sides[0], sides[-1])
            if len(sides) > 2:
                raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"patch {text!r}: expected '3%' of the area, '39' or '39x20' pixels (height x width)"
        ) from None
    _check_patch(size, image_size, shown=text)
    return size


def parse_patches(text: str, image_size: Size) -> tuple[Size, ...]:
    """``"39x20+20x39"``: several shapes, each as :func:`parse_patch` takes it; of one shape, the one."""
    return tuple(parse_patch(shape, image_size) for shape in text.split("+"))


def _check_patch(patch_size: Size, image_size: Size, *, shown: str) -> None:
    if min(patch_size) < 1:
        raise ConfigError(f"patch {shown!r}: expected at least 1 pixel on each side, found {by(patch_size)}")
    if patch_size[0] > image_size[0] or patch_size[1] > image_size[1]:
        raise ConfigError(
            f"patch {shown!r}: {by(patch_size)} pixels do not fit into an image of {by(image_size)}; choose "
            "a smaller patch"
        )


def by(size: Size) -> str:
    """(39, 20) -> ``39x20``: height x width, as it is typed."""
    return f"{size[0]}x{size[1]}"


def threat_of(stated: dict[str, Any]) -> dict[str, Any]:
    """What the masks of a manifest are against: :attr:`MaskSet.threat`, out of what ``to_json`` wrote."""
    found = {"patch_size": tuple(stated["patch_size"])}
    if "other_patch_sizes" in stated:
        found["other_patch_sizes"] = tuple(map(tuple, stated["other_patch_sizes"]))
    return found | ({"patches": stated["patches"]} if "patches" in stated else {})


def threat_text(patch_size: Size, other_patch_sizes: tuple[Size, ...] = (), patches: int = 1) -> str:
    """A :attr:`MaskSet.threat` as a person reads it.

    >>> threat_text((39, 20), ((20, 39),)), threat_text((20, 20), patches=2), threat_text((39, 20), ((20, 39),), 2)
    ('39x20+20x39', '2 x 20x20', '2 x (39x20+20x39)')
    """
    shapes = "+".join(map(by, (patch_size, *other_patch_sizes)))
    return (
        shapes
        if patches == 1
        else f"{patches} x ({shapes})"
        if other_patch_sizes
        else f"{patches} x {shapes}"
    )
