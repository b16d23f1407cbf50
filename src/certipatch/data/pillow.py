"""timm's evaluation transform with Pillow alone: from an upright RGB picture to what the model sees.

The exported predictor does without torch, timm and torchvision; tests hold that its pixels are theirs, byte
for byte, and ``export`` compares the hash of each certified image. No other file of ours is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

LONGEST = 20  # of a picture more than so many times as long as the crop, only the middle is resized


def preprocess(image: Image.Image, spec: Mapping[str, Any]) -> np.ndarray:
    """The pixels (3, H, W) uint8 of an RGB picture, resized and cropped.

    Args:
        spec: ``image_size`` (height, width), ``crop_pct``, ``crop_mode`` ("center", "squash" or "border"),
            ``interpolation`` and ``mean`` (whose colour is the border's), as
            :class:`certipatch.config.ModelSpec` has them.
    """
    size = int(spec["image_size"][0]), int(spec["image_size"][1])
    scaled = math.floor(size[0] / spec["crop_pct"]), math.floor(size[1] / spec["crop_pct"])
    how, fill = Image.Resampling[str(spec["interpolation"]).upper()], (0, 0, 0)
    if spec["crop_mode"] == "squash":
        goal = scaled
    elif spec["crop_mode"] == "border":
        goal = _in_ratio(image, scaled, max)
        red, green, blue = (round(255 * value) for value in spec["mean"])
        fill = red, green, blue
    else:
        image = middle(image, size)
        goal = _by_short_side(image, scaled[0]) if scaled[0] == scaled[1] else _in_ratio(image, scaled, min)
    height, width = goal
    resized = image if image.size == (width, height) else image.resize((width, height), how)
    array = np.asarray(_cropped(resized, size, fill))
    return np.ascontiguousarray(array.transpose(2, 0, 1))


def _by_short_side(image: Image.Image, side: int) -> tuple[int, int]:
    """(height, width) of a picture whose shorter side becomes ``side``; the longer one is rounded down."""
    width, height = image.size
    longer = int(side * max(width, height) / min(width, height))
    return (longer, side) if width <= height else (side, longer)


def _in_ratio(image: Image.Image, goal: tuple[int, int], choose: Any) -> tuple[int, int]:
    """(height, width) of a picture so that both sides reach the goal (``min``) or neither exceeds it
    (``max``)."""
    width, height = image.size
    ratio = choose(height / goal[0], width / goal[1])
    return round(height / ratio), round(width / ratio)


def _cropped(image: Image.Image, size: tuple[int, int], fill: tuple[int, int, int]) -> Image.Image:
    """The centre of a picture; where it is smaller than the crop, there is ``fill`` around it."""
    (height, width), (own_width, own_height) = size, image.size
    if width > own_width or height > own_height:
        canvas = Image.new("RGB", (max(width, own_width), max(height, own_height)), fill)
        canvas.paste(image, (max(width - own_width, 0) // 2, max(height - own_height, 0) // 2))
        image, (own_width, own_height) = canvas, canvas.size
    top, left = round((own_height - height) / 2.0), round((own_width - width) / 2.0)
    return image.crop((left, top, left + width, top + height))


def middle(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture, or of one that is more than LONGEST times as long as a crop of this size the middle.

    timm resizes the whole of a picture to crop it afterwards, which would make 77 GB of 1 x 100,000 pixels.
    """
    longest = math.ceil(LONGEST * max(size) / min(size) * min(image.size))
    if max(image.size) <= longest:
        return image
    longest -= (max(image.size) - longest) % 2  # so that the middle stays in the middle
    left, top = (max(0, side - longest) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top))
