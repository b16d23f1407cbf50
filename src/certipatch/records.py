"""Records: what was found, one JSON line an image, beside a manifest of how.

A folder holds ``manifest.json`` (written once at the start, once more when everything is there) and an append-only
JSON Lines file, with the hash of each line in a file beside it (``records.sha256``). ``manifest["experiment"]`` is everything that can
change a result; a folder is continued only by the very same experiment. Several processes that share the images have a pair of files each, named by their shard:
``manifest-2-of-8.json`` and ``records-2-of-8.jsonl``; together they are the folder's records, whoever wrote them.
Nothing here loads torch, so records can be read anywhere.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, Self, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .config import Frozen, differences
from .errors import RecordsError
from .seals import LineHashes, seal, sha256, unseal, write_through

FORMAT = 1
MANIFEST = "manifest.json"
RECORDS = "records.jsonl"
T = TypeVar("T")


class Record(Frozen):
    """One image: :class:`certipatch.defense.Verdict` with the image's place, name and hash.

    ``pixels`` is the sha256 of the (3, H, W) uint8 tensor the model saw. An unreadable image has an ``error``,
    no labels of ours, and counts as not certified, not correct.
    """

    index: int = Field(ge=0)
    name: str
    label: int = Field(ge=0)
    pixels: str | None
    vanilla_label: int | None
    defended_label: int | None
    case: Literal["agreed", "disagreer", "majority", "champion"] | None
    certified: bool
    failing_pair: tuple[int, int] | None
    failing_label: int | None
    margin: float | None
    passes: int = Field(ge=0)
    error: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """A certificate implies that every one-mask label, and so the defended one, is the true label."""
        flawless = self.failing_pair is None and self.failing_label is None and self.error is None
        looked_at = self.pixels is not None and self.margin is not None and self.margin >= 0
        right = self.defended_label == self.label and self.case == "agreed" and flawless and looked_at
        if self.certified and not right:
            raise ValueError("certified, but its other fields say it is not")
        return self


class DetectionRecord(Frozen):
    """One image: :class:`certipatch.detection.Detection` with the image's place, name and hash, for every threshold at once.

    ``agreement``: the smallest one-mask confidence if all one-mask labels are the true one, else None; certified at every threshold
    below it. ``dissent``: the largest confidence of a one-mask label other than ``vanilla_label``, else None; an alarm at every
    threshold below it. An unreadable image has an ``error`` and neither; it counts as wrong and as not certified.
    """

    index: int = Field(ge=0)
    name: str
    label: int = Field(ge=0)
    pixels: str | None
    vanilla_label: int | None
    agreement: float | None = Field(ge=0, le=1)
    dissent: float | None = Field(ge=0, le=1)
    passes: int = Field(ge=0)
    error: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """If all one-mask labels are the true one, they dissent from F(x) all or none; if not, some dissent from an F(x) that is right."""
        if self.error is not None:
            possible = self.agreement is None and self.dissent is None and self.vanilla_label is None
        elif self.vanilla_label is None:
            possible = False
        elif self.agreement is None:
            possible = self.dissent is not None or self.vanilla_label != self.label
        elif self.vanilla_label == self.label:
            possible = self.dissent is None
        else:
            possible = self.dissent is not None and self.dissent >= self.agreement
        if not possible:
            raise ValueError("agreement and dissent cannot both be so")
        return self


R = TypeVar("R", Record, DetectionRecord)


class Expected(BaseModel):
    """What readers rely on in a manifest that anyone may have written; entries beyond it are not looked at."""

    model_config = ConfigDict(strict=True)


Side = Annotated[int, Field(ge=1, le=10_000)]  # pixels
Count = Annotated[int, Field(ge=0, le=10**12)]


Sides = Annotated[list[Side], Field(min_length=2, max_length=2)]
Rectangle = Annotated[list[Annotated[int, Field(ge=0, le=10_000)]], Field(min_length=4, max_length=4)]  # top, left, height, width


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


EXPERIMENTS: dict[str, type[Expected]] = {"certify": Certification, "detect": Certification, "train": TrainingRun, "attack": Attack}


class Store:
    """The one writer of a manifest and its lines in a folder: append-only, locked, resumable.

    Use as a context manager. Each :meth:`append` is on disk when it returns; a line torn by a kill is dropped on
    resume. Raises RecordsError when the folder is of another experiment, in use, damaged or not writable.

    Args:
        lines: name of the JSON Lines file.
        shard: ``"2-of-8"`` for one of several writers that share the folder, else "" for its only one.
        resume: continue what is there.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], lines: str, *, shard: str = "", resume: bool = False) -> None:
        self.folder, self.manifest, self._shard, self._resume = folder, manifest, shard, resume
        self.path = folder / _of_shard(lines, shard)
        self._hashes = LineHashes(self.path)
        self._manifest_path = folder / _of_shard(MANIFEST, shard)

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock_of(self._shard)
            self._lock.acquire()
        except Timeout:
            raise self._in_use() from None
        except OSError as error:
            raise RecordsError(
                f"out {self.folder}: not a folder that can be written ({error.strerror or error}); choose another --out"
            ) from error
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise
        return self

    def _open(self) -> None:
        mine = self._manifest_path.exists()
        if not mine and self.path.exists():
            raise RecordsError(f"out {self.folder}: has {self.path.name} but no {self._manifest_path.name}; choose another --out")
        if not mine:  # written before looking at the others: of two who begin at once, at least one sees the other
            self.write_manifest()
        try:
            self._compare(began=mine)
            if mine:
                self.manifest = _read_manifest(self._manifest_path)
                unfinished = self.manifest["finished"] is None
                self.lines = read_lines(self.path, repair=unfinished)
                _check_written(self.manifest, self.path)
                if unfinished:
                    _guard(self.folder, lambda: self._hashes.cut(len(self.lines)))
            else:
                self.lines = []
            _guard(self.folder, self.path.touch)
        except BaseException:
            if not mine:
                self._manifest_path.unlink()
            raise

    def _compare(self, *, began: bool) -> None:
        """Refuse another experiment, an earlier attempt without ``resume``, and another division that is being written."""
        earlier = began
        for path, found in read_manifests(self.folder).items():
            differing = differences(found["experiment"], self.manifest["experiment"])
            if differing:
                # Other windows follow from another patch or k, and are long.
                differing = [line for line in differing if not line.startswith("masks.windows")] or differing
                raise RecordsError(
                    f"out {self.folder}: holds another experiment ({'; '.join(differing[:3])}); choose another --out or the same options"
                )
            if _division(path) != _division(self._manifest_path):
                earlier = True
                try:
                    # Longer than another process needs to look, shorter than it needs to work.
                    with self._lock_of(_shard_of(path), timeout=2):
                        pass
                except Timeout:
                    raise self._in_use() from None
        if earlier and not self._resume:
            raise RecordsError(f"out {self.folder}: holds this experiment already; continue it with --resume or choose another --out")

    def _lock_of(self, shard: str, timeout: float = 0) -> FileLock:
        return FileLock(self.folder / f".lock{shard and '-'}{shard}", timeout=timeout)

    def _in_use(self) -> RecordsError:
        return RecordsError(f"out {self.folder}: another process is writing there; wait for it or choose another --out")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write lines and force them to disk."""
        new = list(lines)
        data = [json.dumps(line, allow_nan=False).encode() + b"\n" for line in new]

        def write() -> None:
            self._hashes.append(data)
            write_through(self.path, b"".join(data), append=True)

        _guard(self.folder, write)
        self.lines += new

    def finish(self, **facts: Any) -> None:
        """Mark the folder as complete: number of lines and their hash, besides ``facts``; once is enough.

        Raises RecordsError if the lines are not those that were written.
        """
        if self.manifest["finished"] is not None and self.manifest["finished"]["lines"] == len(self.lines):
            return
        _check_written(self.manifest, self.path)
        finished = {"at": now(), "lines": len(self.lines), "sha256": sha256(self.path.read_bytes()), **facts}
        self.manifest = {**self.manifest, "finished": finished}
        self.write_manifest()

    def write_manifest(self) -> None:
        write_atomically(self._manifest_path, json.dumps(seal(self.manifest), indent=2).encode() + b"\n")


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

    Raises RecordsError if there is none, one is damaged or of a newer format, or they are not of one experiment.
    """
    found = list(read_manifests(folder).values())
    if not found:
        raise RecordsError(f"{folder}: expected a folder with {MANIFEST}, found none")
    for other in found[1:]:
        differing = differences(other["experiment"], found[0]["experiment"])
        if differing or other["kind"] != found[0]["kind"]:
            raise RecordsError(f"{folder}: holds shards of different experiments ({'; '.join(differing[:3])}); keep those of one")
    try:
        EXPERIMENTS.get(found[0]["kind"], Expected).model_validate(found[0]["experiment"])
    except ValidationError as error:
        problem = error.errors()[0]
        what = f"lacks {problem['loc'][-1]!r}" if problem["type"] == "missing" else f"is damaged ({first_problem(error)})"
        raise RecordsError(f"{folder}: its manifest {what}; restore it or start again in another folder") from error
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
        if not isinstance(found, dict) or not isinstance(found["experiment"], dict) or not isinstance(found["kind"], str):
            raise ValueError("not a manifest")
        found["finished"]
        if found["format"] != FORMAT:
            raise RecordsError(f"{path}: expected format {FORMAT}, found {found['format']}; use the version of certipatch that wrote it")
        return unseal(found)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise RecordsError(
            f"{path}: damaged ({' '.join(str(error).split())[:100]}); restore it or start again in another folder"
        ) from error


