"""How large the cells of the house are: ``python scripts/measure.py [--worst N]``.

This prints the length of functions (median, 95th percentile, longest), their cyclomatic complexity (mean and
largest, by radon), the longest line and the longest file of ``src``. It exits with 1 where one of them is
above what CONTRIBUTING.md promises.
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

import numpy as np
from radon.complexity import cc_visit
from radon.visitors import Class

SRC = Path(__file__).parents[1] / "src" / "certipatch"
MOST = {
    "function p95": 36,
    "complexity mean": 3.5,
    "complexity max": 14,
    "longest line": 110,
    "longest file": 400,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--worst", type=int, default=0, help="name so many of the longest and most complex functions"
    )
    worst = parser.parse_args().worst

    lengths: dict[str, int] = {}
    complexities: dict[str, int] = {}
    lines: dict[str, int] = {}
    files: dict[str, int] = {}
    for path in sorted(SRC.rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(SRC).as_posix()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                lengths[f"{name}:{node.lineno} {node.name}"] = node.end_lineno - node.lineno + 1
        for block in cc_visit(text):
            if not isinstance(block, Class):
                complexities[f"{name}:{block.lineno} {block.name}"] = block.complexity
        rows = text.splitlines()
        files[name] = len(rows)
        lines |= {f"{name}:{number}": len(row) for number, row in enumerate(rows, start=1)}

    function, complexity = list(lengths.values()), list(complexities.values())
    found = {
        "functions": len(function),
        "function p50": float(np.percentile(function, 50)),
        "function p95": float(np.percentile(function, 95)),
        "function max": max(function),
        "complexity mean": float(np.mean(complexity)),
        "complexity max": max(complexity),
        "longest line": max(lines.values()),
        "longest file": max(files.values()),
        "files": len(files),
    }
    for what, value in found.items():
        promised = f"  (at most {MOST[what]:g})" if what in MOST else ""
        print(f"{what:16} {value:8.4g}{promised}")
    for title, of in (
        ("longest functions", lengths),
        ("most complex", complexities),
        ("longest files", files),
    ):
        for name, value in sorted(of.items(), key=lambda item: -item[1])[:worst]:
            print(f"{title}: {value:4} {name}")
    return int(any(found[what] > most for what, most in MOST.items()))


if __name__ == "__main__":
    sys.exit(main())
