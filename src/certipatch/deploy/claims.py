"""What may be said of one answer to one image, in whole sentences; and nothing else may be said.

``predict``, the service and the exported runner say it in these words. No torch, no other file of ours: the
runner takes this file along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Proof = Literal["unchangeable", "too close", "not proven"]


def proof_of(unchangeable: bool, margin: float, least: float) -> Proof:
    """What the whole table of a received image says; a margin below ``least`` could be turned by rounding."""
    if not unchangeable:
        return "not proven"
    return "unchangeable" if margin >= least else "too close"


def patches_in_words(threat: Mapping[str, Any]) -> str:
    """``one patch of at most 39x39 pixels`` or ``two patches of at most 39x20 or 20x39 pixels``."""
    shapes = [threat["patch_size"], *(threat.get("other_patch_sizes") or ())]
    sizes = " or ".join(f"{height}x{width}" for height, width in shapes)
    number = "one patch" if threat.get("patches", 1) == 1 else "two patches"
    return f"{number} of at most {sizes} pixels"


def statement(
    proof: Proof, name: str, threat: Mapping[str, Any], views: str = "all masked views say {name}"
) -> str:
    """The sentence about an answer ``name``: what was proven of it, or that nothing was.

    ``views``: in words what the proof is made of.
    """
    what = patches_in_words(threat)
    if proof == "unchangeable":
        return (
            f"Proven: whatever {what} may have been put on this image, the answer is {name} with and without "
            "it; and if this is put on the image as it is now, the answer stays. This does not say that the "
            "answer is right."
        )
    if proof == "too close":
        said = views.format(name=name)
        return f"Not proven: {said}, but one of them so narrowly that rounding could turn it."
    return (
        f"Not proven: {what} may have changed this answer, or could. This does not say that one did: an "
        "image without a proof may well be clean."
    )


CASES = {
    "agreed": "If there is such a patch, at least one view that shows none of it gives this answer.",
    "disagreer": "If there is such a patch, at least one view that shows none of it gives this answer.",
    "majority": "The masked views disagree; if there is such a patch, nothing is known.",
    "champion": "The masked views disagree; if there is such a patch, nothing is known.",
}
