"""The theme ``network``: how much of ``certify`` is the network, and how fast the network is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..defenses.patchcleanser.defense import PatchCleanser
from ..runtime.devices import autocast
from ..views.masked import window_tensor
from .case import Case, settings_in_effect
from .rounds import interleaved, quotients, row, wait_for_gpu

LEAST_SECONDS = 1.0  # for which a forward pass is repeated


def network_share(case: Case) -> dict[str, Any]:
    """``certify`` against its passes at the pace of the network alone.

    The network alone is timed with its masking, in the same precision, and compiled if the defense is.
    """
    (images, labels), defense = case.data, case.defense()
    n, verdicts = len(images), defense.certify(images, labels)  # and the warm-up
    passes = sum(verdict.passes for verdict in verdicts)
    sizes = sorted({max(1, defense.batch_size * halves // 2) for halves in (1, 2, 4, 8)})
    whole, alone = _time(case, defense, sizes)
    best = min(sizes, key=lambda size: median(alone[size]))
    peak = _operations_a_second(case)
    rate, speed = passes * _operations(case) / median(whole), n / median(whole)
    share = quotients(whole, [passes * seconds for seconds in alone[best]])
    name, seconds_an_image = f"certify, {settings_in_effect(defense)}", [seconds / n for seconds in whole]
    return {
        "rows": [
            *(row(f"forward pass, batch {size}", "s/view", alone[size], 1) for size in sizes),
            row(name, "s/image", seconds_an_image, passes / n, share),
        ],
        "network": defense.network.describe(),
        "best_batch_size": best,
        "images_per_second": speed,
        "tflops": rate / 1e12,
        "peak_tflops": peak / 1e12,
        "notes": [
            f"best batch size {best}; {speed:.3g} images a second; passes x operations of one: "
            f"{rate / 1e12:.3g} TFLOP/s, {100 * rate / peak:.0f} % of the {peak / 1e12:.3g} that a product "
            "of large matrices reaches here"
        ],
    }


def _time(
    case: Case, defense: PatchCleanser, sizes: Sequence[int]
) -> tuple[list[float], dict[int, list[float]]]:
    """In each round, the seconds of ``certify``, and those of one view in a forward pass of each size."""
    images, labels = case.data
    windows = window_tensor(case.masks, images.device)
    networks = {size: case.defense(batch_size=size, shared_prefix=False).network for size in sizes}
    whole: list[float] = []
    alone: dict[int, list[float]] = {size: [] for size in sizes}
    with torch.inference_mode():
        passes = {
            size: partial(
                network, images[:1].repeat(size, 1, 1, 1), windows[torch.arange(size) % len(windows)]
            )
            for size, network in networks.items()
        }
        for _ in range(case.repeats):
            whole += interleaved(1, lambda: defense.certify(images, labels))[0]
            for size in sizes:
                alone[size].append(_pace(passes[size]) / size)
    return whole, alone


def _pace(action: Callable[[], object]) -> float:
    """The seconds of one call, over as many calls as fit into :data:`LEAST_SECONDS`."""
    calls, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < LEAST_SECONDS or not calls:
        action()
        wait_for_gpu()
        calls += 1
    return elapsed / calls


def _operations(case: Case) -> int:
    """The floating-point operations of the network on one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        case.network(case.data[0][:1])
    return counter.get_total_flops()


def _operations_a_second(case: Case) -> float:
    """What the device reaches in a product of large square matrices, in the precision of the case."""
    device = case.fabric.device
    n = 1024 if device.type == "cpu" else 8192
    with torch.inference_mode(), autocast(case.settings.precision, device):
        reduced = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if reduced else torch.float32
        one, other = torch.rand(n, n, device=device).to(dtype), torch.rand(n, n, device=device).to(dtype)
        return 2 * n**3 / _pace(lambda: one @ other)
