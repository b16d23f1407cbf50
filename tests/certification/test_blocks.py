"""From the verdict of a defense to the line of a record: every field stands under its own name."""

from __future__ import annotations

import hashlib

import pytest
import torch

from certipatch.certification.blocks import look
from certipatch.data.source import Item
from certipatch.defenses.minority_reports.detector import Detection
from certipatch.defenses.patchcleanser.examination import PatchCleanserVerdict
from certipatch.records.schema import DetectionRecord, PatchCleanserRecord

ANSWER = PatchCleanserVerdict(
    label=1,
    vanilla_label=2,
    defended_label=3,
    certified=False,
    margin=0.25,
    passes=9,
    case="disagreer",
    failing_pair=(4, 5),
    failing_label=6,
)
ALARM = Detection(
    label=1,
    vanilla_label=2,
    defended_label=None,
    certified=False,
    margin=None,
    passes=9,
    alarm=True,
    agreement=None,
    dissent=0.75,
)


class Said:
    """A defense that says what it is told to."""

    def __init__(self, name, verdict):
        self.name, self.verdict, self.shown = name, verdict, []

    def examine(self, images, labels=None):
        self.shown.append((images, labels))
        return [self.verdict] * len(images)


@pytest.mark.parametrize(
    ("name", "verdict", "schema"),
    [("patchcleanser", ANSWER, PatchCleanserRecord), ("minority-reports", ALARM, DetectionRecord)],
)
def test_a_record_is_what_the_verdict_says(name, verdict, schema):
    pixels = torch.randint(256, (3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    defense = Said(name, verdict)
    unreadable, readable = look(
        defense, torch.device("cpu"), [Item(7, "a", 0, None, "no image"), Item(8, "b", 1, pixels, None)]
    )
    assert isinstance(readable, schema)
    said = {**vars(verdict), "index": 8, "name": "b", "error": None}
    said["pixels"] = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    # These stand in no record of a run that did not ask for them.
    extra = {"proven", "proven_margins", "unchangeable", "forgeable"}
    fields = [field for field in schema.model_fields if field not in extra]
    assert readable.model_dump() == {field: said[field] for field in fields}
    assert list(readable.model_dump()) == [field for field in schema.ORDER if field not in extra]

    ((images, labels),) = defense.shown  # only what can be read is examined
    assert torch.equal(images, pixels[None] / 255)
    assert labels.tolist() == [1]
    known = {"index": 7, "name": "a", "label": 0, "error": "no image", "passes": 0}
    known |= {"certified": False} if schema is PatchCleanserRecord else {}
    empty = dict.fromkeys(field for field in schema.ORDER if field not in extra)
    assert unreadable.model_dump() == empty | known
