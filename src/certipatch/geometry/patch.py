"""What the attacker may place: the size of a patch, as it is typed and as it is stated in a manifest.

A :class:`Window` is a rectangle of pixels, a :class:`Threat` the shapes and the number of patches that a
certificate is against.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt
from typing import Any

from ..errors import ConfigError

Size = tuple[int, int]  # (height, width) in pixels of the tensor the model sees


def whole(number: object, what: str) -> int:
    """A whole number of any type (numpy's, torch's) as Python's int, which never overflows.

    A number of numpy's in 8 bits wraps at 127, so that what is proven of it would not hold for the pixels
    that it is used for. Raises ConfigError for anything that is no whole number, such as 2.0.
    """
    try:
        return int(operator.index(number))  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(f"{what}: expected a whole number, found {number!r}") from None


@dataclass(frozen=True, order=True)
class Window:
    """A rectangle of pixels: rows ``top .. top+height-1``, columns ``left .. left+width-1``.

    Raises ConfigError for numbers that are not whole.
    """

    top: int
    left: int
    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("top", "left", "height", "width"):
            object.__setattr__(self, name, whole(getattr(self, name), f"window's {name}"))


@dataclass(frozen=True)
class Threat:
    """What the attacker may place anywhere in the image: ``patches`` at once, each of one of the shapes.

    Attributes:
        patch_size, other_patch_sizes: (height, width) of each shape in pixels.
        patches: how many patches there are at once, 1 or 2; they may overlap.

    Raises ConfigError for other numbers of patches, which nothing here reckons with, and sizes that are none.
    """

    patch_size: Size
    other_patch_sizes: tuple[Size, ...] = ()
    patches: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", size_of(self.patch_size, "patch size"))
        others = tuple(size_of(size, "patch size") for size in self.other_patch_sizes)
        object.__setattr__(self, "other_patch_sizes", others)
        object.__setattr__(self, "patches", whole(self.patches, "patches"))
        if self.patches not in (1, 2):
            raise ConfigError(f"patches {self.patches}: expected 1 or 2 at once")

    @classmethod
    def of(cls, stated: Mapping[str, Any]) -> Threat:
        """The threat that ``MaskSet.to_json`` has written among the entries of ``stated``."""
        return cls(
            stated["patch_size"],
            tuple(stated.get("other_patch_sizes", ())),
            stated.get("patches", 1),
        )

    @property
    def patch_sizes(self) -> tuple[Size, ...]:
        """Every shape that a patch may have."""
        return (self.patch_size, *self.other_patch_sizes)

    @property
    def is_single(self) -> bool:
        """Whether it is one patch of one shape, which training takes too."""
        return self.patches == 1 and not self.other_patch_sizes

    @property
    def keywords(self) -> dict[str, Any]:
        """The threat as ``MaskSet.covering`` takes it and a manifest states it.

        Of what has a default, only what differs from it is stated: a manifest of one patch of one shape says
        what it said before there were other threats.
        """
        stated: dict[str, Any] = {"patch_size": self.patch_size}
        if self.other_patch_sizes:
            stated["other_patch_sizes"] = self.other_patch_sizes
        if self.patches != 1:
            stated["patches"] = self.patches
        return stated

    def keys(self) -> Iterable[str]:
        """With :meth:`__getitem__`: ``MaskSet.covering(**threat, ...)`` takes the :attr:`keywords`."""
        return self.keywords.keys()

    def __getitem__(self, keyword: str) -> Any:
        return self.keywords[keyword]

    @property
    def shapes(self) -> str:
        """The shapes of a patch as they are typed: ``39x20+20x39``."""
        return "+".join(map(by, self.patch_sizes))

    @property
    def file_name(self) -> str:
        """The threat in the name of a file or folder: ``5x5``, ``39x20+20x39``, ``2-patches-20x20``."""
        return self.shapes if self.patches == 1 else f"{self.patches}-patches-{self.shapes}"

    @property
    def text(self) -> str:
        """The threat as a person reads it.

        >>> Threat((39, 20), ((20, 39),)).text, Threat((20, 20), patches=2).text
        ('39x20+20x39', '2 x 20x20')
        >>> Threat((39, 20), ((20, 39),), patches=2).text
        '2 x (39x20+20x39)'
        """
        if self.patches == 1:
            return self.shapes
        shapes = f"({self.shapes})" if self.other_patch_sizes else self.shapes
        return f"{self.patches} x {shapes}"


def size_of(sides: Iterable[object], what: str) -> Size:
    """Two whole numbers of any type as (height, width). Raises ConfigError for anything else."""
    found = tuple(sides) if isinstance(sides, Iterable) else (sides,)
    if len(found) != 2:
        raise ConfigError(f"{what}: expected (height, width), found {sides!r}")
    return whole(found[0], what), whole(found[1], what)


def by(size: Size) -> str:
    """(39, 20) -> ``39x20``: height x width, as it is typed."""
    return f"{size[0]}x{size[1]}"


def fits_into(small: Size, large: Size) -> bool:
    """Whether a rectangle of size ``small`` lies within one of size ``large``, unturned."""
    return small[0] <= large[0] and small[1] <= large[1]


def patch_side(percent: Fraction, image_size: Size) -> int:
    """Side of the smallest square patch that is at least ``percent`` % of the image: rounded *up*, exactly.

    >>> [patch_side(Fraction(p), (224, 224)) for p in (1, 2, 3)]
    [23, 32, 39]
    """
    area = percent / 100 * image_size[0] * image_size[1]
    return isqrt(-(-area.numerator // area.denominator) - 1) + 1 if area > 0 else 0


def parse_patch(text: str, image_size: Size) -> Size:
    """The (height, width) in pixels of a patch as it is typed.

    It is typed as ``"3%"`` (share of the image's area, a square), ``"39"`` (a square) or ``"39x20"`` (height
    x width). Raises ConfigError for anything else, and for a patch that is empty or larger than the image.
    """
    try:
        size = _read_size(text, image_size)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"patch {text!r}: expected '3%' of the area, '39' or '39x20' pixels (height x width)"
        ) from None
    check_patch(size, image_size, shown=text)
    return size


def _read_size(text: str, image_size: Size) -> Size:
    """Raises ValueError or ZeroDivisionError for a text that is no size."""
    if text.strip().endswith("%"):
        if len(text) > 20 or "e" in text.lower():
            raise ValueError("a share like 1e9000% would be computed to its last digit")
        side = patch_side(Fraction(text.strip()[:-1]), image_size)
        return side, side
    sides = [int(side) for side in text.lower().split("x")]
    height, width = sides if len(sides) > 1 else sides * 2
    return height, width


def parse_patches(text: str, image_size: Size) -> tuple[Size, ...]:
    """The sizes of one or several shapes, joined by ``+``, each typed as :func:`parse_patch` takes it."""
    return tuple(parse_patch(shape, image_size) for shape in text.split("+"))


def check_patch(patch_size: Size, image_size: Size, *, shown: str) -> None:
    """Raise ConfigError for a patch that is empty or larger than the image; ``shown`` is how it was typed."""
    if min(patch_size) < 1:
        raise ConfigError(f"patch {shown!r}: expected at least 1 pixel on each side, found {by(patch_size)}")
    if not fits_into(patch_size, image_size):
        raise ConfigError(
            f"patch {shown!r}: {by(patch_size)} pixels do not fit into an image of {by(image_size)}; choose "
            "a smaller patch"
        )
