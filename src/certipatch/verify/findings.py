"""What ``verify`` is given, and what it hands back: the findings, and how much was checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from ..config import ModelSpec
from ..errors import one_line

Record = dict[str, Any]  # one line of the records, as JSON gives it
Experiment = dict[str, Any]  # the manifest's entry of that name: whatever can change a result

LONGEST = 240  # letters of what a finding says


class Given(Protocol):
    """A model that was opened and hashed, to be compared with what a folder says.

    Attributes:
        network: images (N, 3, H, W) in [0, 1] -> logits (N, classes).
        trained: the configuration of the training run that the weights come from, None if they come from
            elsewhere.
        weights_sha256: the hash of the network's parameters and buffers, taken when it was opened.
    """

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def network(self) -> nn.Module: ...

    @property
    def trained(self) -> dict[str, Any] | None: ...

    @property
    def weights_sha256(self) -> str: ...


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: where (a file, a line, an image), and what was expected and found."""

    where: str
    what: str

    def __str__(self) -> str:
        return one_line(f"{self.where}: {self.what}")


@dataclass
class Verification:
    """What was checked, and what is wrong.

    Attributes:
        kind: the command that wrote the folder, certify, detect or attack.
        images: how many images the folder has a line about.
        certified: how many of them are certified, beyond what rounding could turn; at threshold 0 if the
            records are of detection.
        below: how many more the records say are certified, with a margin that rounding could turn.
        recomputed: how many were looked at again.
        undecided: how many of those differ from their record by no more than rounding in another batch does:
            they are not confirmed.
        counted: what ``certified`` counts, in words.
        not_restated: the name of the folder's defense if ``verify`` has no restatement of it; then no image
            can be looked at again.
        asked: a model and images were given, so that images were to be looked at again.
    """

    folder: str
    kind: str = "certify"
    images: int = 0
    certified: int = 0
    below: int = 0
    recomputed: int = 0
    undecided: int = 0
    findings: list[Finding] = field(default_factory=list)
    counted: str = "certified"
    not_restated: str | None = None
    asked: bool = False

    @property
    def confirmed(self) -> bool:
        """Nothing is wrong, and whatever was to be looked at again was, and is as the records say."""
        unseen = self.asked and self.not_restated is not None
        return not (self.findings or self.undecided or unseen)

    def add(self, where: str, what: str) -> None:
        """Note something that is wrong; values that make it long are cut."""
        self.findings.append(Finding(where, _short(what)))

    def text(self, *, again: bool) -> str:
        """The findings, one a line, and then what was checked.

        ``again``: whether a model and images were given, so that images could be looked at again.
        """
        unclear = f", {self.undecided} of them not confirmed (too close to a tie)" if self.undecided else ""
        below = f" ({self.below} more with a margin that rounding could turn)" if self.below else ""
        verdict = f"{len(self.findings)} findings" if self.findings else "nothing wrong found"
        checked = (
            f"{self.folder}: {self.certified} of {self.images} {self.counted}{below}; "
            f"looked again at {self._looked(again)}{unclear}; {verdict}"
        )
        return "\n".join([*map(str, self.findings), checked])

    def _looked(self, again: bool) -> str:
        """At how many images ``verify`` looked again, and why at none."""
        if self.not_restated is not None:
            return f"none (verify has no restatement of {self.not_restated[:60]!r})"
        return str(self.recomputed) if again else "none (give --model and --data)"

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints; ``not_restated`` is there only if there is such a defense."""
        counts = ("folder", "kind", "images", "certified", "below", "recomputed", "undecided")
        shown = {name: getattr(self, name) for name in counts}
        if self.not_restated is not None:
            shown["not_restated"] = self.not_restated
        return {**shown, "findings": [{"where": one.where, "what": one.what} for one in self.findings]}


def place(index: int, name: object) -> str:
    """Where a finding about an image is: its number and its name, of any length and type."""
    return f"image {index} ({name!r})"[:120]


def _short(what: str) -> str:
    """The beginning and the end of a text of any length: found values stand between the words."""
    return what if len(what) <= LONGEST else f"{what[: LONGEST // 2]}...{what[-LONGEST // 2 :]}"
