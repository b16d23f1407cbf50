"""What a report of a bug needs: versions, devices, precision, compiler, places to write. No name of host or
user."""

from __future__ import annotations

import locale
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

import torch

from ..errors import brief

PACKAGES = ("torch", "torchvision", "timm", "lightning-fabric", "numpy", "pydantic", "typer", "rich")


def checks(downloads: Path) -> dict[str, str]:
    """Each thing that was looked at, and what was found.

    Args:
        downloads: the folder that data sets are downloaded into.
    """
    found = {
        "certipatch": _version_of("certipatch"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{name: _version_of(name) for name in PACKAGES},
        "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads",
        "cuda": _cuda(),
        "mps": "available (CertiPatch is not tested on it)" if torch.backends.mps.is_available() else "none",
        "bf16": _bf16(),
        "compiler": _compiler(),
        "text": f"{locale.getpreferredencoding(False)}, terminal {getattr(sys.stdout, 'encoding', None)}",
        "processes": torch.multiprocessing.get_start_method(),
    }
    return found | {"here": _place(Path()), "downloads": _place(downloads)}


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return f"none; torch was built {f'for {torch.version.cuda}' if torch.version.cuda else 'without it'}"
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(cards)}"


def _bf16() -> str:
    """Where bfloat16 is fast and not only possible."""
    native = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    on_cuda = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return f"cpu {'native' if native else 'emulated, which is slow'}; cuda {'native' if on_cuda else 'none'}"


def _compiler() -> str:
    """Whether torch.compile makes a function run here; it wants a C++ compiler for the CPU."""
    try:
        made = torch.compile(lambda x: (x + 1).relu().sum(), fullgraph=True)(torch.ones(3))
        return "works" if float(made) == 6 else f"wrong: expected 6, found {float(made)}"
    except Exception as error:  # noqa: BLE001 (a compiler raises whatever it likes)
        return f"does not work ({brief(error)}); networks run as they are, which is slower"


def _place(folder: Path) -> str:
    """Free space of a folder, or of the nearest one above it that exists, and whether it can be written."""
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free / 1e9
    return f"{free:.1f} GB free, {'can' if os.access(there, os.W_OK) else 'CANNOT'} be written"
