"""What tests feed to the command line: small photographs, forged manifests, and where the real images are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from certipatch.records.seals import seal

SHARED = Path(__file__).parents[2] / "shared" / "data"


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
