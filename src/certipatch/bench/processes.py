"""TODO."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..errors import ProcessError
from ..geometry.masks import MaskSet
from ..records.read import read_records
from .case import Case
from .rounds import _quotients, row


def memory(case: Case) -> dict[str, Any]:
    """The peak for one image under few masks, one image, and all: of a fresh process on a CPU, of tensors on
    a GPU."""
    k, cuda, found = case.masks.masks_per_axis, case.fabric.device.type == "cuda", {}
    for images, masks_per_axis in [(1, min(2, k)), (1, k), (len(case.source), k)]:
        if cuda:
            fine = MaskSet.covering(
                **case.masks.threat, image_size=case.masks.image_size, masks_per_axis=masks_per_axis
            )
            defense = replace(case, masks=fine).defense()
            torch.cuda.reset_peak_memory_stats()
            defense.certify(case.data[0][:images], case.data[1][:images])
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            _, peak, _ = certify_in_a_process(
                {**case.options, "limit": images, "masks-per-axis": masks_per_axis}
            )
        found[f"certify, images: {images}, k: {masks_per_axis}"] = peak
    least = next(iter(found.values()))
    notes = [
        "peak of the tensors on the GPU"
        if cuda
        else "peak resident memory of a fresh process, Python and torch included"
    ]
    return {
        "rows": [row(what, "GiB", [peak], None, [peak / least]) for what, peak in found.items()],
        "notes": notes,
    }


def scaling(case: Case) -> dict[str, Any]:
    """``certify`` on one and on two devices: whole commands. On a CPU, two processes have half of the threads
    each."""
    cpu, threads, n = case.fabric.device.type == "cpu", torch.get_num_threads(), len(case.source)
    found: dict[int, list[tuple[float, float, float]]] = {1: [], 2: []}
    for _ in range(case.repeats):
        for devices, rounds in found.items():
            options = {**case.options, "devices": devices}
            rounds.append(certify_in_a_process(options, threads=max(1, threads // devices) if cpu else None))
    seconds = {devices: [one[0] for one in rounds] for devices, rounds in found.items()}
    notes = [
        f"whole commands with their start, {n} images"
        + (", all dealt to one process: raise --limit" if n <= 32 else "")
    ]
    return {
        "rows": [
            row(
                f"certify --devices {d}",
                "s/image",
                [s / n for s in seconds[d]],
                rounds[0][2],
                _quotients(seconds[1], seconds[d]),
            )
            for d, rounds in found.items()
        ],
        "notes": notes,
    }


def certify_in_a_process(options: dict[str, Any], threads: int | None = None) -> tuple[float, float, float]:
    """Seconds, peak memory (GiB) and passes an image of ``certipatch certify`` with these options."""
    words = [
        word
        for name, value in options.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    with TemporaryDirectory() as folder:
        out = Path(folder) / "certified"
        seconds, peak = in_a_process(
            [sys.executable, "-m", "certipatch", "certify", *words, "--out", str(out)], threads
        )
        records = read_records(out)
    return seconds, peak, sum(record.passes for record in records) / len(records)


def in_a_process(command: Sequence[str], threads: int | None = None) -> tuple[float, float]:
    """Seconds and peak resident memory (GiB) of a command. Raises ProcessError if it fails."""
    # The peak of a process is counted from its parent's at the start, so a small process stands between.
    launcher = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", launcher, *command],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise ProcessError(
            f"{' '.join(command[1:4])}: ended with code {done.returncode}: "
            f"{(done.stderr.splitlines() or [''])[-1]}"
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, int(done.stdout.split()[-1]) * unit / 2**30
