"""Images for a report, as the model saw them: found by the hash in their record, or not shown.

The only part of a report that loads torch, which the transform of images needs; it is imported when a picture
is asked for.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import ValidationError

from ...config import ModelSpec, differences
from ...errors import CertiPatchError, DataError, RecordsError
from ...records.manifest import first_problem
from ...records.schema import AttackRecord, Record
from ..attack import _some_attacks
from ..findings import failing_pairs, telling
from .run import PAIRS, Run

if TYPE_CHECKING:
    import numpy as np

    from ...data.source import Images


PICTURES = 180  # at most in galleries, in all: with 224 pixels a side a page of some 3 megabytes


ROOM = 1_500_000  # characters for further pictures of images without a certificate


EACH = 8  # of an outcome in a gallery


def _pictures(
    runs: list[Run],
    attacks: Sequence[Path],
    notes: list[str],
    data: str | None,
    split: str | None,
    class_map: str | None,
) -> tuple[dict[str, str], list[list[Record]]]:
    """The pictures of the page by the hash of their pixels, and for each run the records that its gallery
    shows."""
    each = max(2, min(EACH, PICTURES // (3 * max(1, len(runs)))))
    found: dict[str, str] = {}
    gallery = []
    opened: dict[str, Any] = {}
    under_attack = {record.index for folder in attacks for record in _some_attacks(folder)}
    for run in runs:
        groups = telling(run.records, each, run.summary.min_margin)
        some = {record.index: record for group in groups.values() for record in group}
        gallery.append(list(some.values()))
        for pair, _ in failing_pairs(run.records)[
            :PAIRS
        ]:  # an example of each, one in the gallery if there is one
            failing = [record for record in run.records if record.failing_pair == pair]
            some |= {r.index: r for r in failing[:1] if not any(r.index in some for r in failing)}
        some |= {record.index: record for record in run.records if record.index in under_attack}
        key = json.dumps([run.experiment["data"], run.experiment["model"]])
        try:
            if key not in opened:
                opened[key] = images_of(run.summary.manifest, data, split, class_map)
            missing = [record for record in some.values() if record.pixels not in found]
            found |= pictures(opened[key], missing)
            room = ROOM
            for record in run.records if run is runs[0] else ():
                if room > 0 and not record.certified and record.pixels not in found:
                    more = pictures(opened[key], [record])
                    found |= more
                    room -= sum(map(len, more.values()))
        except CertiPatchError as error:
            if data is not None:
                raise
            opened.setdefault(key, None)
            note = f"pictures of {run.summary.folder}: not shown ({error}); give its --data, --split and --class-map"
            notes += [note]
    return found, gallery


EXACT = 96  # pixels a side up to which a picture is stored without loss


def images_of(manifest: dict[str, Any], data: str | None, split: str | None, class_map: str | None) -> Images:
    """The images that a certification is of.

    Args:
        data, split, class_map: as ``certify`` had them; None: as its manifest says, and the split that fits.

    Raises:
        ConfigError, DataError: they cannot be found, or are others than those that were certified.
    """
    from ...data.load import load_source
    from ...data.source import Images

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
            source = load_source(place, split=part, class_map=class_map, classes=classes).first(
                int(there["images"])
            )
        except CertiPatchError as error:
            problems.append(str(error))
            continue
        differing = differences(there, source.describe())
        if not differing:
            return Images(source, spec)
        problems.append(
            f"data {place}: expected the images that were certified, found others "
            f"({'; '.join(differing[:2])})"
        )
    raise DataError(problems[0])


def pictures(images: Images, records: Iterable[Record]) -> dict[str, str]:
    """``data:`` addresses by the hash of the pixels (``record.pixels``); what is not the image that was
    certified is left out."""
    found = {}
    for record in records:
        pixels = images[record.index].pixels
        if pixels is not None and record.pixels is not None:
            array = pixels.numpy()
            if hashlib.sha256(array.tobytes()).hexdigest() == record.pixels:
                found[record.pixels] = address(array.transpose(1, 2, 0))
    return found


def patched(folder: Path, record: AttackRecord) -> str | None:
    """The patched image that an attack has saved, as an address; None if it is not there or another."""
    if record.image is None or record.pixels is None or Path(record.image).name != f"{record.index}.png":
        return None
    import numpy as np

    from ...data.decode import UNREADABLE, decode, open_image

    try:
        array = np.asarray(decode(open_image(folder / "patched" / Path(record.image).name)))
    except UNREADABLE:
        return None
    same = hashlib.sha256(array.transpose(2, 0, 1).tobytes()).hexdigest() == record.pixels
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
