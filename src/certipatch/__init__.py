"""CertiPatch: image classifiers whose answer no adversarial patch of a stated size can change.

>>> import certipatch as cp
>>> masks = cp.MaskSet.covering(image_size=(224, 224), patch_size=(39, 39), masks_per_axis=6)
>>> len(masks), masks.uncovered_patch((39, 39))
(36, None)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import CertiPatchError, SoundnessError
from .geometry.masks import MaskSet
from .geometry.patch import Window

if TYPE_CHECKING:
    from .certification.one_call import certify
    from .certification.restore import load_defense
    from .defenses.contract import Verdict
    from .defenses.minority_reports.detector import Detection, MinorityReports
    from .defenses.patchcleanser.defense import PatchCleanser
    from .models.runs import load_run
    from .training.strategies import STRATEGIES

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
    "certify",
    "load_defense",
    "load_run",
]


LAZY = {
    "Detection": "defenses.minority_reports.detector",
    "MinorityReports": "defenses.minority_reports.detector",
    "PatchCleanser": "defenses.patchcleanser.defense",
    "STRATEGIES": "training.strategies",
    "Verdict": "defenses.contract",
    "certify": "certification.one_call",
    "load_defense": "certification.restore",
    "load_run": "models.runs",
}


def __getattr__(name: str) -> Any:
    """Names that need torch are imported when first used, so that geometry and reports start at once."""
    if name in LAZY:
        return getattr(import_module(f".{LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
