"""Benchmarks on a model and data of one's own: certification against the published code, training, memory, processes.

Each theme is one function, in the order of :data:`THEMES`; it returns rows with the value of every round, and what else to know.
The rounds of what is compared are interleaved (A B A B ...), so that what slows the machine down for a while slows both, and
a ratio is taken within a round. No certification is timed before its answers have been compared.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import runtime, training
from .config import ModelSpec, train_config
from .cost import SEARCHES_BY_LOSS
from .data import Images, Source, as_float, collate
from .defense import PatchCleanser, Verdict
from .errors import ConfigError, DataError, ProcessError, SoundnessError
from .masks import MaskSet
from .models import weights_sha256
from .network import fastest_batch_size
from .published import published_answer, published_loop
from .records import manifest, now, read_lines, read_records
from .views import window_tensor

CHECKED, TIMED_PAIRS = 4, 40  # without ``full``: images compared over all pairs, and pairs that the loop is timed on
BLOCK = 16  # images, in the search for certified ones
LEAST_SECONDS = 1.0  # that a forward pass is repeated for
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """How the defense runs its network: arguments of :class:`PatchCleanser`, as ``certify`` chooses them in a large run."""

    batch_size: int | None = None
    exhaustive: bool = False
    precision: str = "32-true"
    compile: bool = True
    shared_prefix: bool = True


def build_defense(network: nn.Module, masks: MaskSet, settings: Settings) -> PatchCleanser:
    """The defense as ``certify`` builds it, on the device of the network: the one place here that knows how."""
    size = settings.batch_size or fastest_batch_size(network, masks, settings.precision)
    return PatchCleanser(network, masks, **{**asdict(settings), "batch_size": size})


@dataclass(frozen=True)
class Case:
    """What is measured, on what, and how thoroughly.

    Attributes:
        network: ``Sequential(Normalize, network)`` as :func:`certipatch.models.build` gives it; moved to the device.
        options: those of ``certipatch certify`` that say the same, for what is measured in a fresh process.
        repeats: rounds. full: compare all images with the published loop, and time it over all pairs.
        strategies, train_batch_size, search: of training steps; ``search`` are ``search_every`` and ``search_precision`` of
            :class:`TrainConfig`, for those that search by loss.
    """

    network: nn.Sequential
    spec: ModelSpec
    source: Source
    masks: MaskSet
    settings: Settings
    device: str
    options: dict[str, Any]
    repeats: int = 3
    full: bool = False
    strategies: Sequence[str] = ()
    train_batch_size: int = 64
    search: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.network.to(self.fabric.device)

    @cached_property
    def fabric(self) -> Fabric:
        return runtime.fabric(device=self.device, precision=self.settings.precision)

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """Images (N, 3, H, W) float in [0, 1] on the device, and labels (N,)."""
        return self.load(range(len(self.source)))

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Raises DataError for an image that cannot be read."""
        images = Images(self.source, self.spec)
        pixels, labels = collate([images[index] for index in indices])
        return as_float(pixels.to(self.fabric.device)), labels

    def defense(self, **changed: Any) -> PatchCleanser:
        return build_defense(self.network, self.masks, replace(self.settings, **changed))


def run(case: Case, themes: Sequence[str]) -> dict[str, Any]:
    """Measure, and say where, when and with what: the content of a file of results.

    Raises SoundnessError if certificates or defended labels are not those of the published loop.
    """
    about = {
        "model": case.spec.arch, "weights_sha256": weights_sha256(case.network), "images": list(case.source.names),
        "masks": case.masks.to_json(), "settings": asdict(case.settings),
        "repeats": case.repeats, "full": case.full,
    }  # fmt: skip
    load = os.getloadavg()[0]  # of others: a number from a busy machine is worth little
    where = {**runtime.environment(case.fabric), "cores": os.cpu_count(), "processor": _processor(), "load_before": load}
    found, results = manifest("bench", about, **where), {}
    for theme in themes:
        runtime.stderr.print(f"bench {theme}")
        measure, ratio = THEMES[theme]
        results[theme] = {**measure(case), "ratio": ratio}
    return {**found, "finished": now(), "results": results}


