"""A name or a path to images as the model sees them, every one of them counted or named."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decode import open_image
    from .load import load_source
    from .source import Images, Source

__all__ = ["Images", "Source", "load_source", "open_image"]

LAZY = {"Images": "source", "Source": "source", "load_source": "load", "open_image": "decode"}


def __getattr__(name: str) -> Any:
    """Names that need torch are imported when first used, so that the command line starts at once."""
    if name in LAZY:
        return getattr(import_module(f".{LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
