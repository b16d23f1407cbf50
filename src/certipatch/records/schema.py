"""The lines of a folder of records: what is written of one image, by each defense and by an attack.

A record has the fields that every defense fills, and those that its method adds. Fields are written in a
fixed order, so that equal results are equal bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ..config import Frozen

RECORDS = "records.jsonl"
ATTACKS = "attacks.jsonl"
EPOCHS = "epochs.jsonl"


class Indexed(Frozen):
    """What is about one image: ``index`` is its place in the data set."""

    index: int = Field(ge=0)


class Line(Indexed):
    """What every line says of its image.

    ``pixels`` is the sha256 of the (3, H, W) uint8 tensor that the model saw, ``passes`` the number of
    forward passes that were spent on it. An image that cannot be read has an ``error`` and no labels but the
    true one.
    """

    ORDER: ClassVar[tuple[str, ...]] = ()  # in which the fields are written; as they are defined if empty
    OPTIONAL: ClassVar[tuple[str, ...]] = ()  # those of them that are written only if there is a value

    name: str
    label: int = Field(ge=0)
    pixels: str | None
    vanilla_label: int | None = Field(ge=0)
    passes: int = Field(ge=0)
    error: str | None = None

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        written = {name: found[name] for name in self.ORDER} if self.ORDER else found
        for name in self.OPTIONAL:
            if written[name] is None:
                written.pop(name)
        return written


class Record(Line):
    """One image under a defense that certifies answers: the fields that all such defenses have.

    ``vanilla_label`` is the answer of the undefended model, ``defended_label`` that of the defense.
    ``certified``: the defense answers the true label under every patch, proven; ``margin`` is how near the
    closest decision behind that was. Further fields are what the method adds
    (:attr:`certipatch.defenses.contract.Verdict.detail`). An image that cannot be read counts as not
    certified and not correct.
    """

    model_config = ConfigDict(extra="allow")

    defended_label: int | None = Field(ge=0)
    certified: bool
    margin: float | None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """A certificate is about an image that was looked at, on which the defended label is the true one."""
        if self.certified and not (self._looked_at and self.defended_label == self.label):
            raise ValueError("certified, but its other fields say it is not")
        return self

    def counts(self, min_margin: float) -> bool:
        """Whether it is a certificate, with at least this margin if its defense has margins."""
        return self.certified and (self.margin is None or self.margin >= min_margin)

    @property
    def _looked_at(self) -> bool:
        return self.error is None and self.pixels is not None and (self.margin or 0.0) >= 0


class PatchCleanserRecord(Record):
    """One image of ``certify``: :class:`certipatch.PatchCleanser`'s verdict with the image's place, name and
    hash.

    ``margin`` is the smallest difference between the best two logits in any view that was looked at. An image
    that is not certified has the ``failing_pair`` of masks that was found first, and its ``failing_label``.
    By place (``--places``), ``proven`` has a 1 for each mask whose whole row is right, else a 0, and
    ``proven_margins`` the smallest margin in each such row; otherwise both are absent. With proofs
    (``--prove``), ``unchangeable`` says whether the answer, right or wrong, is proven without its label, and
    ``forgeable`` whether a patch on this image may lead to a wrong answer that is.
    """

    model_config = ConfigDict(extra="forbid")
    ORDER = (
        *("index", "name", "label", "pixels", "vanilla_label", "defended_label", "case", "certified"),
        *("failing_pair", "failing_label", "proven", "proven_margins", "unchangeable", "forgeable"),
        *("margin", "passes", "error"),
    )
    OPTIONAL = ("proven", "proven_margins", "unchangeable", "forgeable")

    case: Literal["agreed", "disagreer", "majority", "champion"] | None
    failing_pair: tuple[int, int] | None
    failing_label: int | None = Field(ge=0)
    proven: str | None = Field(default=None, pattern="^[01]+$")
    proven_margins: tuple[float, ...] | None = None
    unchangeable: bool | None = None
    forgeable: bool | None = None

    @model_validator(mode="after")
    def _agreed(self) -> Self:
        """A certificate implies that every one-mask label, and so the defended one, is the true label."""
        flawless = self.case == "agreed" and self.failing_pair is None and self.failing_label is None
        if self.certified and not (flawless and self.margin is not None):
            raise ValueError("certified, but its other fields say it is not")
        return self

    @model_validator(mode="after")
    def _by_place(self) -> Self:
        """A row that is proven is of an image that is answered rightly; all of them are the certificate."""
        if self.proven is None:
            if self.proven_margins is not None:
                raise ValueError("proven_margins without proven")
            return self
        rows, margins = self.proven.count("1"), self.proven_margins
        if margins is None or len(margins) != rows or any(not 0 <= margin < math.inf for margin in margins):
            raise ValueError("proven_margins are not a margin for each row that is proven")
        answered = self._looked_at and self.defended_label == self.label
        if (rows > 0 and not answered) or self.certified != (rows == len(self.proven)):
            raise ValueError("proven, but its other fields say it is not")
        return self

    @model_validator(mode="after")
    def _proof(self) -> Self:
        """A proof is of an answer on which all masks agree. If it is right it is the certificate; if it is
        wrong it is forged already, and only wrong answers are."""
        if self.unchangeable is None:
            if self.forgeable is not None:
                raise ValueError("forgeable without unchangeable")
            return self
        right, wrong = self.defended_label == self.label, self.defended_label != self.label
        agreed = self._looked_at and self.case == "agreed" and self.margin is not None
        flaws = (
            self.unchangeable and not agreed,
            self.certified != (self.unchangeable and right),
            self.forgeable and right,
            self.unchangeable and wrong and not self.forgeable,
        )
        if any(flaws):
            raise ValueError("unchangeable or forgeable, but its other fields say it is not")
        return self


class WindowRecord(Record):
    """One image of ``certify`` with a defense by evidence (ds, smoothed-vit, patchguard ...).

    ``slack`` is what the true label has to spare, in units of evidence, against the patch (or patches) at
    ``weakest`` ([top, left, height, width] each), where the class ``rival`` is nearest to winning: certified
    if it is 0 or more. ``slack_published`` is the same by the papers' own condition, which does not know the
    place; null where theirs is the same. ``margin``: by how many logits two classes may move in every window
    at once without loss of the certificate; null where there is none.
    """

    model_config = ConfigDict(extra="forbid")
    ORDER = (
        *("index", "name", "label", "pixels", "vanilla_label", "defended_label", "certified"),
        *("slack", "slack_published", "weakest", "rival", "margin", "passes", "error"),
    )

    slack: int | None
    slack_published: int | None
    weakest: tuple[tuple[int, int, int, int], ...] | None
    rival: int | None = Field(ge=0)

    @model_validator(mode="after")
    def _spared(self) -> Self:
        """Certified is a slack of 0 or more, with a margin; the published slack is never the larger one."""
        if self.slack is None:
            if self.error is None or any((self.slack_published, self.weakest, self.rival)):
                raise ValueError("without a slack, but its other fields say it was looked at")
            return self
        flaws = (
            self.certified != (self.slack >= 0),
            self.certified != (self.margin is not None),
            not self.weakest or self.rival is None or self.rival == self.label,
            self.slack_published is not None and self.slack_published > self.slack,
        )
        if any(flaws):
            raise ValueError("slack, but its other fields say something else")
        return self


class IntervalRecord(Record):
    """One image of ``certify`` with interval bounds (ibp).

    ``margin`` is the smallest lower bound of the lead of the true label, in logits; null where there is no
    certificate. The patch against which it is lies in the mask ``weakest`` ([top, left, height, width] of
    each rectangle), and the lead is over the class ``rival``.
    """

    model_config = ConfigDict(extra="forbid")
    ORDER = (
        *("index", "name", "label", "pixels", "vanilla_label", "defended_label", "certified"),
        *("weakest", "rival", "margin", "passes", "error"),
    )

    weakest: tuple[tuple[int, int, int, int], ...] | None
    rival: int | None = Field(ge=0)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        """Certified is a bound above 0; the answer is the network's own."""
        flaws = (
            self.certified != (self.margin is not None),
            self.error is None and (not self.weakest or self.rival is None or self.rival == self.label),
            self.defended_label != self.vanilla_label,
        )
        if any(flaws):
            raise ValueError("certified by bounds, but its other fields say something else")
        return self


