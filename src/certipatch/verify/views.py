"""Images looked at again for ``verify``, one view at a time, by a naive restatement of PatchCleanser's
algorithms.

Like ``verify``, it restates what it checks: nothing here comes from ``patchcleanser``, ``schedule`` or
``defense``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.source import Images, Source
from ..runtime.devices import make_fabric
from ..runtime.progress import progress_bar
from .algorithms import Labels, _challenged, _double_masked
from .detection import compare

if TYPE_CHECKING:
    from .findings import Given, Verification


# Logits of one view computed in another batch differ by less (docs/trust.md has the measurement).
TOLERANCE = {"32-true": 1e-3}


LOW_PRECISION = 0.25


WILD = 8  # views within the tolerance that are tried both ways


def look_again(
    chosen: list[int], records: dict[int, dict[str, Any]], experiment: dict[str, Any],
    model: Given, source: Source, device: str, found: Verification,
) -> None:  # fmt: skip
    """Every view of the chosen images, one at a time."""
    spec, network, _ = model
    fabric = make_fabric(device=device, precision=experiment["precision"])
    images, function = Images(source, spec), fabric.setup_module(network).eval()
    tolerance = TOLERANCE.get(experiment["precision"], LOW_PRECISION)
    fill = torch.tensor(experiment["fill"], dtype=torch.float32).reshape(3, 1, 1)
    windows = experiment["masks"]["windows"]
    with torch.inference_mode(), progress_bar(len(chosen), "verify") as progress:
        for index in chosen:
            item, record = images[index], records[index]
            where = f"image {index} ({item.name!r})"[:120]
            progress.advance(1, f"{len(found.findings)} findings")
            found.recomputed += 1
            if (item.name, item.label) != (record["name"], record["label"]):
                found.add(
                    where,
                    f"the record has {record['name']!r} with label {record['label']!r}, the data label "
                    f"{item.label}"[:160],
                )
            if item.pixels is None:
                if record["error"] is None:
                    found.add(where, f"cannot be read ({item.error}), and the record does not say so")
                continue
            if record["error"] is not None:
                found.add(where, f"can be read, the record says {record['error']!r}"[:160])
                continue
            if hashlib.sha256(item.pixels.numpy().tobytes()).hexdigest() != record["pixels"]:
                found.add(where, "its pixels are not those that were certified (sha256)")
                continue
            image = item.pixels.float() / 255

            def look(i: int | None, j: int | None, image: torch.Tensor = image) -> np.ndarray:
                """The logits of one view."""
                view = image.clone()
                for mask in (i, j):
                    for top, left, height, width in windows[mask] if mask is not None else []:
                        view[:, top : top + height, left : left + width] = fill
                logits: np.ndarray = function(view[None].to(fabric.device))[0].float().cpu().numpy()
                return logits

            if found.kind == "detect":
                found.undecided += _compare_detection(
                    where,
                    record,
                    look(None, None),
                    [look(i, i) for i in range(len(windows))],
                    tolerance,
                    found,
                )
                continue
            views = {(i, j): _best(look(i, j)) for i in range(len(windows)) for j in range(i, len(windows))}
            infer = _challenged if "inference" in experiment else _double_masked
            undecided = _compare(
                where, record, _best(look(None, None)), views, len(windows), infer, tolerance, found
            )
            found.undecided += undecided


def _best(logits: np.ndarray) -> tuple[int, int, float]:
    """Best and second label, and the margin between them."""
    order = np.argsort(-logits, kind="stable")
    return int(order[0]), int(order[1]), float(logits[order[0]] - logits[order[1]])


def _compare_detection(
    where: str,
    record: dict[str, Any],
    unmasked: np.ndarray,
    masked: list[np.ndarray],
    tolerance: float,
    found: Verification,
) -> bool:
    """Compare a record of detection with the views of its image. True if they differ by no more than rounding
    can do."""
    differences: list[tuple[str, bool]] = []
    compare(record, unmasked, masked, tolerance, lambda what, sure: differences.append((what, sure)))
    for what, sure in differences:
        if sure:
            found.add(where, what)
    return bool(differences) and not any(sure for _, sure in differences)


def _compare(
    where: str, record: dict[str, Any], vanilla: tuple[int, int, float], views: dict[tuple[int, int], tuple[int, int, float]],
    n: int, infer: Callable[[Labels, int], tuple[int, str]], tolerance: float, found: Verification,
) -> bool:  # fmt: skip
    """Compare a record with all views of its image. True if they differ by no more than rounding can do."""
    label, before, undecided = record["label"], len(found.findings), False

    def differs(what: str, sure: bool) -> None:
        nonlocal undecided
        if sure:
            found.add(where, what)
        else:
            undecided = True

    if record["vanilla_label"] != vanilla[0]:
        differs(
            f"vanilla_label {record['vanilla_label']!r}, found {vanilla[0]}",
            vanilla[2] > tolerance or record["vanilla_label"] != vanilla[1],
        )

    wrong = {pair: view for pair, view in views.items() if view[0] != label}
    if record["certified"] is True and wrong:
        pair, view = max(wrong.items(), key=lambda entry: entry[1][2])
        differs(
            f"is not certified: masks {pair} answer {view[0]} with a margin of {view[2]:.3g}",
            view[2] > tolerance,
        )
    if record["certified"] is not True and not wrong:
        differs(
            "is certified, which the record says it is not",
            min(view[2] for view in views.values()) > tolerance,
        )
    if record["failing_pair"] is not None:
        best, second, margin = views[tuple(record["failing_pair"])]  # type: ignore[index]
        if best != record["failing_label"]:
            differs(
                f"masks {record['failing_pair']} answer {best}, the record says {record['failing_label']!r}",
                margin > tolerance or second != record["failing_label"],
            )

    # The inference on the labels, and on those that rounding could have made of them.
    wild = [pair for pair in sorted(views) if views[pair][2] <= tolerance]
    answers = set()
    for flipped in product((0, 1), repeat=len(wild)) if len(wild) <= WILD else [(0,) * len(wild)]:
        labels = {pair: view[0] for pair, view in views.items()}
        for pair, second_best in zip(wild, flipped, strict=True):
            labels[pair] = views[pair][1] if second_best else views[pair][0]
        answer = infer(labels, n)
        answers.add(answer)
        if not any(flipped) and answer != (record["defended_label"], record["case"]):
            undecided = True
    if (record["defended_label"], record["case"]) not in answers:
        differs(
            f"answers {sorted(answers)[0]}, the record says {(record['defended_label'], record['case'])}",
            len(wild) <= WILD,
        )

    low, high = min(view[2] for view in views.values()), min(views[i, i][2] for i in range(n))
    if record["passes"] == 1 + len(views):
        high = low
    if not low - tolerance <= record["margin"] <= high + tolerance:
        span = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
        found.add(where, f"margin {record['margin']!r}, found {span}")
    return undecided and len(found.findings) == before
