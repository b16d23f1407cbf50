"""TODO."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from ..config import ModelSpec
from ..data.source import Images, Item, Source
from ..defenses.minority_reports.algorithm import above
from ..defenses.minority_reports.detector import Detection, MinorityReports
from ..geometry.masks import MaskSet
from ..records.manifest import manifest
from ..records.schema import RECORDS, DetectionRecord
from ..records.store import Store
from ..runtime.devices import environment, precision_of
from ..runtime.progress import progress_bar
from ..views.network import LARGE, fastest_batch_size, usable_precision
from .blocks import _examine_blocks, _look, _sha256, blocks_of
from .experiment import _experiment, _network_of


def detect(
    network: nn.Sequential,
    spec: ModelSpec,
    source: Source,
    masks: MaskSet,
    out: Path,
    *,
    fabric: Fabric,
    data: str = "",
    trained: dict[str, Any] | None = None,
    batch_size: int | None = None,
    compile: bool | None = None,
    resume: bool = False,
) -> None:
    """Examine ``source`` with :class:`MinorityReports` into the folder ``out``, for every threshold at once.

    Arguments and errors are those of :func:`certify`.
    """
    model = network.to(fabric.device).eval()
    precision = usable_precision(model, masks, precision_of(fabric))
    large = len(source) * (len(masks) + 1) * masks.image_size[0] * masks.image_size[1] >= LARGE
    earlier = _network_of(out, "")
    detector = MinorityReports(
        model,
        masks,
        threshold=0,  # the records have what is needed for any
        batch_size=batch_size
        or earlier.get("batch_size")
        or (fastest_batch_size(model, masks, precision) if large else None),
        precision=precision,
        compile=earlier.get("compiled", large) if compile is None else compile,
    )
    experiment = _experiment(network, spec, source, detector, trained, fabric)
    about = {
        **manifest("detect", experiment, network=detector.network.describe(), **environment(fabric)),
        "data": data,
    }
    with (
        Store(out, about, RECORDS, resume=resume) as store,
        progress_bar(len(source), f"detect {masks.name}") as progress,
    ):
        examine = partial(_look, detector.certify, _detection_record, fabric.device)
        _examine_blocks(
            examine, DetectionRecord, Images(source, spec), blocks_of(len(source), (1, 1)), store, progress,
            "certified detection at threshold 0", lambda record: above(record.agreement, 0),
        )  # fmt: skip
        store.finish()


def _detection_record(item: Item, found: Detection | None) -> DetectionRecord:
    if found is None or item.pixels is None:
        return DetectionRecord(
            index=item.index, name=item.name, label=item.label, pixels=None, vanilla_label=None, agreement=None, dissent=None, passes=0,
            error=item.error,
        )  # fmt: skip
    return DetectionRecord(
        index=item.index,
        name=item.name,
        label=item.label,
        pixels=_sha256(item.pixels),
        vanilla_label=found.vanilla_label,
        agreement=found.agreement,
        dissent=found.dissent,
        passes=found.passes,
    )