class DetectionRecord(Line):
    """One image of ``detect``: what Minority Reports found, for every threshold at once.

    ``agreement``: the smallest one-mask confidence if all one-mask labels are the true one, else None; the
    image is certified at every threshold below it. ``dissent``: the largest confidence of a one-mask label
    other than ``vanilla_label``, else None; there is an alarm at every threshold below it. An image that
    cannot be read has neither; it counts as wrong and as not certified.
    """

    ORDER = (
        *("index", "name", "label", "pixels", "vanilla_label", "agreement", "dissent"),
        *("passes", "error"),
    )

    agreement: float | None = Field(ge=0, le=1)
    dissent: float | None = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self._possible:
            raise ValueError("agreement and dissent cannot both be so")
        return self

    @property
    def _possible(self) -> bool:
        """If all one-mask labels are the true one, they dissent from F(x) all or none; if not, some dissent
        from an F(x) that is right.
        """
        if self.error is not None:
            return self.agreement is None and self.dissent is None and self.vanilla_label is None
        if self.vanilla_label is None:
            return False
        right = self.vanilla_label == self.label
        if self.agreement is None:
            return self.dissent is not None or not right
        if right:
            return self.dissent is None
        return self.dissent is not None and self.dissent >= self.agreement


class PlacesAttacked(Frozen):
    """The attack on one image at places that are not the attacker's choice.

    ``proven_share`` of the places are proven. The place at (``top``, ``left``) was drawn evenly among the
    others, if there are others; ``broken``: a patch there makes the answer wrong, or it is wrong anyway, and
    then no place was drawn. ``proven_attempts``: how many patches were tried at proven places of an image
    that is not certified.
    """

    proven_share: float = Field(ge=0, le=1)
    broken: bool
    top: int | None = None
    left: int | None = None
    height: int | None = None
    width: int | None = None
    proven_attempts: int = 0


