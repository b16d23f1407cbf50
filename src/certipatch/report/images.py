"""Images for a report, as the model saw them: found by the hash in their record, or not shown.

This is the only part of a report that loads torch, which the transform of images needs; it does so when a
picture is asked for.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from pydantic import ValidationError

from ..config import DataAsked, ModelSpec, differences
from ..errors import CertiPatchError, DataError, MachineError, RecordsError
from ..geometry.patch import by
from ..records.manifest import Manifest, first_problem
from ..records.schema import AttackRecord, Record
from ..records.seals import sha256

if TYPE_CHECKING:
    import numpy as np

    from ..data.source import Images, Source

EXACT = 96  # pixels a side up to which a picture is stored without loss
LARGEST = 2048  # pixels a side of an image, and of what it is cropped from, up to which pictures are shown


def images_of(manifest: Manifest, data: DataAsked | None = None) -> Images:
    """The images that a certification is of.

    Args:
        data: where they are, as ``certify`` had it; None, or a place that is empty: as the manifest says,
            with the split that fits. Anyone may have written the manifest, so then only the digits and what
            lies beside its folder are opened, and nothing is fetched.

    Raises:
        ConfigError, DataError: they cannot be found, or are others than those that were certified.
        RecordsError: the manifest does not describe them, or describes pictures that are too large.
        MachineError: torch, whose transforms make the pictures, is not installed.
    """
    try:
        from ..data.load import judged_split
        from ..data.source import Images
    except ModuleNotFoundError as error:
        raise MachineError(f"pictures: expected the package {error.name}, found none") from None

    asked = data or DataAsked("")
    place = asked.place or place_beside(manifest)
    spec, classes = _described(manifest)
    split = judged_split(place, asked.split)
    problems: list[str] = []
    # A name of timm has one split to judge a model on or the other; a folder has none.
    for part in (split,) if split else (None, "test", "validation"):
        found = _certified_images(manifest, DataAsked(place, part, asked.class_map), classes)
        if not isinstance(found, str):
            return Images(found, spec)
        problems.append(found)
    raise DataError(problems[0])


def place_beside(manifest: Manifest) -> str:
    """Where the manifest says that its images are, if that may be opened unasked.

    Raises DataError for any place but the digits, and folders and tars inside the folder that the folder of
    records is in; no link may lead out of it.
    """
    place = manifest.data
    if not place:
        raise DataError("its manifest does not say where they are")
    if place == "digits":
        return place
    beside = manifest.folder.resolve().parent
    if not _is_inside(Path(place), beside, manifest.folder.absolute().parent):
        raise DataError(
            "the place that its manifest names is not beside its folder and not opened unasked: give --data"
        )
    return str(Path(place).resolve())


def _is_inside(place: Path, folder: Path, alias: Path) -> bool:
    """Whether a place and all that links in it lead to are in a folder, which has two names.

    By its name a place elsewhere is refused before the disk is asked for it.
    """
    named = Path(os.path.abspath(place))
    if not (named.is_relative_to(folder) or named.is_relative_to(alias)):
        return False
    try:
        return place.exists() and all(path.resolve().is_relative_to(folder) for path in _links(place))
    except (OSError, ValueError, RuntimeError):  # no name that a file can have, or links in a circle
        return False


def _links(place: Path) -> Iterator[Path]:
    """A place, and all links in it."""
    yield place
    for root, folders, files in os.walk(place):
        yield from (path for name in (*folders, *files) if (path := Path(root, name)).is_symlink())


def _described(manifest: Manifest) -> tuple[ModelSpec, tuple[str, ...]]:
    try:
        spec = ModelSpec.model_validate_json(json.dumps(manifest.stated["model"]), strict=True)
        classes = tuple(map(str, manifest.stated["data"]["classes"]))
    except (KeyError, TypeError, ValidationError) as error:
        what = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise RecordsError(f"its manifest is damaged ({what})") from error
    if max(spec.image_size) > LARGEST * min(1.0, spec.crop_pct):
        raise RecordsError(
            f"expected pictures of at most {LARGEST} pixels a side, found {by(spec.image_size)} cropped to "
            f"{spec.crop_pct:g}"
        )
    return spec, classes


def _certified_images(manifest: Manifest, data: DataAsked, classes: tuple[str, ...]) -> Source | str:
    """The images of a data set that were certified, or why they are not these."""
    from ..data.load import load_source

    there = manifest.stated["data"]
    try:
        source = load_source(data.place, split=data.split, class_map=data.class_map, classes=classes)
        source = source.first(int(there["images"]))
    except CertiPatchError as error:
        return str(error)
    differing = differences(there, source.describe())
    if not differing:
        return source
    found = "; ".join(differing[:2])
    return f"data {data.place}: expected the images that were certified, found others ({found})"


def pictures(images: Images, records: Iterable[Record]) -> dict[str, str]:
    """``data:`` addresses by the hash of the pixels (``record.pixels``).

    An image that is not the one that was certified is left out.
    """
    found = {}
    for record in records:
        pixels = images[record.index].pixels
        if pixels is None or record.pixels is None:
            continue
        array = pixels.numpy()
        if sha256(array.tobytes()) == record.pixels:
            found[record.pixels] = address(array.transpose(1, 2, 0))
    return found


def patched(folder: Path, record: AttackRecord) -> str | None:
    """The patched image that an attack has saved, as an address; None if it is not there or another."""
    named = record.image is not None and Path(record.image).name == f"{record.index}.png"
    if not named or record.pixels is None:
        return None
    import numpy as np

    from ..data.decode import UNREADABLE, decode, open_image

    try:
        array = np.asarray(decode(open_image(folder / "patched" / f"{record.index}.png")))
    except UNREADABLE:
        return None
    same = sha256(array.transpose(2, 0, 1).tobytes()) == record.pixels
    return address(array) if same else None


def address(pixels: np.ndarray) -> str:
    """(H, W, 3) uint8 as a ``data:`` address: small images exactly, larger ones as JPEG."""
    image, data = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) <= EXACT:
        image.save(data, "PNG", optimize=True)
        kind = "png"
    else:
        image.save(data, "JPEG", quality=82)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
