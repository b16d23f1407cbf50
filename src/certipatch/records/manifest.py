"""Records: what was found, one JSON line an image, beside a manifest of how.

A folder holds ``manifest.json`` (written once at the start, once more when everything is there) and an
append-only JSON Lines file, with the hash of each line in a file beside it (``records.sha256``).
``manifest["experiment"]`` is everything that can change a result; a folder is continued only by the very same
experiment. Several processes that share the images have a pair of files each, named by their shard:
``manifest-2-of-8.json`` and ``records-2-of-8.jsonl``; together they are the folder's records, whoever wrote
them. Nothing here loads torch, so records can be read anywhere.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..config import differences
from ..errors import RecordsError
from .seals import unseal

FORMAT = 1


MANIFEST = "manifest.json"


class Expected(BaseModel):
    """What readers rely on in a manifest that anyone may have written; entries beyond it are not looked
    at."""

    model_config = ConfigDict(strict=True)


Side = Annotated[int, Field(ge=1, le=10_000)]  # pixels


Count = Annotated[int, Field(ge=0, le=10**12)]


Sides = Annotated[list[Side], Field(min_length=2, max_length=2)]


Rectangle = Annotated[
    list[Annotated[int, Field(ge=0, le=10_000)]], Field(min_length=4, max_length=4)
]  # top, left, height, width


class _Masks(Expected):
    image_size: Sides
    patch_size: Sides
    other_patch_sizes: list[Sides] = []
    patches: int = Field(default=1, ge=1, le=2)
    masks_per_axis: int = Field(ge=0, le=10_000)
    windows: list[list[Rectangle]]


class _Architecture(Expected):
    arch: str


class _Training(Expected):
    strategy: str
    epochs: Count


class _Data(Expected):
    images: Count
    fingerprint: str


class Certification(Expected):
    """The experiment of ``certify``."""

    model: _Architecture
    weights_sha256: str
    trained: _Training | None = None
    masks: _Masks
    data: _Data
    device: str
    precision: str
    inference: Literal["double-masking", "challenger"] = "double-masking"


class _Network(Expected):
    batch_size: int = Field(ge=1, le=10**6)
    compiled: bool
    shared_prefix: str | None


class TrainingRun(Expected):
    """The experiment of ``train``."""

    model: dict[str, Any]
    train: _Training


class Attack(Expected):
    """The experiment of ``attack``."""

    certification: Certification
    images: Count


EXPERIMENTS: dict[str, type[Expected]] = {
    "certify": Certification,
    "detect": Certification,
    "train": TrainingRun,
    "attack": Attack,
}


def manifest(kind: str, experiment: dict[str, Any], **environment: Any) -> dict[str, Any]:
    """A manifest of this moment: the experiment, and where and with what it is run."""
    return {
        "format": FORMAT,
        "kind": kind,
        "experiment": json.loads(json.dumps(experiment)),  # tuples become lists, as they will when read back
        "environment": {
            "versions": {name: metadata.version(name) for name in ("certipatch", "torch", "timm", "numpy")},
            "python": platform.python_version(),
            "commit": _commit(),
            "command": " ".join(["certipatch", *sys.argv[1:]]),
            **environment,
        },
        "started": now(),
        "finished": None,
    }


def _of_shard(name: str, shard: str) -> str:
    stem, dot, ending = name.partition(".")
    return f"{stem}{shard and '-'}{shard}{dot}{ending}"


def _shard_of(path: Path) -> str:
    """``manifest-2-of-8.json`` -> ``2-of-8``, ``manifest.json`` -> nothing."""
    return path.stem.partition("-")[2]


def _division(path: Path) -> str:
    """``manifest-2-of-8.json`` -> ``of-8``: the shards that share the images."""
    return _shard_of(path).partition("-")[2]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; of several shards the first, ``finished`` only if all that have begun are.

    Raises RecordsError if there is none, one is damaged or of a newer format, or they are not of one
    experiment.
    """
    found = list(read_manifests(folder).values())
    if not found:
        raise RecordsError(f"{folder}: expected a folder with {MANIFEST}, found none")
    for other in found[1:]:
        differing = differences(other["experiment"], found[0]["experiment"])
        if differing or other["kind"] != found[0]["kind"]:
            raise RecordsError(
                f"{folder}: holds shards of different experiments ({'; '.join(differing[:3])}); keep those "
                "of one"
            )
    try:
        EXPERIMENTS.get(found[0]["kind"], Expected).model_validate(found[0]["experiment"])
    except ValidationError as error:
        problem = error.errors()[0]
        what = (
            f"lacks {problem['loc'][-1]!r}"
            if problem["type"] == "missing"
            else f"is damaged ({first_problem(error)})"
        )
        raise RecordsError(
            f"{folder}: its manifest {what}; restore it or start again in another folder"
        ) from error
    finished = all(one["finished"] is not None for one in found)
    return found[0] if finished else {**found[0], "finished": None}


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, and where."""
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def read_manifests(folder: Path) -> dict[Path, dict[str, Any]]:
    """Every manifest of a folder by its path: one, or one for each shard that has begun."""
    paths = [folder / MANIFEST, *sorted(folder.glob("manifest-*-of-*.json"))]
    return {path: _read_manifest(path) for path in paths if path.exists()}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        if (
            not isinstance(found, dict)
            or not isinstance(found["experiment"], dict)
            or not isinstance(found["kind"], str)
        ):
            raise ValueError("not a manifest")
        found["finished"]
        if found["format"] != FORMAT:
            raise RecordsError(
                f"{path}: expected format {FORMAT}, found {found['format']}; use the version of certipatch "
                "that wrote it"
            )
        return unseal(found)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise RecordsError(
            f"{path}: damaged ({' '.join(str(error).split())[:100]}); restore it or start again in another "
            "folder"
        ) from error


def network_of(manifest: dict[str, Any], where: Path) -> dict[str, Any]:
    """How a certification ran its network: ``batch_size``, ``compiled``, ``shared_prefix``; empty if its
    manifest does not say.

    Raises RecordsError if what it says cannot be.
    """
    environment = manifest.get("environment")
    found = environment.get("network") if isinstance(environment, dict) else None
    if found is None:
        return {}
    try:
        return _Network.model_validate(found).model_dump()
    except ValidationError as error:
        raise RecordsError(
            f"{where}: environment.network: {first_problem(error)}; restore it or certify again"
        ) from None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """The commit of the source tree this package is run from, if it is one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", "manifest.py"], capture_output=True, check=False
        )
        answer = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return answer.stdout.strip() if tracked.returncode == 0 else None
