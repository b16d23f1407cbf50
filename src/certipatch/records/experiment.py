"""What readers rely on in a manifest: its experiment, which is everything that can change a result.

Anyone may have written a manifest, so each entry that is used is checked here once; entries beyond these are
not looked at.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..config import Side

Count = Annotated[int, Field(ge=0, le=10**12)]
Sides = Annotated[list[Side], Field(min_length=2, max_length=2)]
Rectangle = Annotated[
    list[Annotated[int, Field(ge=0, le=10_000)]], Field(min_length=4, max_length=4)
]  # top, left, height, width


class Expected(BaseModel):
    """An entry as it must be; its type is not coerced."""

    model_config = ConfigDict(strict=True, populate_by_name=True)


class Against(Expected):
    """What the attacker has: one patch of any of some shapes, or two patches, in images of one size."""

    image_size: Sides
    patch_size: Sides
    other_patch_sizes: list[Sides] = Field(default=[], max_length=100)
    patches: int = Field(default=1, ge=1, le=2)


class Masks(Against):
    """The mask set of a certification."""

    masks_per_axis: int = Field(ge=0, le=10_000)
    windows: list[list[Rectangle]] = Field(max_length=10_000)


class Architecture(Expected):
    """Which network it is; what else describes a model is read where the model is built."""

    arch: str
    classes: Any = None

    @property
    def class_names(self) -> list[str]:
        """The names of the labels; none if the manifest is damaged here, then numbers stand for them."""
        return [str(name) for name in self.classes] if isinstance(self.classes, list) else []


class Training(Expected):
    """The fine-tuning of the certified weights."""

    strategy: str
    epochs: Count
    search_every: Any = None
    optimizer: Any = None
    schedule: Any = None
    augment: Any = None
    ema: Any = None
    keep: Any = None
    seed: Any = None

    @property
    def choices(self) -> list[str]:
        """What was chosen otherwise than in the paper, in a word or two each."""
        every = [f"searched in every {self.search_every}."] if self.search_every else []
        words = [str(word) for word in (self.optimizer, self.schedule, self.augment) if word]
        words += [f"ema {self.ema}"] if self.ema else []
        return every + words + ([f"{self.keep} epoch"] if self.keep else [])


class Data(Expected):
    """The images of a certification."""

    images: Count
    fingerprint: str
    sample: Any = None
    classes: Any = None


class Certification(Expected):
    """The experiment of a certification, by whatever defense.

    Folders from before there was a choice do not name their ``defense``: it is PatchCleanser. Of a defense by
    windows, ``windows_shown`` are these as they are typed.
    """

    defense: str = "patchcleanser"
    model: Architecture
    weights_sha256: str
    trained: Training | None = None
    data: Data
    device: str
    precision: str
    fill: Any = None
    inference: Literal["double-masking", "challenger"] = "double-masking"
    places: bool = False
    prove: bool = False
    patch_size_known: bool | None = None
    windows_shown: str | None = Field(default=None, alias="windows")
    masks: Masks | None = None
    threat: Against | None = None

    @model_validator(mode="after")
    def _against_something(self) -> Self:
        """A defense without masks says by itself what it is against."""
        if self.masks is None and self.threat is None:
            raise ValueError("expected masks or a threat, found neither")
        return self

    @property
    def against(self) -> Against:
        """What the certificate is against."""
        found = self.masks or self.threat
        assert found is not None  # as validated
        return found

    @property
    def knows_patch_size(self) -> bool | None:
        """Whether the answer depends on the size of the patch that is reckoned with, as that of every defense
        with masks does; None for a defense that does not say."""
        return True if self.masks else self.patch_size_known

    @property
    def masks_per_axis(self) -> int:
        """k; 0 for a defense without masks."""
        return self.masks.masks_per_axis if self.masks else 0

    @property
    def windows(self) -> list[list[list[int]]]:
        """The windows of each mask as [top, left, height, width]; none for a defense without masks."""
        return self.masks.windows if self.masks else []


class MaskedCertification(Certification):
    """The experiment of PatchCleanser or Minority Reports, which look at an image under masks."""

    masks: Masks


class TrainingRun(Expected):
    """The experiment of ``train``."""

    model: dict[str, Any]
    train: Training


class Attack(Expected):
    """The experiment of ``attack``."""

    certification: Certification
    images: Count
    records_sha256: str | None = None
    attack: Any = None


class NetworkUsed(Expected):
    """How a certification ran its network, which changes rounding only."""

    batch_size: int = Field(ge=1, le=10**6)
    compiled: bool
    shared_prefix: str | None
    moved: float | None = Field(default=None, ge=0, allow_inf_nan=False)


MASKED = ("patchcleanser", "minority-reports")


def expected_of(kind: str, stated: dict[str, Any]) -> type[Expected]:
    """How the experiment of a manifest of this kind has to be."""
    if kind in ("certify", "detect"):
        return MaskedCertification if stated.get("defense", "patchcleanser") in MASKED else Certification
    others: dict[str, type[Expected]] = {"train": TrainingRun, "attack": Attack}
    return others.get(kind, Expected)
