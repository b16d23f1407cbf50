"""The card of a model on the hub: generated from records, claims first, limits after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.small import SMALL_CNN
from .claims import patches_in_words

TEMPLATE = Path(__file__).parent / "card.md.j2"
TAGS = ["certified-robustness", "adversarial-patch", "patchcleanser", "certipatch"]
MEASURES = ("vanilla_accuracy", "clean_accuracy", "certified_robust_accuracy")


@dataclass(frozen=True)
class Certified:
    """One certificate as the card states it.

    Attributes:
        name: of its folder. ``summary``: as ``report --json`` prints it.
        device, precision, versions: as the manifest states them.
        smallest: the smallest margin of a certificate that counts, in logits; None without one.
        records: the sha256 of its lines.
    """

    name: str
    summary: Mapping[str, Any]
    device: str
    precision: str
    versions: Mapping[str, str]
    smallest: float | None
    records: Sequence[str]

    @property
    def threat(self) -> str:
        return patches_in_words(self.summary)

    def share(self, measure: str) -> str:
        """``82.0 % (164/200; 76.1-86.7)``."""
        found = self.summary[measure]
        low, high = (100 * end for end in found["interval_95"])
        return f"{100 * found['share']:.1f} % ({found['count']}/{found['images']}; {low:.1f}-{high:.1f})"


def card(
    name: str, arch: str, certified: Sequence[Certified], *, data: str, license: str, size: Sequence[int]
) -> str:
    """The text of README.md, with ``model-index`` in its head."""
    import huggingface_hub

    timms = arch != SMALL_CNN
    results = [_result(one, measure, data) for one in certified for measure in MEASURES]
    head = huggingface_hub.ModelCardData(
        license=license,
        library_name="timm" if timms else "certipatch",
        pipeline_tag="image-classification",
        tags=TAGS,
        model_name=name.partition("/")[2],
        eval_results=results,
    )
    how: dict[str, Any] = {"name": name, "arch": arch, "certified": certified, "data": data, "size": size}
    how["timms"] = timms
    made = huggingface_hub.ModelCard.from_template(head, template_path=str(TEMPLATE), **how)
    return str(made.content)


def _result(one: Certified, measure: str, data: str) -> Any:
    import huggingface_hub

    found = one.summary[measure]
    return huggingface_hub.EvalResult(
        task_type="image-classification",
        dataset_type="imagefolder",
        dataset_name=data or "images of its owner",
        dataset_args={"certificate": one.name, "images": found["images"]},
        metric_type=measure,
        metric_name=f"{measure.replace('_', ' ')}, {one.threat}",
        metric_value=found["count"] / found["images"],
    )