# --- (1) Certification against the published code --------------------------------------------------------------------


def certification(case: Case) -> dict[str, Any]:
    """``certify`` against the published loop in float32, on images in memory. Equal answers first, then time."""
    (images, labels), names, k = case.data, case.source.names, len(case.masks)
    pairs = [(i, j) for i in range(k) for j in range(i, k)]
    # The published code normalises before it masks, and leaves the memory layout as torch has it.
    plain = copy.deepcopy(case.network[1:]).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    normalised = case.network[0](images).contiguous()
    keep = list(case.masks.keep[:, None, None].to(images.device))

    began = time.perf_counter()
    defense = case.defense()
    verdicts = defense.certify(images, labels)
    first = time.perf_counter() - began
    exact = verdicts if case.settings.precision == "32-true" else case.defense(precision="32-true").certify(images, labels)
    checked = len(images) if case.full else min(CHECKED, len(images))
    check_equal(names[:checked], exact[:checked], published_loop(plain, normalised[:checked], keep, pairs))
    differences = [
        {"image": name, "32-true": _outcome(one), case.settings.precision: _outcome(other)}
        for name, one, other in zip(names, exact, verdicts, strict=True)
        if _outcome(one)[:2] != _outcome(other)[:2]
    ]

    timed = pairs if case.full else pairs[:: math.ceil(len(pairs) / TIMED_PAIRS)]
    loop, ours = interleaved(
        case.repeats, lambda: published_loop(plain, normalised, keep, timed), lambda: defense.certify(images, labels)
    )  # fmt: skip
    loop = [seconds * len(pairs) / len(timed) for seconds in loop]
    passes = sum(verdict.passes for verdict in verdicts) / len(images)
    certified = sum(bool(verdict.certified) for verdict in verdicts)
    notes = [f"{checked} of {len(images)} images compared with the full loop: equal certificates and defended labels in float32"]
    if not case.full:
        notes.append(f"the loop was timed on {len(timed)} of its {len(pairs)} pairs, its seconds are extrapolated from these")
    notes += [f"{len(differences)} images differ in {case.settings.precision}"] if exact is not verdicts else []
    notes += [" ".join(f"{key} {value}" for key, value in found.items()) for found in differences]
    notes += [f"{certified} of {len(images)} images certified; {first:.0f} s to build the defense and use it for the first time"]
    return {
        "rows": [
            row("published loop, float32", "s/image", [s / len(images) for s in loop], len(pairs)),
            row(f"certify, {_shown(defense)}", "s/image", [s / len(images) for s in ours], passes, _quotients(loop, ours)),
        ],
        "compared": checked, "certified": certified, "pairs": len(pairs), "pairs_timed": len(timed), "differences": differences, "network": defense.network.describe(),
        "notes": notes,
    }  # fmt: skip


def check_equal(names: Sequence[str], verdicts: Sequence[Verdict], tables: np.ndarray) -> None:
    """Raises SoundnessError for the first image whose verdict is not what the published loop's table says."""
    for name, verdict, table in zip(names, verdicts, tables, strict=True):
        expected, found = published_answer(table, verdict.label or 0), (verdict.certified, verdict.defended_label)
        if found != expected:
            raise SoundnessError(
                f"image {name}: expected (certified, defended label) {expected} as in the published loop, found {found} with a smallest "
                f"margin of {verdict.margin:.2g}; nothing is timed. Unless the margin is a matter of rounding, report it"
            )


def only_certified(case: Case, limit: int) -> Source:
    """The first ``limit`` images, in a random order (seed 0), that are certified in float32: there no schedule can stop early.

    Raises DataError if there is none.
    """
    defense = case.defense(precision="32-true")
    order = torch.randperm(len(case.source), generator=torch.Generator().manual_seed(0)).tolist()
    found: list[int] = []
    for start in range(0, len(order), BLOCK):
        some = order[start : start + BLOCK]
        found += [index for index, verdict in zip(some, defense.certify(*case.load(some)), strict=True) if verdict.certified]
        if len(found) >= limit:
            break
    if not found:
        raise DataError(
            f"only certified: expected a certified image among {len(case.source)}, found none; train the model on masked images"
        )
    return case.source.take(found[:limit])