def network_of(manifest: dict[str, Any], where: Path) -> dict[str, Any]:
    """How a certification ran its network: ``batch_size``, ``compiled``, ``shared_prefix``; empty if its manifest does not say.

    Raises RecordsError if what it says cannot be.
    """
    environment = manifest.get("environment")
    found = environment.get("network") if isinstance(environment, dict) else None
    if found is None:
        return {}
    try:
        return _Network.model_validate(found).model_dump()
    except ValidationError as error:
        raise RecordsError(f"{where}: environment.network: {first_problem(error)}; restore it or certify again") from None


def read_lines(path: Path, *, repair: bool = False) -> list[dict[str, Any]]:
    """The complete lines of a JSON Lines file; with ``repair`` a last line without its end is cut off the file.

    Raises RecordsError naming the first line that is damaged.
    """
    if not path.exists():
        return []
    data = _guard(path.parent, path.read_bytes)
    complete = data.rfind(b"\n") + 1
    if repair and complete < len(data):
        _guard(path.parent, lambda: os.truncate(path, complete))
    lines = []
    for number, line in enumerate(data[:complete].split(b"\n")[:-1], start=1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            raise RecordsError(
                f"{path}, line {number}: damaged ({' '.join(str(error).split())[:80]}); restore the file or start again in another folder"
            ) from error
        lines.append(value)
    return lines


def read_records(folder: Path) -> list[Record]:
    """All records of a certification, as :func:`read_images` gives them."""
    return read_images(folder, Record)


def read_images(folder: Path, kind: type[R]) -> list[R]:
    """All records of one kind, of all shards, in the order of their index.

    What was changed since it was written is refused.

    Raises RecordsError for a damaged or changed line, an image that occurs twice, or lines without their manifest.
    """
    manifests = read_manifests(folder)
    known = {folder / _of_shard(RECORDS, _shard_of(path)): manifest for path, manifest in manifests.items()}
    for path in folder.glob("records*.jsonl"):
        if path not in known:
            raise RecordsError(f"{path}: expected its manifest beside it, found none; copy both or remove it")
    records: dict[int, R] = {}
    for path, manifest in known.items():
        for number, line in enumerate(read_lines(path), start=1):
            try:
                record = kind.model_validate_json(json.dumps(line))
            except ValidationError as error:
                raise RecordsError(f"{path}, line {number}: {first_problem(error)}") from error
            if record.index in records:
                raise RecordsError(f"{path}, line {number}: image {record.index} occurs twice; keep one of the lines")
            records[record.index] = record
        _check_written(manifest, path)
    return [records[index] for index in sorted(records)]


def read_written(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of the only writer of a folder. Raises RecordsError if they are not what it wrote."""
    lines = read_lines(folder / name)
    _check_written(_read_manifest(folder / MANIFEST), folder / name)
    return lines


def _check_written(manifest: dict[str, Any], lines: Path) -> None:
    """Refuse lines that are not those that were written: a finished writer stated the hash of all, one under way that of each."""
    data = _guard(lines.parent, lines.read_bytes) if lines.exists() else b""
    if (finished := manifest["finished"]) is None:
        if data and not (hashes := LineHashes(lines).path).exists():
            raise RecordsError(
                f"{lines}: expected {hashes.name} with the hash of each line beside it, found none; copy both or start again"
            )
        if (number := _guard(lines.parent, lambda: LineHashes(lines).first_changed(data))) is not None:
            raise RecordsError(
                f"{lines}, line {number}: is not what was written (by {LineHashes(lines).path.name}); "
                "restore the file or start again in another folder"
            )
        return
    try:
        expected = finished["lines"], finished["sha256"]
    except (KeyError, TypeError) as error:
        raise RecordsError(f"{lines.parent}: its manifest lacks {error}; restore it or start again in another folder") from error
    found = (data.count(b"\n"), sha256(data))
    if found != expected:
        raise RecordsError(
            f"{lines}: is not what was written ({found[0]} lines found, {expected[0]} written); restore it or start again in another folder"
        )


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step, so that a kill leaves the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def write() -> None:
        try:
            write_through(temporary, data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    _guard(path.parent, write)


def _guard(folder: Path, action: Callable[[], T]) -> T:
    """Turn a full disk and the like into one line that says what is safe."""
    try:
        return action()
    except OSError as error:
        raise RecordsError(
            f"{folder}: {error.strerror or error}; lines written before are kept, free some space and use --resume"
        ) from error


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _commit() -> str | None:
    """The commit of the source tree this package is run from, if it is one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", "records.py"], capture_output=True, check=False)
        answer = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return answer.stdout.strip() if tracked.returncode == 0 else None
