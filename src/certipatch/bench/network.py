"""TODO."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..runtime.devices import autocast
from ..views.masked import window_tensor
from .case import Case
from .rounds import _pace, _quotients, _shown, interleaved, row


def network_share(case: Case) -> dict[str, Any]:
    """``certify`` against its passes at the pace of the network alone (with its masking), compiled or not, in
    the same precision."""
    (images, labels), defense = case.data, case.defense()
    passes = sum(verdict.passes for verdict in defense.certify(images, labels))  # and compiles, and warms up
    windows = window_tensor(case.masks, images.device)
    sizes = sorted({max(1, defense.batch_size * halves // 2) for halves in (1, 2, 4, 8)})
    networks = {size: case.defense(batch_size=size, shared_prefix=False).network for size in sizes}
    alone: dict[int, list[float]] = {size: [] for size in sizes}
    whole: list[float] = []
    with torch.inference_mode():
        views = {
            size: (images[:1].repeat(size, 1, 1, 1), windows[torch.arange(size) % len(windows)])
            for size in sizes
        }
        for _ in range(case.repeats):
            whole += interleaved(1, lambda: defense.certify(images, labels))[0]
            for size in sizes:
                alone[size].append(_pace(lambda size=size: networks[size](*views[size])) / size)  # type: ignore[misc]
    with torch.inference_mode(), autocast(case.settings.precision, images.device):
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
            f"best batch size {best}; {n / median(whole):.3g} images a second; passes x operations of one: "
            f"{rate / 1e12:.3g} TFLOP/s, "
            f"{100 * rate / peak:.0f} % of the {peak / 1e12:.3g} that a product of large matrices reaches here"
        ],
    }  # fmt: skip


def _matmul_rate(device: torch.device) -> float:
    """Operations a second in a product of square matrices, in the precision of the surrounding autocast."""
    n = 1024 if device.type == "cpu" else 8192
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    one, other = torch.rand(n, n, device=device).to(dtype), torch.rand(n, n, device=device).to(dtype)
    return 2 * n**3 / _pace(lambda: one @ other)
