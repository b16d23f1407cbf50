"""Check a folder of records from what it says, with code of its own.

Nothing in this room uses the mask geometry, the algorithms or the schedule of the library. Coverage is
tried place by place on arrays of bool (``geometry``), and images are looked at again, one view at a time
(``views``), by a naive restatement of the defense: PatchCleanser's Algorithms 1 and 2 and challenger
masking (``patchcleanser``), or detection (``minority_reports``). What is found wrong is a list of
:class:`~certipatch.verify.findings.Finding`; an untouched folder has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from ..config import differences
from ..data.source import Source
from ..errors import ConfigError, brief
from ..runtime.team import Team
from .attack import ATTACK, Pictures, check_certification, check_lines, replay
from .findings import Experiment, Given, Record, Verification, place
from .folder import Manifest, check_images, read_manifests, read_records
from .geometry import flaws as mask_flaws
from .methods import restatement_of
from .record import LEAST_MARGIN, check_line, is_below, is_margin
from .restatement import Line, Restatement
from .views import TOLERANCE, look_again

# What reading values of other types than a manifest should have may raise.
DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)


def verify(
    folder: Path,
    *,
    model: Given | None = None,
    source: Source | None = None,
    sample: int | None = 20,
    seed: int = 0,
    device: str = "auto",
    certification: Path | None = None,
    team: Team | None = None,
) -> Verification:
    """Check the records that ``certify``, ``detect`` or ``attack`` wrote into ``folder``.

    Args:
        certification: for a folder of ``attack`` the one of ``certify`` that it is on, which is checked too.
        model, source: the model and the whole data set that were given to ``certify``, to be compared with
            what the folder says.
        sample: with model and source, how many images to look at again, drawn with ``seed``; None for all.
        team: workers that look at them, each on a device of its own; None: this process.

    Raises:
        CertiPatchError: the stated precision is none, the model cannot be run, or ``certification`` is given
            for another folder than one of ``attack``.
    """
    found = Verification(str(folder))
    manifests = read_manifests(folder, found)
    if not manifests:
        return found
    experiment = _experiment(manifests, found)
    attacked = found.kind == "attack"
    restatement = ATTACK if attacked else restatement_of(found.kind, experiment)
    if certification is not None and not attacked:
        raise ConfigError(f"records {certification}: {folder} is of {found.kind}; give them with an attack")
    found.counted = restatement.counted
    found.not_restated = restatement.defense if restatement.compare is None and not attacked else None
    odd = restatement.odd_entries(experiment)
    if odd:
        what = f"its experiment has other entries than those of a certification: {', '.join(odd)}"
        found.add("manifest", what)
        return found
    given = Asked(model, source, sample, seed, device, team)
    if attacked:
        _check_attack(folder, manifests, experiment, certification, given, found)
        return found
    try:
        sound = _check_experiment(experiment, restatement, found)
        records = read_records(manifests, restatement, found)
        consistent = _check_records(records, experiment, restatement, _least(manifests), found)
        _check_given(experiment, model, source, found)
    except DAMAGED as error:
        what = f"is damaged ({type(error).__name__}: {brief(error, 100)})"
        found.add("manifest", what)
        return found
    found.asked = model is not None and source is not None
    if sound:
        _look_again(given, records, consistent, experiment, restatement, _stated_movement(manifests), found)
    return found


def _look_again(
    given: Asked,
    records: dict[int, Record],
    consistent: list[int],
    experiment: Experiment,
    restatement: Restatement,
    moved: float,
    found: Verification,
) -> None:
    """Look at some of the images again, if model and images were given and the defense is restated."""
    if given.model is None or given.source is None or restatement.compare is None:
        return
    source = given.source.first(experiment["data"]["images"])
    on: dict[str, Any] = {"model": given.model, "source": source, "device": given.device, "team": given.team}
    again = given.drawn(records, consistent, source)
    look_again(again, experiment, restatement.compare, **on, tolerance=moved, found=found)


@dataclass(frozen=True)
class Asked:
    """What is there to compare a folder with, and how many of its images to look at again; as of
    :func:`verify`."""

    model: Given | None
    source: Source | None
    sample: int | None
    seed: int
    device: str
    team: Team | None = None

    def drawn(self, records: dict[int, Record], consistent: list[int], source: Source) -> dict[int, Record]:
        """The records of the images to look at again: as many of the consistent ones as the sample is to
        have, at random and in order."""
        some = [index for index in consistent if index < len(source)]
        if self.sample is not None and self.sample < len(some):
            chosen = np.random.default_rng(self.seed).choice(some, size=self.sample, replace=False)
            some = sorted(chosen.tolist())
        return {index: records[index] for index in some}


def _check_attack(
    folder: Path,
    manifests: dict[Path, Manifest],
    experiment: Experiment,
    certification: Path | None,
    given: Asked,
    found: Verification,
) -> None:
    """Check an attack by itself, beside its certification, and replay it, as far as these are given."""
    pictures, certified = Pictures(folder), experiment["certification"]
    try:
        sound = _check_experiment(experiment, ATTACK, found)
        sound = sound and _check_experiment(certified, restatement_of("certify", certified), found)
        records = read_records(manifests, ATTACK, found)
        found.images, found.certified = len(records), sum(map(ATTACK.is_certified, records.values()))
        consistent = check_lines(records, experiment, found) if sound else []
        if experiment["images"] == certified["data"]["images"]:
            check_images(records, certified, found)
        pictures.check(records, consistent, found)
        if certification is not None:
            check_certification(records, experiment, _certified(certification, found), found)
        _check_given(certified, given.model, given.source, found)
    except DAMAGED as error:
        found.add("manifest", f"is damaged ({type(error).__name__}: {brief(error, 100)})")
        return
    if given.model is not None and given.source is not None and sound:
        source = given.source.first(certified["data"]["images"])
        again = given.drawn(records, consistent, source)
        on: dict[str, Any] = {
            "model": given.model,
            "source": source,
            "device": given.device,
            "team": given.team,
        }
        replay(again, experiment, pictures, **on, found=found)


def _certified(folder: Path, found: Verification) -> tuple[Experiment, dict[int, Record]]:
    """The experiment and the lines of a certification, whose flaws are findings."""
    checked = verify(folder)
    for one in checked.findings:
        found.add(f"{folder.name}: {one.where}", one.what)
    unnoted = Verification(str(folder))  # what is wrong there is noted by now
    manifests = read_manifests(folder, unnoted)
    if checked.kind != "certify" or not manifests:
        raise ConfigError(f"records {folder}: expected a folder that certify wrote")
    experiment = _experiment(manifests, unnoted)
    found.counted = f"certified, as in {folder}"
    return experiment, read_records(manifests, restatement_of("certify", experiment), unnoted)


def _experiment(manifests: dict[Path, Manifest], found: Verification) -> Experiment:
    """The experiment of the first manifest, which must be that of all, as its kind must be."""
    first = next(iter(manifests.values()))
    found.kind, experiment = first["kind"], first["experiment"]
    for path, manifest in manifests.items():
        if manifest["kind"] != found.kind:
            found.add(path.name, f"is of {manifest['kind']}, its neighbour of {found.kind}")
        for difference in differences(manifest["experiment"], experiment)[:3]:
            found.add(path.name, f"is of another experiment than its neighbour ({difference})")
    return experiment


def _check_experiment(experiment: Experiment, restatement: Restatement, found: Verification) -> bool:
    """Check the experiment. True if nothing about it is wrong, so that its images can be looked at again."""
    before = len(found.findings)
    for flaw in _flaws(experiment, restatement):
        found.add("manifest", flaw)
    return len(found.findings) == before


def _flaws(experiment: Experiment, restatement: Restatement) -> Iterator[str]:
    if experiment["precision"] not in TOLERANCE:
        yield f"precision is {experiment['precision']!r}, expected one of {', '.join(TOLERANCE)}"
    stated = experiment.get("defense", restatement.defense)
    if stated != restatement.defense:
        yield f"defense is {stated!r}, expected {restatement.defense!r}"
    if "masks" in experiment:
        yield from mask_flaws(experiment)
    if "fill" in experiment and experiment["fill"] != _mean_of(experiment):
        yield f"fill is {experiment['fill']!r}, expected {_mean_of(experiment)}, the model's mean"
    yield from restatement.flaws(experiment)


def _mean_of(experiment: Experiment) -> list[float]:
    """The model's mean as the float32 numbers that the defense fills masked pixels with."""
    return [float(np.float32(value)) for value in experiment["model"]["mean"]]


