"""Defenses by windows of limited sight, as ``verify`` knows them: De-randomized Smoothing, Smoothed ViT, and
PatchGuard on bands.

Nothing here comes from ``defenses.evidence`` or ``geometry``: see ``sights`` and ``evidence``. Each window is
looked at by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..runtime.devices import autocast
from .evidence import KINDS, Kind, kind_of
from .findings import Experiment
from .record import check_labels, is_margin
from .restatement import ENTRIES, FIELDS, Line, Restatement, Sighting
from .sights import Sights, sights_of

MOST_CELLS = 2**30  # of windows x pixels, held in memory

# The share of the tolerance, in logits, that rounding takes without a word where evidence moves with logits.
NOISE = 0.01

# By how much a slack may differ without a word, and whether a difference is surely no rounding.
Room = tuple[float, Callable[[float], bool]]


def _flaws(kind: Kind, experiment: Experiment) -> Iterator[str]:
    """What is wrong with the entries of such a defense."""
    for entry, value in (("evidence", kind.evidence), ("rule", kind.rule)):
        if experiment[entry] != value:
            yield f"{entry} is {experiment[entry]!r}, expected {value!r}"
    if experiment["patch_size_known"] is not (kind.rule != "bounded-sum"):
        yield f"patch_size_known is {experiment['patch_size_known']!r}"
    if "theta" in experiment and not 0 <= experiment["theta"] <= 1:
        yield f"theta is {experiment['theta']!r}"
    if not kind.cells and (experiment.get("tokens") not in ("filled", "dropped") or "fill" not in experiment):
        yield f"tokens is {experiment.get('tokens')!r}, fill {experiment.get('fill')!r}"
    if kind.cells and {"tokens", "fill"} & set(experiment):
        yield "tokens or fill: expected none, for cells see the whole image"
    odd = _odd_threat(experiment)
    if odd is not None:
        yield odd
    else:
        yield from _odd_windows(experiment)


def _odd_threat(experiment: Experiment) -> str | None:
    """What is wrong with the threat; None if it can be reckoned with."""
    threat, size = experiment["threat"], experiment["model"]["image_size"]
    patches, shapes = threat.get("patches", 1), [threat["patch_size"], *threat.get("other_patch_sizes", [])]
    if type(patches) is not int or patches not in (1, 2):
        return f"threat.patches is {patches!r}, expected 1 or 2"
    if any(type(side) is not int for shape in shapes for side in shape):
        return f"threat: patches of {shapes} are not whole numbers of pixels"
    if threat["image_size"] != size:
        return f"threat.image_size {threat['image_size']} is not the model's {size}"
    return None


def _odd_windows(experiment: Experiment) -> Iterator[str]:
    size, windows = experiment["threat"]["image_size"], experiment["windows"]
    count = size[0] * size[1] ** 2 * (size[0] if str(windows).startswith("blocks") else 1)
    if count > MOST_CELLS:
        yield f"windows {windows!r} are too many to check"
        return
    sights = sights_of(experiment)
    if any(not (1 <= h <= size[0] and 1 <= w <= size[1]) for h, w in sights.shapes):
        yield f"threat: patches of {sights.shapes} do not fit into {size}"
        return
    if not (sights.shown.any(axis=0).all() or str(windows).startswith("cells")):
        yield f"windows {windows!r} leave pixels that none of them shows"
    most = int(sights.reached.sum(axis=1).max())
    found = {"windows": len(sights.shown), "sets": len(sights.reached), "most": most}
    if experiment["touched"] != found:
        yield f"touched is {experiment['touched']}, found {found}"


def _check_line(kind: Kind, line: Line) -> None:
    """What follows from what within one line."""
    record, experiment = line.record, line.experiment
    check_labels(line, record["vanilla_label"], record["defended_label"])
    slack, margin, certified = (record[name] for name in ("slack", "margin", "certified"))
    whole = type(slack) is int
    line.expect(whole, f"slack {slack!r} is not a whole number")
    line.expect(whole and (slack >= 0) is certified, f"slack {slack!r}, but certified is {certified!r}")
    line.expect(
        is_margin(margin) if certified is True else margin is None,
        f"margin {margin!r}, but certified is {certified!r}",
    )
    line.expect(
        certified is not True or record["defended_label"] == record["label"],
        f"is certified, but defended_label {record['defended_label']!r} is not the label",
    )
    published = record["slack_published"]
    known = type(published) is int and whole and published <= slack
    line.expect(
        known if kind.rule == "bounded-sum" else published is None,
        f"slack_published {published!r} beside slack {slack!r} cannot be",
    )
    rival = record["rival"]
    line.expect(line.is_class(rival) and rival != record["label"], f"rival {rival!r} is no other class")
    passes = 1 if kind.cells else experiment["touched"]["windows"] + 1
    line.expect(record["passes"] == passes, f"passes {record['passes']!r}: expected {passes}")
    _check_weakest(line)


def _check_weakest(line: Line) -> None:
    """``weakest`` is a patch of the threat, or as many as there are at once, within the image."""
    threat, weakest = line.experiment["threat"], line.record["weakest"]
    shapes = [threat["patch_size"], *threat.get("other_patch_sizes", [])]
    height, width = threat["image_size"]

    def fits(patch: Any) -> bool:
        if not isinstance(patch, list) or [type(side) for side in patch] != [int] * 4:
            return False
        top, left, h, w = patch
        return [h, w] in shapes and 0 <= top <= height - h and 0 <= left <= width - w

    several = isinstance(weakest, list) and 1 <= len(weakest) <= threat.get("patches", 1)
    line.expect(several and all(map(fits, weakest)), f"weakest {weakest!r} is no patch of the threat")


@contextmanager
def _dropping(network: nn.Module, kept: list[int]) -> Iterator[None]:
    """Inside, a transformer sees only the tokens of these numbers, and those of its own before them."""
    (transformer,) = (each for each in network.modules() if hasattr(each, "patch_drop"))
    parts: Any = transformer
    own = parts.num_prefix_tokens
    places = list(range(own)) + [own + number for number in kept]
    handle = parts.patch_drop.register_forward_hook(lambda _m, _i, tokens: tokens[:, places])
    try:
        yield
    finally:
        handle.remove()


def window_logits(sighting: Sighting, sights: Sights, image: Tensor) -> np.ndarray:
    """(windows, classes): what the network says of the image with all but a window filled, one at a time."""
    if "fill" not in sighting.experiment:
        return _cell_logits(sighting, sights, image)
    fill = torch.tensor(sighting.experiment["fill"], dtype=torch.float32).reshape(3, 1, 1)
    found = []
    for shown in sights.shown:
        view = torch.where(torch.from_numpy(shown), image, fill)
        if sighting.experiment["tokens"] == "filled":
            found.append(sighting.logits(view))
            continue
        with _dropping(sighting.network, _tokens_of(shown, sighting.network)):
            found.append(sighting.logits(view))
    return np.array(found)


def _cell_logits(sighting: Sighting, sights: Sights, image: Tensor) -> np.ndarray:
    """(windows, classes): what the cells say, each of a picture that is its window and nothing else."""
    crops = []
    for shown in sights.shown:
        rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
        crops.append(image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    parts: Any = list(sighting.network.children())
    device = next(sighting.network.parameters()).device
    with autocast(sighting.experiment["precision"], device):
        logits = parts[-1].cells(nn.Sequential(*parts[:-1])(torch.stack(crops).to(device)))
    found: np.ndarray = logits[:, 0].float().cpu().numpy()
    return found


def _tokens_of(shown: np.ndarray, network: nn.Module) -> list[int]:
    """The tokens, row by row, in which some pixel is shown."""
    embeds: list[Any] = [each.patch_embed for each in network.modules() if hasattr(each, "patch_embed")]
    h, w = embeds[0].patch_size
    rows, columns = shown.shape[0] // h, shown.shape[1] // w
    return [
        row * columns + column
        for row in range(rows)
        for column in range(columns)
        if shown[row * h : (row + 1) * h, column * w : (column + 1) * w].any()
    ]


def answer_of(kind: Kind, experiment: Experiment, logits: np.ndarray, sights: Sights) -> int:
    """What the defense answers to the logits of its windows."""
    return kind.answer(_integers(kind, experiment, logits), sights)


def _integers(kind: Kind, experiment: Experiment, logits: np.ndarray) -> np.ndarray:
    return np.array([kind.integers(row, experiment) for row in logits], dtype=np.int64)


def _compare(kind: Kind, sighting: Sighting) -> None:
    """Compare a record with what the windows of its image say."""
    record, experiment, label = sighting.record, sighting.experiment, sighting.record["label"]
    sights = sights_of(experiment)
    logits = window_logits(sighting, sights, sighting.image)
    evidence = _integers(kind, experiment, logits)
    unmasked = sighting.logits(sighting.image)
    if int(unmasked.argmax()) != record["vanilla_label"]:
        surely = float(np.subtract(*np.sort(unmasked)[:-3:-1])) > sighting.tolerance
        sighting.differs(
            f"vanilla_label {record['vanilla_label']!r}, found {unmasked.argmax()}", surely=surely
        )
    slacks = {row.tobytes(): kind.slack(evidence, label, row, sights) for row in sights.reached}
    least = min(_others(of_set, label) for of_set in slacks.values())
    quiet, sure = _room(kind, sighting, logits)
    answer = kind.answer(evidence, sights)
    if answer != record["defended_label"]:
        sighting.differs(
            f"answers {answer}, the record says {record['defended_label']!r}", surely=sure(np.inf)
        )
    if abs(least - record["slack"]) > quiet:
        what = f"slack is {least}, the record says {record['slack']!r}"
        sighting.differs(what, surely=sure(abs(least - record["slack"])))
    there = kind.slack(evidence, label, sights.reached_by(record["weakest"]), sights)[record["rival"]]
    if abs(there - record["slack"]) > quiet:
        what = f"slack at {record['weakest']} against {record['rival']} is {there}, not {record['slack']!r}"
        sighting.differs(what, surely=sure(abs(there - record["slack"])))
    _compare_published(kind, sighting, evidence, sights, (quiet, sure))
    if record["certified"] is True:
        _compare_margin(kind, sighting, logits, sights)


def _others(slack: list[int], label: int) -> int:
    return min(one for c, one in enumerate(slack) if c != label)


def _room(kind: Kind, sighting: Sighting, logits: np.ndarray) -> Room:
    """The room of a slack by how near logits are to where evidence changes."""
    if kind.unsure is not None:
        nearest = min(kind.unsure(row, sighting.experiment) for row in logits)
        return 0, lambda _difference: nearest > sighting.tolerance
    each = 2 * len(logits) * kind.steps * sighting.tolerance
    quiet = NOISE * each + 2 * len(logits)
    return quiet, lambda difference: difference > each + quiet


def _compare_published(
    kind: Kind, sighting: Sighting, evidence: np.ndarray, sights: Sights, room: Room
) -> None:
    """The papers' condition: the lead of the label, less two votes of as many windows as are ever reached."""
    stated, label, (quiet, sure) = sighting.record["slack_published"], sighting.record["label"], room
    if kind.rule != "bounded-sum":
        return
    total, most = evidence.sum(axis=0), int(sights.reached.sum(axis=1).max())
    twice = 2 * kind.spread * most
    leads = [int(total[label] - total[c]) - twice - (c < label) for c in range(len(total)) if c != label]
    off = abs(min(leads) - stated)
    if off > quiet:
        sighting.differs(f"slack_published is {min(leads)}, the record says {stated!r}", surely=sure(off))