class AttackRecord(Indexed):
    """The attack on one image: the best attempt, and how many were made.

    The patch is ``height`` x ``width`` pixels at (``top``, ``left``). ``ways``: how many goals the clean
    table leaves open. ``broken``: the defended model can be made to answer wrongly; without a place (``top``,
    ``left``) it does so on the clean image. ``defended_label`` and ``vanilla_label`` are those under the
    patch; ``image`` is the patched image as the model saw it, ``pixels`` its sha256. ``places`` is absent
    unless the images were certified by place.
    """

    name: str
    label: int = Field(ge=0)
    certified: bool
    ways: int = Field(ge=0)
    broken: bool
    top: int | None = Field(default=None, ge=0)
    left: int | None = Field(default=None, ge=0)
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    row: int | None = Field(default=None, ge=0)
    target: int | None = Field(default=None, ge=0)
    defended_label: int | None = Field(default=None, ge=0)
    vanilla_label: int | None = Field(default=None, ge=0)
    attempts: int = Field(default=0, ge=0)
    image: str | None = None
    pixels: str | None = None
    places: PlacesAttacked | None = None

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        if found["places"] is None:
            found.pop("places")
        return found

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """An image is broken where its answer is wrong; certificates hold; a patch is a place and a
        picture."""
        placed = {self.top is None, self.left is None, self.height is None, self.width is None}
        whole = placed | {self.image is None, self.pixels is None, self.attempts == 0}
        if self.broken != (self.defended_label != self.label) or len(whole) != 1:
            raise ValueError("what became of the image contradicts itself")
        if self.certified and self.ways:
            raise ValueError("certified, but open to an attack")
        return self


# The schema of a method that adds fields of its own; the lines of other defenses are read as plain records.
SCHEMAS: dict[str, type[Line]] = {
    "patchcleanser": PatchCleanserRecord,
    "minority-reports": DetectionRecord,
    "ds": WindowRecord,
    "smoothed-vit": WindowRecord,
    "patchguard": WindowRecord,
    "clipped-bagnet": WindowRecord,
    "bagcert": WindowRecord,
    "patchcure-srf": WindowRecord,
    "ibp": IntervalRecord,
}


def digest(records: Sequence[Record]) -> str:
    """sha256 over records in the order of their index, in however many files they lie."""
    return hashlib.sha256("\n".join(record.model_dump_json() for record in records).encode()).hexdigest()
