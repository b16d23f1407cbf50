"""The manifest of a folder: what was run, with what, where and when.

A folder holds ``manifest.json`` (written once at the start, once more when everything is there) beside its
JSON Lines file. Its *experiment* is everything that can change a result; a folder is continued only by the
very same experiment. Several processes that share the images have a pair of files each, named by their shard:
``manifest-2-of-8.json`` and ``records-2-of-8.jsonl``; together they are the folder's records, whoever wrote
them.
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ..config import ROUNDING, differences, parse_json, versions
from ..errors import RecordsError, brief
from .experiment import (
    Attack,
    Certification,
    Expected,
    NetworkUsed,
    TrainingRun,
    expected_of,
)
from .seals import unseal

FORMAT = 1
MANIFEST = "manifest.json"
E = TypeVar("E", bound=Expected)


@dataclass(frozen=True)
class Manifest:
    """What a folder says of itself, read once and handed on.

    Attributes:
        folder: where it was read.
        kind: what wrote the folder: ``train``, ``certify``, ``detect`` or ``attack``.
        experiment: the checked experiment. ``stated``: the same as JSON, to compare it with another.
        finished: what the writer noted at the end (``at``, ``lines``, ``sha256`` ...); None while the folder,
            or one of its shards, is not complete.
        files: what each manifest file of the folder holds; several for shards.
    """

    folder: Path
    kind: str
    experiment: Expected
    stated: dict[str, Any]
    finished: dict[str, Any] | None
    files: Mapping[Path, dict[str, Any]]

    @property
    def certification(self) -> Certification:
        """The experiment of ``certify`` or ``detect``. Raises RecordsError for a folder of another kind."""
        return self._experiment(Certification, "certify")

    @property
    def training(self) -> TrainingRun:
        """The experiment of ``train``. Raises RecordsError for a folder of another kind."""
        return self._experiment(TrainingRun, "train")

    @property
    def attack(self) -> Attack:
        """The experiment of ``attack``. Raises RecordsError for a folder of another kind."""
        return self._experiment(Attack, "attack")

    def _experiment(self, kind: type[E], name: str) -> E:
        if not isinstance(self.experiment, kind):
            raise RecordsError(f"{self.folder}: expected a folder of {name}, found one of {self.kind}")
        return self.experiment

    @property
    def defense(self) -> str:
        """The name of the certified defense. A folder of ``detect`` is of Minority Reports."""
        return "minority-reports" if self.kind == "detect" else self.certification.defense

    @cached_property
    def written(self) -> dict[str, Any]:
        """The manifest as it was written; of several shards the first."""
        return next(iter(self.files.values()))

    @property
    def data(self) -> str:
        """How the data set was called; empty if the manifest does not say."""
        return str(self.written.get("data") or "")

    @property
    def started(self) -> str:
        """When the run began, in ISO format; "?" if the manifest does not say."""
        return str(self.written.get("started", "?"))

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, machine, command ...: what is shown and not relied on."""
        return _dict(self.written.get("environment"))

    @cached_property
    def other_environments(self) -> list[str]:
        """In what the environments of shards and resumes differ: ``["torch 2.12.0 or 2.13.0", ...]``.

        Nothing of this is part of the experiment: it can change rounding only.
        """
        found = [_flat(one) for written in self.files.values() for one in _attempts(written)]
        names = dict.fromkeys(name for one in found for name in one)
        values = {name: list(dict.fromkeys(one.get(name, "not stated") for one in found)) for name in names}
        return [
            f"{name.replace('_', ' ')} {' or '.join(each[:4])}{' or others' if len(each) > 4 else ''}"
            for name, each in values.items()
            if len(each) > 1
        ]

    @property
    def network(self) -> dict[str, Any]:
        """How a certification ran its network: ``batch_size``, ``compiled``, ``shared_prefix``.

        Empty if the manifest does not say. Raises RecordsError if what it says cannot be.
        """
        return network_in(self.folder, self.written)

    @property
    def rounding(self) -> float:
        """The least margin, in logits, of a certificate that is counted by default: what rounding moves less.

        That is ``ROUNDING`` of the precision; or more, where the model's own margins were seen to move more
        before it was certified. Raises RecordsError for a precision that nothing is certified in.
        """
        precision = self.certification.precision
        if precision not in ROUNDING:
            known = ", ".join(ROUNDING)
            raise RecordsError(f"{self.folder}: precision {precision!r}: expected {known}; certify again")
        attempts = (attempt for written in self.files.values() for attempt in _attempts(written))
        moved = (network_in(self.folder, {"environment": attempt}).get("moved") for attempt in attempts)
        return max(ROUNDING[precision], *(each or 0.0 for each in moved))

    @property
    def command(self) -> str:
        """The command line that began the run."""
        return str(self.environment.get("command", ""))

    @property
    def seconds(self) -> float | None:
        """Seconds from the start to the end of the run, pauses before a resume included; None if it is not
        known."""
        ends = _dict(self.written["finished"]).get("at"), self.written.get("started")
        try:
            end, start = (datetime.fromisoformat(at) for at in ends)  # type: ignore[arg-type]
            return (end - start).total_seconds()
        except (TypeError, ValueError):
            return None

    @property
    def line_hashes(self) -> list[str]:
        """The sha256 of the lines of each shard as its manifest states it; "?" where it is not finished."""
        return [str(_dict(one["finished"]).get("sha256", "?")) for one in self.files.values()]


