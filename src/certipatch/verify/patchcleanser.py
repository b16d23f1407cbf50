"""PatchCleanser, as ``verify`` knows it: what follows from what in a line, and what its image's views say.

Nothing here comes from ``defenses.patchcleanser``, whose records are checked by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

import numpy as np

from .algorithms import CHALLENGER, DOUBLE_MASKING, Answer, Inference, Labels, all_views
from .findings import Experiment
from .record import check_labels, check_margin, is_margin
from .restatement import ENTRIES, FIELDS, Line, Restatement, Sighting

BY_PLACE = ("proven", "proven_margins")  # what a line has besides if it was certified by place
PROOFS = ("unchangeable", "forgeable")  # ... and if proofs without a label were asked for
WILD = 8  # so many views within the tolerance are tried both ways


def inference_of(experiment: Experiment) -> Inference:
    return CHALLENGER if "inference" in experiment else DOUBLE_MASKING  # the default is not stated


def _flaws(experiment: Experiment) -> Iterator[str]:
    """What is wrong with how PatchCleanser was asked to run."""
    if type(experiment["exhaustive"]) is not bool:
        yield f"exhaustive is {experiment['exhaustive']!r}"
    if experiment.get("inference", "challenger") != "challenger":
        yield f"inference is {experiment['inference']!r}, expected 'challenger' or none"
    for entry in ("places", "prove"):
        if experiment.get(entry, True) is not True:
            yield f"{entry} is {experiment[entry]!r}, expected true or none"


def _check_line(line: Line) -> None:
    """What follows from what within one line."""
    record = line.record
    check_labels(line, record["vanilla_label"], record["defended_label"])
    line.expect(record["case"] in inference_of(line.experiment).cases, f"case is {record['case']!r}")
    check_margin(line)
    _check_passes(line)
    if record["certified"] is True:
        _check_certificate(line)
    else:
        _check_failure(line)
    _check_places(line)
    _check_proof(line)


def _check_proof(line: Line) -> None:
    """A proof is of an answer that all masks agree on; if it is right it is the certificate, and if it is
    wrong it is forged."""
    record = line.record
    there = [field for field in PROOFS if field in record]
    if "prove" not in line.experiment:
        line.expect(not there, f"has {', '.join(there)}, but proofs were not asked for")
        return
    proven, forged = (record.get(field) for field in PROOFS)
    if type(proven) is not bool or type(forged) is not bool:
        line.expect(False, f"unchangeable {proven!r} and forgeable {forged!r} are not both true or false")
        return
    right = record["defended_label"] == record["label"]
    line.expect(not proven or record["case"] == "agreed", "is unchangeable, but masks disagree")
    line.expect(
        (proven and right) is (record["certified"] is True),
        f"unchangeable is {proven}, but certified says otherwise",
    )
    line.expect(not (forged and right), "is forgeable, but its answer is right")
    line.expect(forged or right or not proven, "is wrong and unchangeable, but not forgeable")


def _check_places(line: Line) -> None:
    """By place, a line says which rows are proven, and by what margin; all of them are the certificate."""
    record, n = line.record, line.masks
    there = [field for field in BY_PLACE if field in record]
    if "places" not in line.experiment:
        line.expect(not there, f"has {', '.join(there)}, but the run was not by place")
        return
    proven, margins = (record.get(field) for field in BY_PLACE)
    if not isinstance(proven, str) or len(proven) != n or set(proven) - {"0", "1"}:
        line.expect(False, f"proven {proven!r} is not a 0 or 1 for each of the {n} masks")
        return
    rows = proven.count("1")
    listed = margins if isinstance(margins, list) else [None]
    line.expect(
        len(listed) == rows and all(map(is_margin, listed)), f"proven_margins are not those of {rows} rows"
    )
    line.expect(
        rows == 0 or record["defended_label"] == record["label"],
        f"{rows} rows are proven, but defended_label is not the label",
    )
    line.expect(
        (rows == n) is (record["certified"] is True),
        f"{rows} of {n} rows are proven, but certified says otherwise",
    )
    pair = record["failing_pair"]
    if _is_pair(pair, n):
        line.expect(
            all(proven[mask] == "0" for mask in pair),
            f"masks {pair} answer wrong, but a row of theirs is proven",
        )


def _check_passes(line: Line) -> None:
    """There were as many forward passes as the masks and the inference can take."""
    record, n = line.record, line.masks
    low, high = 1 + n, all_views(n)
    whole = line.experiment["exhaustive"] is True or record.get("unchangeable") is True
    if record["certified"] is True or whole:
        low = high
    elif (
        not {"places", "prove"} & set(line.experiment)
        and _is_pair(record["failing_pair"], n)
        and record["failing_pair"][0] == record["failing_pair"][1]
    ):
        high = inference_of(line.experiment).most_passes(n)
    expected = str(low) if low == high else f"{low} to {high}"
    passes = record["passes"]
    line.expect(
        type(passes) is int and low <= passes <= high,
        f"passes {passes!r}: expected {expected} with {n} masks",
    )


def _check_certificate(line: Line) -> None:
    """A certified image is answered right under every mask."""
    record = line.record
    right = record["defended_label"] == record["label"] and record["case"] == "agreed"
    flawless = record["failing_pair"] is None and record["failing_label"] is None
    line.expect(right and flawless, "is certified, but its other fields say it is not")


def _check_failure(line: Line) -> None:
    """An image that is not certified has a pair of masks that answers wrong."""
    pair, wrong = line.record["failing_pair"], line.record["failing_label"]
    ordered = _is_pair(pair, line.masks)
    line.expect(
        ordered, f"is not certified, but failing_pair {pair!r} is not a pair of the {line.masks} masks"
    )
    line.expect(
        line.is_class(wrong) and wrong != line.record["label"],
        f"is not certified, but failing_label {wrong!r} is not a wrong class",
    )
    if ordered:
        _check_failing_pair(line, *pair)


def _check_failing_pair(line: Line, i: int, j: int) -> None:
    """A pair (i < j) is named only where each mask alone (i = j) answers right."""
    record = line.record
    agreed, defended = record["case"] == "agreed", record["defended_label"]
    if i < j:
        line.expect(
            defended == record["label"] and agreed,
            "fails on two masks only, but one mask alone does not answer the label",
        )
    else:
        line.expect(
            defended == record["failing_label"] or not agreed,
            "fails on one mask, but all masks agree on another label",
        )


def _is_pair(pair: Any, n: int) -> bool:
    """Whether this is a pair i <= j of n masks."""
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    return all(type(i) is int for i in pair) and 0 <= pair[0] <= pair[1] < n


@dataclass(frozen=True)
class View:
    """What the model answers to one view: the best label, the second best, and the margin between them."""

    best: int
    second: int
    margin: float

    @classmethod
    def of(cls, logits: np.ndarray) -> Self:
        best, second = np.argsort(-logits, kind="stable")[:2]
        return cls(int(best), int(second), float(logits[best] - logits[second]))


Table = dict[tuple[int, int], View]  # the view under masks i <= j; i = j is one mask


def table_of(sighting: Sighting) -> Table:
    """What the model answers to all views of an image under one and two masks."""
    n = sighting.masks
    return {(i, j): View.of(sighting.under(i, j)) for i in range(n) for j in range(i, n)}


def _compare(sighting: Sighting) -> None:
    """Compare a record with all views of its image."""
    table = table_of(sighting)
    _compare_vanilla(sighting, View.of(sighting.under()))
    _compare_certificate(sighting, table)
    _compare_failing_pair(sighting, table)
    _compare_answer(sighting, table)
    _compare_margin(sighting, table)
    if "proven" in sighting.record:
        _compare_places(sighting, table)
    if "unchangeable" in sighting.record:
        _compare_proof(sighting, table)


def _compare_proof(sighting: Sighting, table: Table) -> None:
    """Unchangeable if and only if all views say the same; forgeable if and only if the answer is wrong and
    the views under some mask and any other all say it."""
    n, answer = sighting.masks, sighting.record["defended_label"]
    held, broken = [], []  # by how much each row is all of the answer, or some view of it is not
    for i in range(n):
        row = [table[min(i, j), max(i, j)] for j in range(n)]
        against = [view.margin for view in row if view.best != answer]
        if against:
            broken.append(max(against))
        else:
            held.append(min(view.margin for view in row))
    wrong = answer != sighting.record["label"]
    _compare_flag(sighting, "unchangeable", not broken, max(broken) if broken else min(held))
    _compare_flag(sighting, "forgeable", wrong and bool(held), max(held) if held else min(broken))


def _compare_flag(sighting: Sighting, name: str, found: bool, margin: float) -> None:
    stated = sighting.record[name]
    if stated is not found:
        sighting.differs(f"{name} is {found}, the record says {stated}", surely=margin > sighting.tolerance)


def _compare_places(sighting: Sighting, table: Table) -> None:
    """By place: a row is proven if and only if the views under its mask and any other have the true label."""
    n, tolerance, stated = sighting.masks, sighting.tolerance, sighting.record["proven"]
    margins = iter(sighting.record["proven_margins"])
    for i in range(n):
        row = [table[min(i, j), max(i, j)] for j in range(n)]
        wrong = [view.margin for view in row if view.best != sighting.record["label"]]
        smallest = min(view.margin for view in row)
        if stated[i] == "0":
            if not wrong:
                sighting.differs(
                    f"the row of mask {i} is proven, the record says it is not", surely=smallest > tolerance
                )
            continue
        margin = next(margins)
        if wrong:
            sighting.differs(f"the row of mask {i} is not proven", surely=max(wrong) > tolerance)
        elif abs(margin - smallest) > tolerance:
            sighting.differs(
                f"the row of mask {i} has a margin of {smallest:.6g}, the record says {margin!r}", surely=True
            )


def _compare_vanilla(sighting: Sighting, view: View) -> None:
    stated = sighting.record["vanilla_label"]
    if stated != view.best:
        sighting.differs(
            f"vanilla_label {stated!r}, found {view.best}",
            surely=view.margin > sighting.tolerance or stated != view.second,
        )


def _compare_certificate(sighting: Sighting, table: Table) -> None:
    """Algorithm 2: certified if and only if all views have the true label."""
    certified = sighting.record["certified"] is True
    wrong = {pair: view for pair, view in table.items() if view.best != sighting.record["label"]}
    if certified and wrong:
        pair, view = max(wrong.items(), key=lambda entry: entry[1].margin)
        sighting.differs(
            f"is not certified: masks {pair} answer {view.best} with a margin of {view.margin:.3g}",
            surely=view.margin > sighting.tolerance,
        )
    if not certified and not wrong:
        sighting.differs(
            "is certified, which the record says it is not",
            surely=min(view.margin for view in table.values()) > sighting.tolerance,
        )


def _compare_failing_pair(sighting: Sighting, table: Table) -> None:
    pair, label = sighting.record["failing_pair"], sighting.record["failing_label"]
    if pair is None:
        return
    view = table[pair[0], pair[1]]
    if view.best != label:
        sighting.differs(
            f"masks {pair} answer {view.best}, the record says {label!r}",
            surely=view.margin > sighting.tolerance or view.second != label,
        )


def _compare_answer(sighting: Sighting, table: Table) -> None:
    """The inference answers as the record says, or would if rounding had moved some of the labels."""
    infer, n = inference_of(sighting.experiment).answer, sighting.masks
    stated = sighting.record["defended_label"], sighting.record["case"]
    labels = {pair: view.best for pair, view in table.items()}
    found = infer(labels, n)
    if found == stated:
        return
    wild = {pair: view for pair, view in table.items() if view.margin <= sighting.tolerance}
    possible = len(wild) > WILD or stated in _answers_within_rounding(infer, labels, wild, n)
    sighting.differs(f"answers {found}, the record says {stated}", surely=not possible)


def _answers_within_rounding(
    infer: Callable[[Labels, int], Answer], labels: Labels, wild: Table, n: int
) -> set[Answer]:
    """All answers of an inference where each of the wild views has its best or its second label."""
    either = product(*((view.best, view.second) for view in wild.values()))
    return {infer({**labels, **dict(zip(wild, chosen, strict=True))}, n) for chosen in either}


def _compare_margin(sighting: Sighting, table: Table) -> None:
    """The margin is the smallest over the views that were computed: those under one mask, and some pairs."""
    stated, tolerance = sighting.record["margin"], sighting.tolerance
    low = min(view.margin for view in table.values())
    high = min(view.margin for (i, j), view in table.items() if i == j)
    if sighting.record["passes"] == all_views(sighting.masks):
        high = low
    if not low - tolerance <= stated <= high + tolerance:
        span = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
        sighting.differs(f"margin {stated!r}, found {span}", surely=True)


PATCHCLEANSER = Restatement(
    defense="patchcleanser",
    entries=ENTRIES | {"masks", "fill", "exhaustive"},
    optional=frozenset({"defense", "inference", "places", "prove"}),
    fields=FIELDS | {"case", "failing_pair", "failing_label"},
    optional_fields=frozenset({*BY_PLACE, *PROOFS}),
    flaws=_flaws,
    check_line=_check_line,
    compare=_compare,
)