def _check_records(
    records: dict[int, Record],
    experiment: Experiment,
    restatement: Restatement,
    least: float,
    found: Verification,
) -> list[int]:
    """Check each line by itself and all of them together.

    Returns the images whose line contradicts neither itself nor the experiment, in order.
    """
    consistent = [
        index
        for index, record in records.items()
        if check_line(Line(place(index, record["name"]), record, experiment, found), restatement)
    ]
    certified = [record for record in records.values() if restatement.is_certified(record)]
    found.images, found.below = len(records), sum(is_below(record, least) for record in certified)
    found.certified = len(certified) - found.below
    check_images(records, experiment, found)
    return sorted(consistent)


def _check_given(
    experiment: Experiment, model: Given | None, source: Source | None, found: Verification
) -> None:
    """What the folder says about the model and the data must be so of those that were given."""
    if model is not None:
        for what in _other_model(experiment, model):
            found.add("manifest", what)
    if source is not None:
        given = source.first(experiment["data"]["images"]).describe()
        for difference in differences(experiment["data"], given)[:3]:
            found.add("manifest", f"is of other data than was given: data.{difference}")


def _other_model(experiment: Experiment, model: Given) -> Iterator[str]:
    for difference in differences(experiment["model"], model.spec.model_dump(mode="json"))[:3]:
        yield f"is of another model than was given: model.{difference}"
    there, here = experiment["weights_sha256"], model.weights_sha256
    if there != here:
        stated = f"sha256 {str(there)[:12]}... there, {here[:12]}... here"
        yield f"is of other weights than were given: {stated}"
    for difference in differences(experiment["trained"], model.trained, "trained")[:3]:
        yield f"is of another training than was given: {difference}"


def _least(manifests: dict[Path, Manifest]) -> float:
    """The least margin of a certificate that counts: of the precision, or what the model was seen to move."""
    precision = next(iter(manifests.values()))["experiment"]["precision"]
    return max(LEAST_MARGIN.get(precision, inf), _stated_movement(manifests))


def _stated_movement(manifests: dict[Path, Manifest]) -> float:
    """How far margins were seen to move before it was certified. No certificate below it counts, so that who
    states a large one claims little."""
    least = 0.0
    resumed = [entry for manifest in manifests.values() for entry in manifest.get("resumed", [])]
    for attempt in (*manifests.values(), *resumed):
        environment = attempt.get("environment", {})
        for one in (environment, *environment.get("workers", [])):
            moved = one.get("network", {}).get("moved")
            if moved is not None and not is_margin(moved):
                raise ValueError(f"environment.network.moved {moved!r}")
            least = max(least, moved or 0.0)
    return least