def begin_manifest(kind: str, experiment: dict[str, Any], **environment: Any) -> dict[str, Any]:
    """A manifest of this moment, as it is written: the experiment, and where and with what it is run."""
    return {
        "format": FORMAT,
        "kind": kind,
        "experiment": json.loads(json.dumps(experiment)),  # tuples become lists, as they will when read back
        "environment": {
            "versions": versions(),
            "python": platform.python_version(),
            "commit": _commit(),
            "command": shlex.join(["certipatch", *sys.argv[1:]]),
            **environment,
        },
        "started": now(),
        "finished": None,
    }


def with_worker(manifest: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the environment of one more worker of the attempt under way."""
    *earlier, attempt = [manifest, *_list(manifest.get("resumed"))]
    here = _dict(attempt.get("environment"))
    attempt = {**attempt, "environment": {**here, "workers": [*_list(here.get("workers")), environment]}}
    return {**manifest, "resumed": [*earlier[1:], attempt]} if earlier else attempt


def resumed(manifest: dict[str, Any], here: dict[str, Any], lines: int) -> dict[str, Any]:
    """A manifest with an entry for the attempt that goes on here, in the environment of the manifest
    ``here``, behind so many lines."""
    entry = {"at": here["started"], "lines": lines, "environment": here["environment"]}
    return {**manifest, "resumed": [*_list(manifest.get("resumed")), entry]}


def of_shard(name: str, shard: str) -> str:
    """``manifest.json``, ``2-of-8`` -> ``manifest-2-of-8.json``."""
    stem, dot, ending = name.partition(".")
    return f"{stem}{shard and '-'}{shard}{dot}{ending}"


def shard_of(path: Path) -> str:
    """``manifest-2-of-8.json`` -> ``2-of-8``, ``manifest.json`` -> nothing."""
    return path.stem.partition("-")[2]


def division_of(path: Path) -> str:
    """``manifest-2-of-8.json`` -> ``of-8``: the shards that share the images."""
    return shard_of(path).partition("-")[2]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; of several shards the first, ``finished`` only if all that have begun are.

    Raises RecordsError if there is none, one is damaged or of a newer format, or they are not of one
    experiment.
    """
    files = read_manifest_files(folder)
    if not files:
        raise RecordsError(f"{folder}: expected a folder with {MANIFEST}, found none")
    first, *others = files.values()
    for other in others:
        differing = differences(other["experiment"], first["experiment"])
        if differing or other["kind"] != first["kind"]:
            found = "; ".join(differing[:3])
            raise RecordsError(
                f"{folder}: holds shards of different experiments ({found}); keep those of one"
            )
    return Manifest(
        folder=folder,
        kind=first["kind"],
        experiment=_checked(folder, first["kind"], first["experiment"]),
        stated=first["experiment"],
        finished=first["finished"] if all(one["finished"] is not None for one in files.values()) else None,
        files=files,
    )


def _checked(folder: Path, kind: str, stated: dict[str, Any]) -> Expected:
    try:
        return expected_of(kind, stated).model_validate(stated)
    except ValidationError as error:
        problem = error.errors()[0]
        lacks = problem["type"] == "missing"
        what = f"lacks {problem['loc'][-1]!r}" if lacks else f"is damaged ({first_problem(error)})"
        raise RecordsError(
            f"{folder}: its manifest {what}; restore it or start again in another folder"
        ) from error


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, and where."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def holds_manifest(folder: Path) -> bool:
    """Whether a folder has a manifest, or those of some shards."""
    return any(folder.glob("manifest*.json"))


def folders_inside(folder: Path) -> list[Path]:
    """The folders of records in a folder that is none itself, as certify writes them for several patches or
    k."""
    if holds_manifest(folder):
        return []
    return sorted({path.parent for path in folder.glob("*/manifest*.json")})


def read_manifest_files(folder: Path) -> dict[Path, dict[str, Any]]:
    """Every manifest of a folder, as it was written, by its path: one, or one for each shard that has
    begun."""
    paths = [folder / MANIFEST, *sorted(folder.glob("manifest-*-of-*.json"))]
    return {path: read_manifest_file(path) for path in paths if path.exists()}


def read_manifest_file(path: Path) -> dict[str, Any]:
    """One manifest as it was written. Raises RecordsError if it is damaged, changed or of another format."""
    try:
        found = _manifest_in(path.read_bytes())
        if found["format"] != FORMAT or type(found["format"]) is not int:
            raise RecordsError(
                f"{path}: expected format {FORMAT}, found {found['format']}; use the version of certipatch "
                "that wrote it"
            )
        return unseal(found)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise RecordsError(
            f"{path}: damaged ({brief(error, 100)}); restore it or start again in another folder"
        ) from error


def _manifest_in(data: bytes) -> dict[str, Any]:
    found = parse_json(data)
    shape = {"experiment": dict, "kind": str}
    if not isinstance(found, dict) or not all(isinstance(found[key], kind) for key, kind in shape.items()):
        raise ValueError("not a manifest")
    found["finished"]  # raises KeyError where it is missing
    return found


def network_used(folder: Path, shard: str = "") -> dict[str, Any]:
    """How the attempt that wrote a shard ran its network, if there was one: see :attr:`Manifest.network`."""
    path = folder / of_shard(MANIFEST, shard)
    return network_in(folder, read_manifest_file(path)) if path.exists() else {}


def network_in(folder: Path, written: dict[str, Any]) -> dict[str, Any]:
    """How the network was run that a manifest, as it was written, is about: see :attr:`Manifest.network`."""
    found = _dict(written.get("environment")).get("network")
    if found is None:
        return {}
    try:
        return NetworkUsed.model_validate(found).model_dump()
    except ValidationError as error:
        raise RecordsError(
            f"{folder}: environment.network: {first_problem(error)}; restore it or certify again"
        ) from None


def _dict(value: Any) -> dict[str, Any]:
    """What a manifest says beside its experiment is shown, not relied on."""
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _attempts(written: dict[str, Any]) -> list[dict[str, Any]]:
    """The environment of each attempt at the lines of one manifest, but of those that wrote none."""
    later = [_dict(entry) for entry in _list(written.get("resumed"))]
    starts = [0, *(entry.get("lines") for entry in later), None]
    environments = [_dict(one.get("environment")) for one in (written, *later)]
    return [
        one
        for environment, (start, end) in zip(environments, pairwise(starts), strict=True)
        if start != end or written["kind"] == "train"  # whose steps come before its lines
        for one in _workers(environment)
    ]


def _workers(environment: dict[str, Any]) -> list[dict[str, Any]]:
    """The environment of each worker that an attempt had; its own if it had none."""
    return [_dict(one) for one in _list(environment.get("workers"))] or [environment]


def _flat(environment: dict[str, Any]) -> dict[str, str]:
    """Each entry that can change rounding, as text by its name."""
    nested = [value for value in environment.values() if isinstance(value, dict)]
    entries = {key: value for part in (environment, *nested) for key, value in part.items()}
    drop = ("command", "versions", "network", "pairs_pasted", "moved")
    return {str(key): brief(value, 60) for key, value in entries.items() if key not in drop}


def now() -> str:
    """This moment in UTC, in ISO format to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """The commit of the source tree that this package is run from, if it is one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", "manifest.py"], capture_output=True, check=False
        )
        asked = [*git, "rev-parse", "HEAD"]
        answer = subprocess.run(asked, capture_output=True, encoding="utf-8", check=False)
    except OSError:  # there is no git on this machine
        return None
    return answer.stdout.strip() if tracked.returncode == 0 else None