def _compare_margin(kind: Kind, sighting: Sighting, logits: np.ndarray, sights: Sights) -> None:
    """The windows that are nearest to their threshold may say anything, one more after the other, as long as
    the certificate holds; the margin is how near the next one is."""
    record, experiment = sighting.record, sighting.experiment
    evidence = _integers(kind, experiment, logits)
    if kind.unsure is None:
        slack = record["slack"]
        found = max(0.0, slack / (2 * len(logits)) - 1) / kind.steps
    else:
        unsure = [kind.unsure(row, experiment) for row in logits]
        free = np.zeros(len(logits), dtype=bool)
        found = 0.0
        for window in np.argsort(unsure, kind="stable"):
            found = unsure[window]
            free[window] = True
            rows = [row | free for row in sights.reached]
            if (
                min(
                    _others(kind.slack(evidence, record["label"], row, sights), record["label"])
                    for row in rows
                )
                < 0
            ):
                break
    if abs(found - record["margin"]) > sighting.tolerance:
        sighting.differs(f"margin {record['margin']!r}, found {found:.6g}", surely=True)


def compare_attacked(kind: Kind, clean: Sighting, patched: Sighting | None) -> None:
    """Compare a line of an attack with what the windows say of the clean image and of the patched one.

    ``ways`` counts, of all sets of windows that a patch can reach, those where nothing is to spare.
    """
    record, sights = clean.record, sights_of(clean.experiment)
    if patched is not None:
        _compare_answer(kind, patched, sights, record["defended_label"])
        _compare_vanilla(patched)
    if record["top"] is None:
        _compare_answer(kind, clean, sights, record["defended_label"])
        _compare_vanilla(clean)
        return
    _compare_answer(kind, clean, sights, record["label"])
    logits = window_logits(clean, sights, clean.image)
    evidence = _integers(kind, clean.experiment, logits)
    kinds = {(place[2:], row.tobytes()): row for place, row in sights.places}
    ways = sum(
        _others(kind.slack(evidence, record["label"], row, sights), record["label"]) < 0
        for row in kinds.values()
    )
    if ways != record["ways"]:
        _, sure = _room(kind, clean, logits)
        clean.differs(f"{ways} ways are open, the line says {record['ways']!r}", surely=sure(0))


