"""Shards as jobs of a scheduler: which one this process is, and ``--submit``, which has Slurm start them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, MachineError, ProcessError, brief

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
        raise ConfigError(f"shard auto: {scheduler} does not say how many jobs there are; give --shard auto/n")
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
class Job:
    """A shard as submitit runs it, in a process of its own; one that is preempted is queued again and goes on
    behind its last image."""

    words: tuple[str, ...]
    shard: str

    def __call__(self) -> int:
        words = [sys.executable, "-m", "certipatch", *self.words, "--shard", self.shard, "--resume"]
        return subprocess.run(words, check=False).returncode

    def checkpoint(self, *_: Any) -> Any:
        """What submitit queues again when the job was stopped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(words: list[str], jobs: int, out: Path, *, partition: str | None, gpus: int, time: str) -> list[str]:
    """Have Slurm run the command ``words`` as so many shards; the numbers of the jobs.

    With the partition "local" they are processes of this machine, for which this waits.

    Raises MachineError without submitit or Slurm, ProcessError for a local job that fails.
    """
    minutes = parse_minutes(time)
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise MachineError(
            "--submit: expected the package submitit, found none; pip install 'certipatch[slurm]'"
        ) from error
    local = partition == "local"
    if not local and shutil.which("sbatch") is None:
        raise MachineError(
            "--submit: expected Slurm (sbatch) on this machine, found none; --partition local runs the jobs here"
        )
    executor = submitit.AutoExecutor(folder=out.parent / f"{out.name}-jobs", cluster="local" if local else "slurm")
    executor.update_parameters(timeout_min=minutes, gpus_per_node=gpus, name=out.name)
    if partition and not local:
        executor.update_parameters(slurm_partition=partition)
    started = executor.map_array(Job(tuple(words), ""), []) if False else executor.map_array(
        lambda job: job(), [Job(tuple(words), f"{i + 1}/{jobs}") for i in range(jobs)]
    )
    if local:
        _wait(started, out)
    return [str(job.job_id) for job in started]


def _wait(started: list[Any], out: Path) -> None:
    for number, job in enumerate(started, start=1):
        try:
            code = job.result()
        except Exception as error:
            raise ProcessError(f"job {number}/{len(started)} has failed ({brief(error)})") from error
        if code:
            said = (job.stderr() or "").strip().splitlines()[-1:]
            raise ProcessError(f"job {number}/{len(started)} ended with exit code {code}: {''.join(said)}")


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
