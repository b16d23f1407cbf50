"""Shards as jobs of a scheduler: which one this process is, and ``--submit``, which has Slurm start them."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, MachineError, ProcessError, one_line
from ..runtime.console import stdout

# By scheduler: the variables of a job's number, of the first number, of the step, and of how many there are.
JOBS = {
    "Slurm array": (
        "SLURM_ARRAY_TASK_ID",
        "SLURM_ARRAY_TASK_MIN",
        "SLURM_ARRAY_TASK_STEP",
        "SLURM_ARRAY_TASK_COUNT",
    ),
    "Kubernetes": ("JOB_COMPLETION_INDEX", "", "", ""),  # which does not tell how many there are
    "SkyPilot": ("SKYPILOT_NODE_RANK", "", "", "SKYPILOT_NUM_NODES"),
    "SkyPilot jobs": ("SKYPILOT_JOB_RANK", "", "", "SKYPILOT_NUM_JOBS"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "", "", "OMPI_COMM_WORLD_SIZE"),
    "MPI": ("PMI_RANK", "", "", "PMI_SIZE"),
    "Slurm tasks": ("SLURM_PROCID", "", "", "SLURM_NTASKS"),
}


def shard_of_job(environment: Mapping[str, str], shards: int | None = None) -> tuple[int, int]:
    """(i, n) of this process among the jobs of a scheduler, 1 <= i <= n.

    ``shards``: how many there are, where the scheduler does not say.

    Raises ConfigError where no scheduler says it, two say it otherwise, or one says another number of jobs.
    """
    found: dict[str, tuple[int, int]] = {}
    for scheduler, names in JOBS.items():
        if names[0] in environment:
            i, n = _read(scheduler, names, environment, shards)
            if n > 1 or shards == 1:  # one job alone divides nothing: others may, within it
                found[scheduler] = i, n
    if not found:
        raise ConfigError(
            f"shard auto: expected the variables of {', '.join(JOBS)}, found none of several jobs; give "
            "--shard i/n"
        )
    if len(set(found.values())) > 1:
        said = " and ".join(f"{name} says {i}/{n}" for name, (i, n) in found.items())
        raise ConfigError(f"shard auto: {said}; give --shard i/n")
    return next(iter(found.values()))


def _read(
    scheduler: str, names: tuple[str, ...], environment: Mapping[str, str], shards: int | None
) -> tuple[int, int]:
    number, first, step, count = (_number(environment, name) for name in names)
    n = count or shards
    if n is None:
        raise ConfigError(f"shard auto: {scheduler} does not say how many jobs it has; give --shard auto/n")
    i = ((number or 0) - (first or 0)) // (step or 1) + 1
    if (shards or n) != n or not 1 <= i <= n:
        stated = f"{i} of {n}"
        raise ConfigError(f"shard auto{f'/{shards}' if shards else ''}: {scheduler} says {stated}")
    return i, n


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name) if name else None
    if text is None:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{name} {text!r}: expected a number from 0 up")
    return int(text)


@dataclass(frozen=True)
class SubmitAsked:
    """What ``--submit``, ``--partition``, ``--gpus`` and ``--time`` ask for.

    Raises ConfigError for any of the others without the first.
    """

    jobs: int | None
    partition: str | None
    gpus: int | None
    time: str | None

    def __post_init__(self) -> None:
        if self.jobs is None and (self.partition, self.gpus, self.time) != (None, None, None):
            raise ConfigError("--partition, --gpus and --time: expected --submit with them")


class Job:
    """A shard as submitit runs it, in a process of its own; one that is preempted is queued again and goes on
    behind its last image."""

    def __init__(self, words: list[str], shard: str) -> None:
        self.words = [sys.executable, "-m", "certipatch", *words, "--shard", shard, "--resume"]

    def __call__(self) -> None:
        code = subprocess.run(self.words, check=False).returncode
        if code:
            raise RuntimeError(f"certipatch has ended with exit code {code}")

    def checkpoint(self) -> Any:
        """What submitit queues again when the job was stopped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(asked: SubmitAsked, words: list[str], out: Path) -> None:
    """Have Slurm run the command ``words`` in shards; with the partition "local", processes of this machine,
    for which this waits.

    Raises MachineError without submitit or Slurm, ProcessError for a local job that fails.
    """
    minutes, jobs = parse_minutes(asked.time or "2h"), asked.jobs or 1
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise MachineError(
            "--submit: expected the package submitit, found none; pip install 'certipatch[slurm]'"
        ) from error
    local = asked.partition == "local"
    if not local and shutil.which("sbatch") is None:
        raise MachineError(
            "--submit: expected Slurm (sbatch) on this machine, found none; with --partition local the jobs "
            "run here"
        )
    folder = out.parent / f"{out.name}-jobs"
    executor = submitit.AutoExecutor(folder=folder, cluster="local" if local else "slurm")
    gpus = 1 if asked.gpus is None else asked.gpus
    partition = {"slurm_partition": asked.partition} if asked.partition and not local else {}
    executor.update_parameters(name=out.name, timeout_min=minutes, gpus_per_node=gpus, **partition)
    with executor.batch():
        started = [executor.submit(Job(words, f"{i}/{jobs}")) for i in range(1, jobs + 1)]
    if local:
        _wait(started)
    _say(started, "done" if local else "submitted", folder, out)


def _say(started: list[Any], done: str, folder: Path, out: Path) -> None:
    jobs = len(started)
    numbers = ", ".join(str(job.job_id) for job in started[:3]) + (" ..." if jobs > 3 else "")
    stdout.print(f"{done}: {jobs} jobs ({numbers}); what they say: {folder}", markup=False, soft_wrap=True)
    stdout.print(f"next: {shlex.join(['certipatch', 'report', str(out)])}", markup=False, soft_wrap=True)


def _wait(started: list[Any]) -> None:
    for number, job in enumerate(started, start=1):
        if job.exception() is None:
            continue
        lines = [line for line in (job.stderr() or "").splitlines() if line.startswith("certipatch")]
        said = one_line(lines[-1]) if lines else f"see {job.paths.stderr}"
        raise ProcessError(f"job {number}/{len(started)} has failed: {said}")


def jobs_asked(asked: SubmitAsked, out: Path) -> bool:
    """Submit this process's own command, if that was asked for; whether it was."""
    if asked.jobs is not None:
        submit(asked, words_of_job(sys.argv[1:]), out)
    return asked.jobs is not None


def words_of_job(words: list[str]) -> list[str]:
    """The words of a command without those that say how it is submitted."""
    left, drop = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        if drop or name in ("--submit", "--partition", "--gpus", "--time"):
            drop = not drop and not equals
        else:
            left.append(word)
    return left


def parse_minutes(text: str) -> int:
    """``90``, ``2h``, ``1d`` or ``02:30:00`` -> minutes, rounded up."""
    units = {"m": 1, "h": 60, "d": 1440}
    try:
        if ":" in text:
            hours, minutes, *seconds = (int(part) for part in text.split(":"))
            found = hours * 60 + minutes + (sum(seconds) > 0)
        else:
            found = int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)
    except ValueError:
        found = 0
    if found < 1:
        raise ConfigError(f"time {text!r}: expected minutes, 2h, 1d or 02:30:00")
    return found
