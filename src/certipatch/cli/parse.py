"""From what is typed to what is meant: the command line's options as sizes, masks and places.

Bad input is refused here, in one line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..defenses.patchcleanser.algorithms import INFERENCES, Inference
from ..errors import ConfigError
from ..geometry.masks import MaskSet
from ..geometry.patch import Size, parse_patches
from .jobs import shard_of_job


def model_name(text: str | None) -> str | None:
    """``timm/resnet18.a1_in1k`` and ``hf-hub:timm/resnet18.a1_in1k`` -> ``resnet18.a1_in1k``; what lies on
    the disk, and the rest, as it is."""
    found = re.fullmatch(
        r"(?P<hub>hf[-_]hub:|https?://huggingface\.co/)?(?P<timm>timm/)?(?P<name>[^@/\\:]+)(@main)?/?",
        text or "",
        re.IGNORECASE,
    )
    if text is None or os.path.exists(text) or not (found and (found["hub"] or found["timm"])):
        return text
    return found["name"]


def parse_size(text: str) -> Size:
    try:
        sides = [int(side) for side in text.lower().split("x")]
        if len(sides) > 2 or min(sides) < 1:
            raise ValueError
    except ValueError:
        raise ConfigError(f"image size {text!r}: expected 224 or 224x192 (height x width)") from None
    return sides[0], sides[-1]


def parse_devices(text: str) -> int | str:
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise ConfigError(f"devices {text!r}: expected a number of 1 or more, or auto")
    return text if text == "auto" else int(text)


def parse_inference(name: str | None) -> Inference:
    for known in INFERENCES:
        if name in (None, known):
            return known
    raise ConfigError(f"inference {name!r}: expected {' or '.join(INFERENCES)}")


def parse_shard(text: str) -> tuple[int, int]:
    """``3/8`` -> (3, 8); ``auto`` and ``auto/8`` as the scheduler says in the environment."""
    number, slash, shards = text.partition("/")
    if number == "auto" and (not slash or (shards.isdecimal() and int(shards))):
        return shard_of_job(os.environ, int(shards) if slash else None)
    if not (slash and number.isdecimal() and shards.isdecimal() and 1 <= int(number) <= int(shards)):
        raise ConfigError(f"shard {text!r}: expected i/n with 1 <= i <= n, such as 1/8")
    return int(number), int(shards)


def parse_locations(data: list[str], known: Iterable[str]) -> dict[str, str]:
    names = sorted(set(known))
    found = {}
    for entry in data:
        name, equals, place = entry.partition("=")
        if not equals or name not in names:
            raise ConfigError(f"--data {entry!r}: expected NAME=PLACE with a name out of {', '.join(names)}")
        found[name] = place
    return found


def check_out(out: Path, *data: str | None) -> None:
    """Refuse to write into the current folder by an empty name, or among the images."""
    if out == Path():
        raise ConfigError("out '': expected a folder to write, found no name")
    for place in data:
        if place and os.path.isdir(place) and out.resolve().is_relative_to(Path(place).resolve()):
            raise ConfigError(
                f"out {out}: expected a folder outside of the data {place}; choose another --out"
            )


def check_out_file(out: Path) -> None:
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise ConfigError(f"out {out}: expected a file to write in a folder that exists")


def mask_set(patch: str, masks_per_axis: int, size: Size, patches: int = 1) -> MaskSet:
    """The masks for ``--patch`` (one shape, or several as in 39x20+20x39), ``--masks-per-axis`` and
    ``--patches``."""
    first, *others = parse_patches(patch, size)
    return MaskSet.covering(
        image_size=size,
        patch_size=first,
        other_patch_sizes=others,
        masks_per_axis=masks_per_axis,
        patches=patches,
    )


def geometries(
    patch: str, masks_per_axis: str | None, size: Size, out: Path, patches: int = 1
) -> dict[Path, MaskSet]:
    """The mask set for each patch and k, by the folder its records go to.

    Without ``masks_per_axis`` only the threat of a set matters, and a folder is named by it.
    """
    try:
        ks = [int(k) for k in (masks_per_axis or "1").split(",")]
    except ValueError:
        raise ConfigError(
            f"masks per axis {masks_per_axis!r}: expected a whole number, or several like 3,6"
        ) from None
    sets = {
        fine.name if masks_per_axis else fine.threat.file_name: fine
        for each in patch.split(",")
        for k in ks
        for fine in [mask_set(each, k, size, patches)]
    }
    return {out / name if len(sets) > 1 else out: fine for name, fine in sets.items()}
