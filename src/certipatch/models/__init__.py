"""A timm name, a file of weights or a training run to a network."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import describe

__all__ = ["describe"]


def __getattr__(name: str) -> Any:
    """``describe`` needs torch and is imported when first used, so that the command line starts at once."""
    if name == "describe":
        return import_module(".build", __name__).describe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
