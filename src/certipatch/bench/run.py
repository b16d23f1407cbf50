"""TODO."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import ConfigError
from ..models.weights import weights_sha256
from ..records.manifest import manifest, now
from ..runtime.console import stderr
from ..runtime.devices import environment
from .case import Case
from .certification import certification
from .network import network_share
from .processes import memory, scaling
from .rounds import _processor
from .training import training_steps


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
    where = {
        **environment(case.fabric),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "load_before": load,
    }
    found, results = manifest("bench", about, **where), {}
    for theme in themes:
        stderr.print(f"bench {theme}")
        measure, ratio = THEMES[theme]
        results[theme] = {**measure(case), "ratio": ratio}
    return {**found, "finished": now(), "results": results}


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
