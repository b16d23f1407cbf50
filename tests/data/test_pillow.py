"""The exported predictor's preprocessing is timm's, byte for byte."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from certipatch.config import ModelSpec
from certipatch.data.pillow import preprocess
from certipatch.data.source import evaluation_transform

HOW = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", HOW)
def test_the_pixels_are_timms(mode: str, interpolation: str):
    draw, rng = random.Random(f"{mode} {interpolation}"), np.random.default_rng(0)
    for number in range(25):
        square = number % 2 == 0
        side = draw.randint(2, 60)
        spec = ModelSpec(
            arch="any",
            num_classes=2,
            classes=("a", "b"),
            image_size=(side, side if square else draw.randint(2, 60)),
            mean=(0.485, 0.456, 0.406),
            std=(1, 1, 1),
            crop_pct=draw.choice([1.0, 0.875, 0.9, 0.95, 0.33, 1.1]),
            crop_mode=mode,
            interpolation=interpolation,
        )
        width, height = draw.choice([(draw.randint(1, 90), draw.randint(1, 90)), (side, side), (3, 200)])
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        try:
            expected = evaluation_transform(spec)(image).numpy()
        except ValueError:  # a side of no pixel
            with pytest.raises(ValueError):
                preprocess(image, spec.model_dump())
            continue
        assert np.array_equal(preprocess(image, spec.model_dump()), expected), (spec, width, height)
