"""TODO."""

from __future__ import annotations

from typing import Literal, Self, TypeVar

from pydantic import Field, model_validator

from ..config import Frozen

RECORDS = "records.jsonl"


class Record(Frozen):
    """One image: :class:`certipatch.defense.Verdict` with the image's place, name and hash.

    ``pixels`` is the sha256 of the (3, H, W) uint8 tensor the model saw. An unreadable image has an
    ``error``, no labels of ours, and counts as not certified, not correct.
    """

    index: int = Field(ge=0)
    name: str
    label: int = Field(ge=0)
    pixels: str | None
    vanilla_label: int | None
    defended_label: int | None
    case: Literal["agreed", "disagreer", "majority", "champion"] | None
    certified: bool
    failing_pair: tuple[int, int] | None
    failing_label: int | None
    margin: float | None
    passes: int = Field(ge=0)
    error: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """A certificate implies that every one-mask label, and so the defended one, is the true label."""
        flawless = self.failing_pair is None and self.failing_label is None and self.error is None
        looked_at = self.pixels is not None and self.margin is not None and self.margin >= 0
        right = self.defended_label == self.label and self.case == "agreed" and flawless and looked_at
        if self.certified and not right:
            raise ValueError("certified, but its other fields say it is not")
        return self


class DetectionRecord(Frozen):
    """One image: :class:`certipatch.detection.Detection` with the image's place, name and hash, for every
    threshold at once.

    ``agreement``: the smallest one-mask confidence if all one-mask labels are the true one, else None;
    certified at every threshold below it. ``dissent``: the largest confidence of a one-mask label other than
    ``vanilla_label``, else None; an alarm at every threshold below it. An unreadable image has an ``error``
    and neither; it counts as wrong and as not certified.
    """

    index: int = Field(ge=0)
    name: str
    label: int = Field(ge=0)
    pixels: str | None
    vanilla_label: int | None
    agreement: float | None = Field(ge=0, le=1)
    dissent: float | None = Field(ge=0, le=1)
    passes: int = Field(ge=0)
    error: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """If all one-mask labels are the true one, they dissent from F(x) all or none; if not, some dissent
        from an F(x) that is right."""
        if self.error is not None:
            possible = self.agreement is None and self.dissent is None and self.vanilla_label is None
        elif self.vanilla_label is None:
            possible = False
        elif self.agreement is None:
            possible = self.dissent is not None or self.vanilla_label != self.label
        elif self.vanilla_label == self.label:
            possible = self.dissent is None
        else:
            possible = self.dissent is not None and self.dissent >= self.agreement
        if not possible:
            raise ValueError("agreement and dissent cannot both be so")
        return self


R = TypeVar("R", Record, DetectionRecord)


ATTACKS = "attacks.jsonl"


class AttackRecord(Frozen):
    """The attack on one image: the best attempt, and how many were made. The patch is ``height`` x ``width``
    pixels at (``top``, ``left``).

    ``ways``: how many goals the clean table leaves open. ``broken``: the defended model can be made to answer
    wrongly; without a place (``top``, ``left``) it does so on the clean image. ``defended_label`` and
    ``vanilla_label`` are those under the patch; ``image`` is the patched image as the model saw it,
    ``pixels`` its sha256.
    """

    index: int
    name: str
    label: int
    certified: bool
    ways: int
    broken: bool
    top: int | None = None
    left: int | None = None
    height: int | None = None
    width: int | None = None
    row: int | None = None
    target: int | None = None
    defended_label: int | None = None
    vanilla_label: int | None = None
    attempts: int = 0
    image: str | None = None
    pixels: str | None = None