def _compare_answer(kind: Kind, sighting: Sighting, sights: Sights, stated: int) -> None:
    logits = window_logits(sighting, sights, sighting.image)
    answer = answer_of(kind, sighting.experiment, logits, sights)
    if answer != stated:
        _, sure = _room(kind, sighting, logits)
        what = f"the defense answers {answer}, the line says {stated!r}"
        sighting.differs(what, surely=sure(0))


def _compare_vanilla(sighting: Sighting) -> None:
    logits, stated = sighting.logits(sighting.image), sighting.record["vanilla_label"]
    if int(logits.argmax()) != stated:
        surely = float(np.subtract(*np.sort(logits)[:-3:-1])) > sighting.tolerance
        sighting.differs(f"vanilla_label {stated!r}, found {logits.argmax()}", surely=surely)


def _restated(name: str) -> Restatement:
    of_name = [kind for kind in KINDS if kind.name == name]
    shown = {"tokens", "fill"}  # of images of which all but a window is hidden, not of cells
    own = {"threat", "windows", "evidence", "rule", "patch_size_known", "touched"}
    own |= shown if not any(kind.cells for kind in of_name) else set()
    return Restatement(
        defense=name,
        entries=ENTRIES | own | {"defense"} | ({"theta"} if name == "ds" else set()),
        optional=frozenset(shown if len(of_name) > 1 else ()),
        fields=FIELDS | {"slack", "slack_published", "weakest", "rival"},
        flaws=lambda experiment: _flaws(kind_of(name, experiment), experiment),
        check_line=lambda line: _check_line(kind_of(name, line.experiment), line),
        compare=lambda sighting: _compare(kind_of(name, sighting.experiment), sighting),
    )


BY_WINDOWS = tuple(_restated(name) for name in dict.fromkeys(kind.name for kind in KINDS))
