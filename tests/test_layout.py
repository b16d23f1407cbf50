"""Imports go down only, and reading records needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "certipatch"
LAYERS = [
    {"cli", "__main__", "__init__"},
    {"demo", "reproduce", "bench", "illustrate", "options"},
    {"certification", "training", "attack", "redteam", "verify", "verify_detection", "verify_geometry", "verify_views"},
    {"defense", "detection"},
    {"network", "schedule"},
    {"prefix"},
    {"search", "gradcam", "views"},
    {"masks", "patchcleanser", "minority_reports", "published", "cost", "plan", "models", "data", "report"},
    {"config", "records", "seals", "processes", "progress", "runtime", "errors"},
]


def layer(module: str) -> int:
    (found,) = (i for i, names in enumerate(LAYERS) if module in names)
    return found


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    inside = path.parent != PACKAGE
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if inside and node.level == 1:
                continue
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def test_imports_go_down_only():
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in imported(path):
            seen += 1
            assert layer(module) <= layer(other), f"{module} imports {other}, which stands above it"
    assert seen > 40


def test_reports_and_geometry_need_no_torch():
    modules = (
        "certipatch, certipatch.cli, certipatch.records, certipatch.report.summary, certipatch.report.attacked, certipatch.report.html"
    )
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