def certified_in(folder: Path, source: Source) -> Source:
    """The images of the source that were certified in a folder that ``certify`` wrote. Raises DataError if there is none."""
    names = {record.name for record in read_records(folder) if record.certified}
    found = [index for index, name in enumerate(source.names) if name in names]
    if not found:
        raise DataError(f"certified {folder}: expected certified images of this data, found none among {len(names)}; give the same --data")
    return source.take(found)


# --- (2) The network's share of certification ------------------------------------------------------------------------


def network_share(case: Case) -> dict[str, Any]:
    """``certify`` against its passes at the pace of the network alone (with its masking), compiled or not, in the same precision."""
    (images, labels), defense = case.data, case.defense()
    passes = sum(verdict.passes for verdict in defense.certify(images, labels))  # and compiles, and warms up
    windows = window_tensor(case.masks, images.device)
    sizes = sorted({max(1, defense.batch_size * halves // 2) for halves in (1, 2, 4, 8)})
    networks = {size: case.defense(batch_size=size, shared_prefix=False).network for size in sizes}
    alone: dict[int, list[float]] = {size: [] for size in sizes}
    whole: list[float] = []
    with torch.inference_mode():
        views = {size: (images[:1].repeat(size, 1, 1, 1), windows[torch.arange(size) % len(windows)]) for size in sizes}
        for _ in range(case.repeats):
            whole += interleaved(1, lambda: defense.certify(images, labels))[0]
            for size in sizes:
                alone[size].append(_pace(lambda size=size: networks[size](*views[size])) / size)  # type: ignore[misc]
    with torch.inference_mode(), runtime.autocast(case.settings.precision, images.device):
        peak = _matmul_rate(images.device)
    best = min(sizes, key=lambda size: median(alone[size]))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        case.network(images[:1])
    rate = passes * counter.get_total_flops() / median(whole)
    n = len(images)
    return {
        "rows": [
            *(row(f"forward pass, batch {size}", "s/view", alone[size], 1) for size in sizes),
            row(f"certify, {_shown(defense)}", "s/image", [s / n for s in whole], passes / n, _quotients(whole, [passes * s for s in alone[best]])),
        ],
        "network": defense.network.describe(), "best_batch_size": best, "images_per_second": n / median(whole), "tflops": rate / 1e12, "peak_tflops": peak / 1e12,
        "notes": [
            f"best batch size {best}; {n / median(whole):.3g} images a second; passes x operations of one: {rate / 1e12:.3g} TFLOP/s, "
            f"{100 * rate / peak:.0f} % of the {peak / 1e12:.3g} that a product of large matrices reaches here"
        ],
    }  # fmt: skip


def _pace(action: Callable[[], object]) -> float:
    """Seconds of one call, over as many as fit into :data:`LEAST_SECONDS`."""
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < LEAST_SECONDS or not calls:
        action()
        _wait()
        calls += 1
    return elapsed / calls


def _matmul_rate(device: torch.device) -> float:
    """Operations a second in a product of square matrices, in the precision of the surrounding autocast."""
    n = 1024 if device.type == "cpu" else 8192
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    one, other = torch.rand(n, n, device=device).to(dtype), torch.rand(n, n, device=device).to(dtype)
    return 2 * n**3 / _pace(lambda: one @ other)


# --- (3) Training steps ----------------------------------------------------------------------------------------------


def training_steps(case: Case) -> dict[str, Any]:
    """Seconds of a step (masking with its search, forward, backward, update) in epochs that ``train`` itself runs."""
    n, old = min(case.train_batch_size, len(case.source)), case.source
    present = sorted(set(old.labels))  # numbered anew: training refuses classes without images, which cost no time
    source = Source(tuple(old.classes[c] for c in present), old.names, [present.index(c) for c in old.labels], old.open)
    masks = {"patch_size": case.masks.patch_size, "masks_per_axis": case.masks.masks_per_axis}

    def epoch(strategy: str) -> tuple[float, float]:
        search = case.search if strategy in SEARCHES_BY_LOSS else {}
        epochs = search.get("search_every") or 1
        config = train_config(strategy=strategy, **masks, epochs=epochs, batch_size=n, lr=1e-4, **search)
        with TemporaryDirectory() as folder:
            network, run = copy.deepcopy(case.network), Path(folder) / "run"
            compile = case.settings.compile
            training.train(network, case.spec, source, source, config, run, fabric=case.fabric, compile=compile)
            lines = read_lines(run / "epochs.jsonl")
        seconds, passes, images = (sum(line[key] for line in lines) for key in ("seconds", "forward_equivalents", "images"))
        return seconds * n / images, passes / images

    names = list(dict.fromkeys(["vanilla", *case.strategies]))
    with _quiet():
        rounds = [[epoch(name) for name in names] for _ in range(case.repeats + 1)][1:]  # the first warms up
    seconds = [[found[i][0] for found in rounds] for i in range(len(names))]
    passes = [rounds[0][i][1] for i in range(len(names))]
    return {
        "rows": [row(name, "s/step", seconds[i], passes[i], _quotients(seconds[i], seconds[0])) for i, name in enumerate(names)],
        "batch_size": n,
        "notes": [
            f"{n} images in a step, {case.settings.precision}; passes: forward passes' worth of search and gradient step",
            *(f"{name.replace('_', ' ')}: {value}" for name, value in case.search.items()),
        ],
    }


# --- (4) Memory and (5) processes ------------------------------------------------------------------------------------


def memory(case: Case) -> dict[str, Any]:
    """The peak for one image under few masks, one image, and all: of a fresh process on a CPU, of tensors on a GPU."""
    k, cuda, found = case.masks.masks_per_axis, case.fabric.device.type == "cuda", {}
    for images, masks_per_axis in [(1, min(2, k)), (1, k), (len(case.source), k)]:
        if cuda:
            fine = MaskSet.covering(**case.masks.threat, image_size=case.masks.image_size, masks_per_axis=masks_per_axis)
            defense = replace(case, masks=fine).defense()
            torch.cuda.reset_peak_memory_stats()
            defense.certify(case.data[0][:images], case.data[1][:images])
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            _, peak, _ = certify_in_a_process({**case.options, "limit": images, "masks-per-axis": masks_per_axis})
        found[f"certify, images: {images}, k: {masks_per_axis}"] = peak
    least = next(iter(found.values()))
    notes = ["peak of the tensors on the GPU" if cuda else "peak resident memory of a fresh process, Python and torch included"]
    return {"rows": [row(what, "GiB", [peak], None, [peak / least]) for what, peak in found.items()], "notes": notes}


def scaling(case: Case) -> dict[str, Any]:
    """``certify`` on one and on two devices: whole commands. On a CPU, two processes have half of the threads each."""
    cpu, threads, n = case.fabric.device.type == "cpu", torch.get_num_threads(), len(case.source)
    found: dict[int, list[tuple[float, float, float]]] = {1: [], 2: []}
    for _ in range(case.repeats):
        for devices, rounds in found.items():
            options = {**case.options, "devices": devices}
            rounds.append(certify_in_a_process(options, threads=max(1, threads // devices) if cpu else None))
    seconds = {devices: [one[0] for one in rounds] for devices, rounds in found.items()}
    notes = [f"whole commands with their start, {n} images" + (", all dealt to one process: raise --limit" if n <= 32 else "")]
    return {
        "rows": [
            row(f"certify --devices {d}", "s/image", [s / n for s in seconds[d]], rounds[0][2], _quotients(seconds[1], seconds[d]))
            for d, rounds in found.items()
        ],
        "notes": notes,
    }


def certify_in_a_process(options: dict[str, Any], threads: int | None = None) -> tuple[float, float, float]:
    """Seconds, peak memory (GiB) and passes an image of ``certipatch certify`` with these options."""
    words = [word for name, value in options.items() for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]
    with TemporaryDirectory() as folder:
        out = Path(folder) / "certified"
        seconds, peak = in_a_process([sys.executable, "-m", "certipatch", "certify", *words, "--out", str(out)], threads)
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
    done = subprocess.run([sys.executable, "-c", launcher, *command], capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise ProcessError(f"{' '.join(command[1:4])}: ended with code {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, int(done.stdout.split()[-1]) * unit / 2**30


# --- Rounds, rows and the table --------------------------------------------------------------------------------------

THEMES: dict[str, tuple[Callable[[Case], dict[str, Any]], str]] = {  # each with what its ratio is
    "certify": (certification, "seconds of the published loop / seconds"),
    "network": (network_share, "seconds / (passes x seconds of a forward pass alone at its best batch size)"),
    "train": (training_steps, "seconds / seconds of vanilla"),
    "memory": (memory, "GiB / GiB of the first line"),
    "scaling": (scaling, "seconds of one process / seconds"),
}


def parse_themes(text: str) -> list[str]:
    themes = list(dict.fromkeys(text.split(",")))
    if unknown := [theme for theme in themes if theme not in THEMES]:
        raise ConfigError(f"what {unknown[0]!r}: expected some of {','.join(THEMES)}")
    return themes


def interleaved(repeats: int, *actions: Callable[[], object]) -> list[list[float]]:
    """The seconds of each action in each round, A B A B ..."""
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats):
        for action, of_action in zip(actions, seconds, strict=True):
            started = time.perf_counter()
            action()
            _wait()
            of_action.append(time.perf_counter() - started)
    return seconds


def row(what: str, unit: str, rounds: Sequence[float], passes: float | None = None, ratios: Sequence[float] = ()) -> dict[str, Any]:
    """One thing measured, once a round; ``passes``: forward passes' worth of an image; ``ratios``: see :data:`THEMES`."""

    def spread(values: Sequence[float]) -> dict[str, Any]:
        return {"median": median(values), "min": min(values), "max": max(values), "rounds": list(values)}

    return {"what": what, "unit": unit, **spread(rounds), "passes_per_image": passes, "ratio": spread(ratios) if ratios else None}


def table(found: dict[str, Any]) -> Table:
    """What :func:`run` returns, 80 columns wide."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    out.add_column("", overflow="fold", min_width=16)
    for heading in ("", "median", "range", "passes/\nimage", "ratio", "range"):
        out.add_column(heading, justify="right", no_wrap=True)
    notes = []
    for theme, result in found["results"].items():
        out.add_row(f"[bold]{theme}[/bold]")
        for one in result["rows"]:
            ratio, passes = one["ratio"], one["passes_per_image"]
            shown = [one["unit"], f"{one['median']:.3g}", f"{one['min']:.3g}-{one['max']:.3g}", f"{passes:.0f}" if passes else ""]
            out.add_row(
                escape(one["what"]), *shown, *([f"{ratio['median']:.3g}", f"{ratio['min']:.3g}-{ratio['max']:.3g}"] if ratio else [])
            )
        notes += [f"{theme}: ratio = {result['ratio']}", *(f"{theme}: {note}" for note in result["notes"])]
    out.caption = escape("\n".join(notes))
    return out


def _quotients(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def _shown(defense: PatchCleanser) -> str:
    """What of the settings is in effect: not every network can be compiled, or has a shared prefix."""
    network = defense.network
    on = [network.compiled and "compiled", network.prefix and "shared prefix", defense.exhaustive and "exhaustive"]
    return ", ".join([network.precision, f"batch {network.batch_size}", *(word for word in on if word)])


def _outcome(verdict: Verdict) -> tuple[bool | None, int, float]:
    return verdict.certified, verdict.defended_label, verdict.margin


def _wait() -> None:
    """For what a GPU has been asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress of the trainings inside."""
    before, runtime.stderr.quiet = runtime.stderr.quiet, True
    try:
        yield
    finally:
        runtime.stderr.quiet = before


def _processor() -> str | None:
    """The name of the CPU, where Linux says it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
