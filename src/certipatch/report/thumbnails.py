"""Images for a report, as the model saw them.

The only part of a report that loads torch, which the transform of images needs; it is imported when a picture is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..config import ModelSpec, differences
from ..errors import CertiPatchError, DataError, RecordsError
from ..records import first_problem

if TYPE_CHECKING:
    from ..data import Images


def images_of(manifest: dict[str, Any], data: str | None, split: str | None, class_map: str | None) -> Images:
    """The images that a certification is of.

    Args:
        data, split, class_map: as ``certify`` had them; None: as its manifest says, and the split that fits.

    Raises:
        ConfigError, DataError: they cannot be found, or are others than those that were certified.
    """
    from ..data import Images, load_source

    there = manifest["experiment"]["data"]
    place = data or str(manifest.get("data") or "")
    if not place:
        raise DataError("its manifest does not say where they are")
    try:
        spec = ModelSpec.model_validate(manifest["experiment"]["model"])
        classes = tuple(map(str, there["classes"]))
    except (KeyError, TypeError, ValidationError) as error:
        what = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise RecordsError(f"its manifest is damaged ({what})") from error
    problems: list[str] = []
    # Without a split `digits` is its test part, as in certify; other names of timm have one or the other.
    for part in (split,) if split else ("test",) if place == "digits" else (None, "test", "validation"):
        try:
            source = load_source(place, split=part, class_map=class_map, classes=classes).first(int(there["images"]))
        except CertiPatchError as error:
            problems.append(str(error))
            continue
        differing = differences(there, source.describe())
        if not differing:
            return Images(source, spec)
        problems.append(f"data {place}: expected the images that were certified, found others ({'; '.join(differing[:2])})")
    raise DataError(problems[0])
