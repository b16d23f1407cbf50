"""Certifications whose answers are invented: folders of records of every kind, without a network."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from certipatch.geometry.masks import MaskSet
from certipatch.records.manifest import begin_manifest
from certipatch.records.schema import RECORDS, PatchCleanserRecord
from certipatch.records.store import Store

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    "a\"b'c&amp;\n\u202e\x1b[31m{{ 7*7 }}",
    "plain",
)


def certification(
    folder: Path,
    *,
    images: int = 60,
    patch: int = 5,
    k: int = 3,
    classes: tuple[str, ...] = HOSTILE,
    seed: int = 0,
    weights: str = "ab" * 32,
    images_of: int | None = None,
    places: bool = False,
    **trained: Any,
) -> Path:
    """A folder as ``certify`` writes it, with invented answers of every kind; by place if asked for."""
    rng = random.Random(seed)
    masks = MaskSet.covering(image_size=(32, 32), patch_size=(patch, patch), masks_per_axis=k)
    experiment = {
        "model": {"arch": "small-cnn", "classes": list(classes)},
        "weights_sha256": weights,
        "trained": trained or None,
        "masks": masks.to_json(),
        "fill": [0.5, 0.5, 0.5],
        "data": {
            "images": images_of or images,
            "fingerprint": f"{images}",
            "classes": list(classes),
            "sample": "00",
        },
        "device": "cpu",
        "precision": "32-true",
        "exhaustive": False,
        "block": 32,
        **({"places": True} if places else {}),
    }
    with Store(
        folder, {**begin_manifest("certify", experiment), "data": f"photos/{HOSTILE[0]}"}, RECORDS
    ) as store:
        records = [invented(index, len(masks), classes, rng) for index in range(images)]
        if places:
            records = [by_place(record, len(masks), rng) for record in records]
        store.append(record.model_dump(mode="json") for record in records)
        store.finish()
    return folder


def invented(index: int, masks: int, classes: tuple[str, ...], rng: random.Random) -> PatchCleanserRecord:
    """A record that could be, of one of six kinds."""
    label = rng.randrange(len(classes))
    other = (label + 1 + rng.randrange(len(classes) - 1)) % len(classes)
    kind = rng.choice(["certified", "certified", "pair", "mask", "vanilla", "unreadable"])
    common = {
        "index": index,
        "name": f"{classes[label]}-{index}",
        "label": label,
        "pixels": "00" * 32,
        "margin": rng.random(),
        "passes": rng.randint(10, 46),
    }
    if kind == "unreadable":
        empty = dict.fromkeys(PatchCleanserRecord.model_fields)
        nothing = {"pixels": None, "margin": None, "passes": 0, "certified": False, "error": HOSTILE[1]}
        return PatchCleanserRecord(**empty | common | nothing)
    pair = tuple(sorted(rng.sample(range(masks), 2)))
    wrong = {"failing_pair": (pair[0],) * 2 if kind in ("mask", "vanilla") else pair, "failing_label": other}
    return PatchCleanserRecord(
        **common,
        vanilla_label=other if kind == "vanilla" else label,
        defended_label=label,
        case="agreed" if kind in ("certified", "pair") else "majority",
        certified=kind == "certified",
        **({"failing_pair": None, "failing_label": None} if kind == "certified" else wrong),
    )


def by_place(record: PatchCleanserRecord, masks: int, rng: random.Random) -> PatchCleanserRecord:
    """The record with rows that could be proven, where it is of an image that was looked at."""
    if record.error is not None:
        return record
    wrong = set(record.failing_pair or ())
    rows = [row not in wrong and (record.certified or rng.random() < 0.5) for row in range(masks)]
    proven = "".join("01"[row] for row in rows)
    margins = tuple(rng.random() for row in rows if row)
    return PatchCleanserRecord(**record.model_dump() | {"proven": proven, "proven_margins": margins})
