"""TODO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..config import ModelSpec
from ..errors import one_line


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: where (a file, line, image), and what was expected and found."""

    where: str
    what: str

    def __str__(self) -> str:
        return one_line(f"{self.where}: {self.what}")


@dataclass
class Verification:
    """What was checked, and what is wrong.

    ``certified``: at threshold 0 if the records are of detection. ``undecided`` images differ from their
        record by no more than rounding in another batch can do.
    """

    folder: str
    kind: str = "certify"
    images: int = 0
    certified: int = 0
    recomputed: int = 0
    undecided: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        self.findings.append(Finding(where, what))

    def text(self, *, again: bool) -> str:
        """The findings, one a line, and what was checked."""
        looked = (
            f"looked again at {self.recomputed}"
            if again
            else "looked again at none (give --model and --data)"
        )
        unclear = f", {self.undecided} of them too close to a tie to tell" if self.undecided else ""
        of_kind = " for detection at threshold 0" if self.kind == "detect" else ""
        verdict = f"{len(self.findings)} findings" if self.findings else "nothing wrong found"
        return "\n".join(
            [
                *map(str, self.findings),
                f"{self.folder}: {self.certified} of {self.images} certified{of_kind}; {looked}{unclear}; "
                f"{verdict}",
            ]
        )

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "findings": [{"where": f.where, "what": f.what} for f in self.findings]}


Given = tuple[ModelSpec, nn.Sequential, dict[str, Any] | None]  # a model as options.open_model gives it
