"""Benchmarks on a model and data of one's own: certification against the published code, training, processes.

Each theme is one function, in the order of :data:`THEMES`; it returns rows with the value of every round, and
what else to know. No certification is timed before its answers have been compared.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..models.weights import weights_sha256
from ..records.manifest import begin_manifest, now
from ..runtime.console import stderr
from ..runtime.devices import environment
from .case import Case
from .certification import certification
from .network import network_share
from .processes import memory, scaling
from .training import training_steps


def run(case: Case, themes: Sequence[str]) -> dict[str, Any]:
    """Measure the themes, and say where, when and with what: the content of a file of results.

    Raises SoundnessError if certificates or defended labels are not those of the published loop.
    """
    experiment = {
        "model": case.spec.arch,
        "weights_sha256": weights_sha256(case.network),
        "images": list(case.source.names),
        "masks": case.masks.to_json(),
        "settings": asdict(case.settings),
        "repeats": case.repeats,
        "full": case.full,
    }
    where = {
        **environment(case.fabric),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "load_before": os.getloadavg()[0],  # of other processes: a number from a busy machine is worth little
    }
    found, results = begin_manifest("bench", experiment, **where), {}
    for theme in themes:
        stderr.print(f"bench {theme}")
        measure, ratio = THEMES[theme]
        results[theme] = {**measure(case), "ratio": ratio}
    return {**found, "finished": now(), "results": results}


def _processor() -> str | None:
    """The name of the CPU, where Linux says it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


# Each theme by its name: the function that measures it, and what the ratio in its rows is.
THEMES: dict[str, tuple[Callable[[Case], dict[str, Any]], str]] = {
    "certify": (certification, "seconds of the published loop / seconds"),
    "network": (network_share, "seconds / (passes x seconds of a forward pass alone at its best batch size)"),
    "train": (training_steps, "seconds / seconds of vanilla"),
    "memory": (memory, "GiB / GiB of the first line"),
    "scaling": (scaling, "seconds of one process / seconds"),
}


def parse_themes(text: str) -> list[str]:
    """The themes in a list with commas. Raises ConfigError for a theme that there is not."""
    themes = list(dict.fromkeys(text.split(",")))
    if unknown := [theme for theme in themes if theme not in THEMES]:
        raise ConfigError(f"what {unknown[0]!r}: expected some of {','.join(THEMES)}")
    return themes
