"""The themes ``memory`` and ``scaling``: whole ``certify`` commands, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..errors import ProcessError
from ..geometry.masks import MaskSet
from ..records.read import read_records
from ..records.store import BLOCK
from .case import Case
from .rounds import quotients, row

# Runs the command in its arguments, and prints its peak memory. The peak of a process is counted from its
# parent's at the start, so this small process stands between.
LAUNCHER = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)


def memory(case: Case) -> dict[str, Any]:
    """The peak memory for one image under few masks, for one image under all, and for all images.

    On a CPU it is that of a fresh process, on a GPU that of tensors.
    """
    most, on_gpu = case.masks.masks_per_axis, case.fabric.device.type == "cuda"
    measure = _peak_on_gpu if on_gpu else _peak_of_a_process
    sizes = [(1, min(2, most)), (1, most), (len(case.source), most)]
    found = {f"certify, images: {images}, k: {k}": measure(case, images, k) for images, k in sizes}
    least = next(iter(found.values()))
    of_process = "peak resident memory of a fresh process, Python and torch included"
    return {
        "rows": [row(what, "GiB", [peak], None, [peak / least]) for what, peak in found.items()],
        "notes": ["peak of the tensors on the GPU" if on_gpu else of_process],
    }


def _peak_on_gpu(case: Case, images: int, masks_per_axis: int) -> float:
    """The peak of tensors on the GPU, in GiB, while so many images are certified."""
    image_size = case.masks.image_size
    masks = MaskSet.covering(**case.masks.threat, image_size=image_size, masks_per_axis=masks_per_axis)
    defense = replace(case, masks=masks).defense()
    torch.cuda.reset_peak_memory_stats()
    defense.certify(case.data[0][:images], case.data[1][:images])
    return torch.cuda.max_memory_allocated() / 2**30


def _peak_of_a_process(case: Case, images: int, masks_per_axis: int) -> float:
    """The peak resident memory, in GiB, of a process that certifies so many images."""
    options = {**case.options, "limit": images, "masks-per-axis": masks_per_axis}
    return certify_in_a_process(options).peak


def scaling(case: Case) -> dict[str, Any]:
    """``certify`` on one and on two devices, as whole commands.

    On a CPU a device is a process; two of them have half of the threads each.
    """
    n = len(case.source)
    found: dict[int, list[Certified]] = {1: [], 2: []}
    for _ in range(case.repeats):
        for devices, rounds in found.items():
            options = {**case.options, "devices": devices}
            rounds.append(certify_in_a_process(options, threads=_threads_each(case, devices)))
    seconds = {devices: [one.seconds for one in rounds] for devices, rounds in found.items()}
    passes = {devices: rounds[0].passes for devices, rounds in found.items()}
    few = ", all dealt to one process: raise --limit" if n <= BLOCK else ""
    return {
        "rows": [
            row(
                f"certify --devices {devices}",
                "s/image",
                [s / n for s in of_all],
                passes[devices],
                quotients(seconds[1], of_all),
            )
            for devices, of_all in seconds.items()
        ],
        "notes": [f"whole commands with their start, {n} images{few}"],
    }


def _threads_each(case: Case, processes: int) -> int | None:
    """The threads that each process on a CPU gets; None on a GPU, where torch decides."""
    on_cpu = case.fabric.device.type == "cpu"
    return max(1, torch.get_num_threads() // processes) if on_cpu else None


@dataclass(frozen=True)
class Certified:
    """What a ``certify`` command took: seconds, peak memory (GiB), and forward passes for an image."""

    seconds: float
    peak: float
    passes: float


def certify_in_a_process(options: dict[str, Any], threads: int | None = None) -> Certified:
    """Run ``certipatch certify`` with these options; True stands for an option without a value."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "certified"
        command = [sys.executable, "-m", "certipatch", "certify", *_words(options), "--out", str(out)]
        seconds, peak = in_a_process(command, threads)
        records = read_records(out)
    return Certified(seconds, peak, sum(record.passes for record in records) / len(records))


def _words(options: dict[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        yield f"--{name}"
        if value is not True:
            yield str(value)


def in_a_process(command: Sequence[str], threads: int | None = None) -> tuple[float, float]:
    """Seconds and peak resident memory (GiB) of a command. Raises ProcessError if it fails."""
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *command],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        last_line = (done.stderr.splitlines() or [""])[-1]
        raise ProcessError(f"{' '.join(command[1:4])}: ended with code {done.returncode}: {last_line}")
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, int(done.stdout.split()[-1]) * unit / 2**30
