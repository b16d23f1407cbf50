"""CertiPatch: image classifiers whose answer no adversarial patch of a stated size can change.

>>> import certipatch as cp
>>> masks = cp.MaskSet.covering(image_size=(224, 224), patch_size=(39, 39), masks_per_axis=6)
>>> len(masks), masks.uncovered_patch((39, 39))
(36, None)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CertiPatchError, SoundnessError
from .masks import MaskSet, Window

if TYPE_CHECKING:
    from .defense import PatchCleanser, Verdict
    from .detection import Detection, MinorityReports
    from .models import load_run
    from .search import STRATEGIES

__all__ = [
    "STRATEGIES",
    "CertiPatchError",
    "Detection",
    "MaskSet",
    "MinorityReports",
    "PatchCleanser",
    "SoundnessError",
    "Verdict",
    "Window",
    "load_run",
]


def __getattr__(name: str) -> Any:
    """Names that need torch are imported when first used, so that geometry and reports start at once."""
    if name in ("PatchCleanser", "Verdict"):
        from . import defense

        return getattr(defense, name)
    if name in ("MinorityReports", "Detection"):
        from . import detection

        return getattr(detection, name)
    if name == "load_run":
        from .models import load_run

        return load_run
    if name == "STRATEGIES":
        from .search import STRATEGIES

        return STRATEGIES
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
