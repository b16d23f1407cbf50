"""What an attack says beside the certification that it is on: an upper bound beside the proven lower one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import differences
from ..errors import RecordsError
from ..records.read import Folder
from ..records.schema import AttackRecord, PatchCleanserRecord, digest
from .certification import environments, threat_of_certification
from .places import ShareOfPlaces
from .shares import Share

BOUNDS = {
    "clean_accuracy": "the defended model is right without a patch",
    "attacked_accuracy": "upper bound: it is still right under every patch that was tried",
    "certified_robust_accuracy": "lower bound: it is right under every patch, proven",
}
AS_STATED = "lower bound: it is right under every patch, as the attack states (report its certification too)"


def certification_of(
    folder: Folder[AttackRecord], certifications: Sequence[Folder[PatchCleanserRecord]]
) -> Folder[PatchCleanserRecord] | None:
    """The one of these certifications that an attack says it is on, by the hash of all records.

    Raises RecordsError if the attack says otherwise of an image than that certification.
    """
    stated = folder.manifest.attack.records_sha256
    found = next((one for one in certifications if digest(one.records) == stated), None)
    if found is not None:
        _compare(folder, found)
    return found


def _compare(folder: Folder[AttackRecord], certification: Folder[PatchCleanserRecord]) -> None:
    differing = differences(folder.manifest.stated["certification"], certification.manifest.stated)
    if differing:
        raise RecordsError(
            f"{folder.path}: is of another experiment than {certification.path}, whose hash it states "
            f"({'; '.join(differing[:2])}); attack that one again"
        )
    certified = {record.index: record for record in certification.records}
    for record in folder.records:
        there, here = (
            one and (one.name, one.label, one.certified) for one in (certified.get(record.index), record)
        )
        if there != here:
            raise RecordsError(
                f"{folder.path}: image {record.index}: expected (name, label, certified) as in "
                f"{certification.path}, {there!r}, found {here!r}; attack it again"
            )


def _check_choice(folder: Folder[AttackRecord]) -> None:
    """Refuse other images than those that are spread evenly over the certified ones."""
    n, all_images = folder.manifest.attack.images, folder.manifest.attack.certification.data.images
    for record in folder.records:
        nearest = -(-record.index * n // max(1, all_images))
        if not (nearest < n <= all_images and nearest * all_images // n == record.index):
            raise RecordsError(
                f"{folder.path}: image {record.index}: expected one of {n} spread evenly over "
                f"{all_images}, found another; attack them again"
            )


def summarize_attack(
    folder: Folder[AttackRecord], certification: Folder[PatchCleanserRecord] | None = None
) -> dict[str, Any]:
    """The bounds on the accuracy under attack, on the same images, and what the attack was worth.

    ``certified_robust_accuracy`` is what no attack can go below, ``attacked_accuracy`` what this one left;
    ``attackable`` counts the images right without a patch whose clean table leaves a goal open.
    ``certified_undefended_fooled``: certified images on which the patch changed the undefended model's
    answer, so that the defense had something to withstand.

    Args:
        certification: as :func:`certification_of` finds it; without it the certificates are what the attack
            states, and the summary says so.

    Raises RecordsError for a folder without records of an attack, or with those of other images than it says.
    """
    manifest, records = folder.manifest, folder.records
    if manifest.kind != "attack" or not records:
        found = "none" if manifest.kind == "attack" else manifest.kind
        raise RecordsError(f"{folder.path}: expected records of attack, found {found}")
    _check_choice(folder)
    experiment = manifest.attack
    certified = [record for record in records if record.certified]
    return {
        "folder": str(folder.path),
        "complete": len(records) == experiment.images,
        **threat_of_certification(experiment.certification),
        "masks_per_axis": experiment.certification.masks_per_axis,
        **_bounds(records),
        "certified_broken": sum(record.broken for record in certified),
        "certified_undefended_fooled": sum(record.vanilla_label != record.label for record in certified),
        "attackable": sum(record.ways > 0 for record in records),
        "attempts": sum(record.attempts for record in records),
        "attempts_on_certified": sum(record.attempts for record in certified),
        **({} if certification else {"certificates_as_stated": True}),
        **environments(manifest),
        **_by_place(records),
    }


def _by_place(records: Sequence[AttackRecord]) -> dict[str, Any]:
    """The upper bound on the share of places where the answer is right, of images certified by place.

    Of each image the proven places count, and all others if the one that was drawn among them withstood. Of
    an image that cannot be read, there is nothing at any place.
    """
    if not any(record.places for record in records):
        return {}
    at = [record.places for record in records]
    shares = np.array([0.0 if one is None else one.proven_share if one.broken else 1.0 for one in at])
    return {
        "attacked_share_of_places": ShareOfPlaces.of(shares).to_json(),
        "attempts_at_proven_places": sum(
            record.places.proven_attempts for record in records if record.places
        ),
    }


def _bounds(records: Sequence[AttackRecord]) -> dict[str, Any]:
    """An image that is broken without a place for the patch is wrong without one."""
    return {
        "clean_accuracy": Share.of(
            not record.broken or record.top is not None for record in records
        ).to_json(),
        "attacked_accuracy": Share.of(not record.broken for record in records).to_json(),
        "certified_robust_accuracy": Share.of(record.certified for record in records).to_json(),
    }


def attack_text(found: dict[str, Any]) -> str:
    """The summary as a person reads it."""
    bounds = BOUNDS | ({"certified_robust_accuracy": AS_STATED} if "certificates_as_stated" in found else {})
    lines = [
        f"{name:26} {Share(found[name]['count'], found[name]['images'])}  {means}"
        for name, means in bounds.items()
    ]
    certified, images = found["certified_robust_accuracy"]["count"], found["clean_accuracy"]["images"]
    lines.append(
        f"certified images: {certified} attacked, {found['certified_broken']} broken in "
        f"{found['attempts_on_certified']} attempts; the undefended model was fooled on "
        f"{found['certified_undefended_fooled']} of them"
    )
    tight = found["attacked_accuracy"]["count"] - certified
    lines.append(
        f"other images: {images - certified}, of them {found['attackable']} right without a patch and open "
        f"to an attack; {tight} withstood this one"
    )
    if "attacked_share_of_places" in found:
        places = found["attacked_share_of_places"]
        low, high = places["interval_95"]
        lines.append(
            f"attacked share of places {100 * places['share']:.1f} % ({100 * low:.1f}-{100 * high:.1f}), "
            "upper bound: proven, or right under every patch tried at a place drawn from the others; "
            f"{found['attempts_at_proven_places']} patches at proven places of images without a certificate "
            "broke none"
        )
    return "\n".join(lines)
