"""What can change a result of a certification: the experiment that its manifest states and a resume
compares."""

from __future__ import annotations

from typing import Any, Protocol

from ..data.source import Source
from ..models.runs import Opened
from ..records.experiment import MASKED
from ..records.store import BLOCK


class Described(Protocol):
    """A defense, or what it says of itself."""

    @property
    def name(self) -> str: ...

    def describe(self) -> dict[str, Any]: ...


def experiment_of(opened: Opened, source: Source, defense: Described, device: str) -> dict[str, Any]:
    """The experiment as JSON: the model, the images, the device, and all that the defense says of itself.

    The defenses from before there was a choice are not named: the folders of both kinds stay what they were.
    """
    named = {} if defense.name in MASKED else {"defense": defense.name}
    return {
        **named,
        "model": opened.spec.model_dump(mode="json"),
        "weights_sha256": opened.weights_sha256,
        "trained": opened.trained,
        "data": source.describe(),
        "device": device,
        "block": BLOCK,
        **defense.describe(),
    }
