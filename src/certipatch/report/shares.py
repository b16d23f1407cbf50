"""A share of images, which is always shown with its fraction and its interval."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Share:
    """A share of images, with its fraction and 95 % Wilson interval."""

    count: int
    images: int

    @classmethod
    def of(cls, hits: Iterable[bool]) -> Share:
        """The share of images that are hit, one entry an image."""
        found = [bool(hit) for hit in hits]
        return cls(sum(found), len(found))

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the interval, from 0 to 1."""
        from scipy.stats import binomtest  # here, as it takes a second to import

        low, high = binomtest(self.count, self.images).proportion_ci(0.95, method="wilson")
        return float(low), float(high)

    @property
    def part(self) -> float:
        """The share itself, from 0 to 1."""
        return self.count / self.images

    @property
    def percent(self) -> float:
        """The share in %."""
        return 100 * self.count / self.images

    @property
    def _percents(self) -> str:
        low, high = self.interval
        return f"{100 * low:.1f}-{100 * high:.1f}"

    def __str__(self) -> str:
        return f"{100 * self.count / self.images:.1f} % ({self.count}/{self.images}; {self._percents})"

    def stacked(self) -> str:
        """Three short lines, for a column of a table."""
        return f"{100 * self.count / self.images:.1f} %\n{self.count}/{self.images}\n{self._percents}"

    def to_json(self) -> dict[str, Any]:
        """``count``, ``images``, ``share`` and ``interval_95``."""
        return {
            "count": self.count,
            "images": self.images,
            "share": self.part,
            "interval_95": self.interval,
        }
