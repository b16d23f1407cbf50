"""What tests feed to the command line: options, small photographs, forged manifests, real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from certipatch.records.seals import seal

SHARED = Path(__file__).parents[2] / "shared" / "data"


def typed(*words: object, **options: object) -> list[object]:
    """A command line as words: ``typed("train", lr=0.1, json=True)`` is ["train", "--lr", 0.1, "--json"]."""
    line = list(words)
    for name, value in options.items():
        line += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    return line


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest as a forger would: with its hash mended."""
    path.write_text(json.dumps(seal(manifest)))


def write_photos(
    folder: Path, classes: tuple[str, ...] = ("blue", "green", "red"), each: int = 8, size: int = 32
) -> Path:
    """A data set that a small network learns: noisy images, each with the colour of its class."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8)
            pixels[..., 2 - label % 3] += 100
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def refused(outcome, *words: str, code: int = 2) -> None:
    """One line, the exit code of bad input or another, no traceback, and the words a user needs."""
    lines = [line for line in outcome.err.strip().splitlines() if line.startswith("certipatch:")]
    assert outcome.code == code, outcome
    assert len(lines) == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in lines[0]
