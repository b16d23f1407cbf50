"""The house: which room may import which, what a certificate may depend on, and how large its cells are.

The rules are those of CONTRIBUTING.md. They are checked on the code's text: every import counts, also one
inside a function or under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
PACKAGE = SRC / "certipatch"
FILES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))
}

FLOORS = (
    {"__init__", "__main__"},
    {"cli"},
    {"reproduce", "demo"},
    {"report", "deploy", "adapters"},
    {"certification", "redteam", "bench"},
    {"defenses", "training", "verify"},
    {"views", "models"},
    {"geometry", "records", "data", "runtime"},
    {"config"},
    {"errors"},
)

INTEGERS = (  # files of integers only: no torch
    *(name for name in FILES if name.startswith("certipatch.geometry.")),
    "certipatch.defenses.patchcleanser.algorithms",
    "certipatch.defenses.patchcleanser.schedule",
    "certipatch.defenses.minority_reports.algorithm",
    "certipatch.defenses.evidence.integers",
    "certipatch.defenses.evidence.sums",
    "certipatch.defenses.evidence.robust_masking",
    "certipatch.defenses.evidence.two_masks",
    "certipatch.defenses.evidence.votes",
    "certipatch.defenses.evidence.rules",
)
RECORD_FILES = re.compile(
    r"\b(?:manifest\.json|records\.jsonl|records\.sha256|attacks\.jsonl|epochs\.jsonl)\b"
)
NAMES_THAT_SAY_NOTHING = ("utils", "helpers", "common", "base")


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def resolved(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of the module that a relative import names."""
    is_package = FILES[module].name == "__init__.py"
    parts = module.split(".")[: -1 if is_package else None]
    inside = module.removesuffix(".__init__").split(".") if is_package else parts[:-1]
    base = inside[: len(inside) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


@cache
def imports(module: str) -> frozenset[str]:
    """Everything that a file imports, anywhere in it, by absolute names; of ours the file that is meant."""
    found: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = resolved(module, node) if node.level else str(node.module)
            for alias in node.names:
                both = f"{source}.{alias.name}"
                found.add(
                    next((name for name in (both, source, f"{source}.__init__") if name in FILES), source)
                )
    return frozenset(found)


def ours(module: str) -> Iterator[str]:
    """The files of the package that a file imports."""
    for name in imports(module):
        if name in FILES:
            yield name
        elif f"{name}.__init__" in FILES:
            yield f"{name}.__init__"


def room(module: str) -> str:
    """``certipatch.report.page.html`` -> ``report``, ``certipatch.config`` -> ``config``."""
    return module.split(".")[1]


def floor(module: str) -> int:
    (found,) = (number for number, rooms in enumerate(FLOORS) if room(module) in rooms)
    return found


def test_the_rules_see_the_imports():
    """A parser that found nothing would make every rule hold."""
    assert len(FILES) > 100
    assert sum(len(list(ours(module))) for module in FILES) > 400
    assert "certipatch.defenses.contract" in imports("certipatch.defenses.masked")
    assert "certipatch.runtime.devices" in imports("certipatch.cli.train")  # inside a function
    assert "certipatch.data.source" in imports("certipatch.cli.open")  # under TYPE_CHECKING
    assert "torch" in imports("certipatch.views.masked")


@pytest.mark.parametrize("module", FILES)
def test_1_imports_go_down_or_stay_in_their_room(module: str):
    for other in ours(module):
        if room(other) != room(module):
            assert floor(module) < floor(other), f"{module} imports {other}, which is not on a floor below"


def test_2_no_files_form_a_circle():
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle of files: {' > '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for other in ours(module):
                visit(other, (*way, module))
            done.add(module)

    for module in FILES:
        visit(module, ())


def test_3_verify_imports_nothing_of_what_it_checks():
    allowed = {"errors", "config", "data", "runtime", "verify"}
    for module in FILES:
        if room(module) == "verify":
            for other in ours(module):
                known = room(other) in allowed or other == "certipatch.models.weights"
                assert known, f"{module} imports {other}, which verify has to check"


def test_4_integers_need_no_torch():
    standard = sys.stdlib_module_names | {"numpy", "certipatch"}
    for module in INTEGERS:
        loaded = {name.split(".")[0] for name in imports(module)} - standard
        assert loaded <= ({"torch"} if module == "certipatch.geometry.masks" else set()), module
    script = f"import sys, {', '.join(INTEGERS)}; sys.exit('torch' in sys.modules)".replace(".__init__", "")
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_5_a_certificate_depends_on_rooms_that_say_so():
    allowed = {"geometry", "views", "config", "errors", "defenses"}
    libraries = sys.stdlib_module_names | {"numpy", "torch", "certipatch"}
    for module in FILES:
        if room(module) == "defenses":
            assert {room(other) for other in ours(module)} <= allowed, module
            assert {name.split(".")[0] for name in imports(module)} <= libraries, module


def test_6_wings_are_strangers():
    wings = {path.name for path in (PACKAGE / "defenses").iterdir() if path.is_dir() and path.name[0] != "_"}
    assert len(wings) >= 2
    for module in FILES:
        named = {
            other.split(".")[2] for other in ours(module) if other.startswith("certipatch.defenses.")
        } & wings
        own = {module.split(".")[2]} if room(module) == "defenses" else set()
        if own & wings:
            assert named <= own, f"{module} imports another defense"
        elif len(named) > 1:
            assert module in ("certipatch.certification.methods", "certipatch.__init__"), module


def test_7_the_command_line_records_and_report_start_without_torch():
    modules = [
        "certipatch",
        "certipatch.cli.app",
        *(name for name in FILES if room(name) in ("records", "report") and not name.endswith("__init__")),
    ]
    script = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def texts(module: str) -> Iterator[str]:
    """The strings of a file but for its docstrings."""
    prose = {
        id(node.value)
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def test_8_only_records_and_verify_know_how_records_lie_on_a_disk():
    for module in FILES:
        if room(module) in ("records", "verify"):
            continue
        for text in texts(module):
            assert not RECORD_FILES.search(text), f"{module} names a file of records: {text!r}"
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                assert node.slice.value != "experiment", (
                    f"{module}, line {node.lineno}: use the typed Manifest"
                )


def test_9_typer_is_only_in_the_command_line():
    for module in FILES:
        if room(module) != "cli":
            assert not {"typer", "click"} & {name.split(".")[0] for name in imports(module)}, module


@pytest.mark.parametrize("module", FILES)
def test_10_cells_are_small(module: str):
    path, rows = FILES[module], FILES[module].read_text(encoding="utf-8").splitlines()
    assert len(rows) <= 400
    assert max(map(len, rows), default=0) <= 110
    for part in (path.stem, *path.parent.relative_to(SRC).parts):
        assert part not in NAMES_THAT_SAY_NOTHING
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            most = 80 if module == "certipatch.training.loop" else 60
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= most, f"{module}: {node.name} has {length} lines"


def test_11_public_names_and_help_are_what_was_stored():
    """``python tests/layout/test_layout.py`` stores them anew, for a change that is meant."""
    assert promised() == (Path(__file__).parent / "promised.txt").read_text(encoding="utf-8")


def promised() -> str:
    """The public names, and what ``--help`` says of each command, at a width of 100 columns."""
    import typer
    from typer.core import TyperGroup

    import certipatch
    from certipatch.cli.app import app

    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    commands = {"certipatch": group, **{f"certipatch {name}": one for name, one in group.commands.items()}}
    shown = []
    for name, command in commands.items():
        context = group.context_class(command, info_name=name, terminal_width=100, max_content_width=100)
        shown += [f"$ {name} --help", command.get_help(context), ""]
    return "\n".join(["certipatch: " + ", ".join(sorted(certipatch.__all__)), "", *shown])


if __name__ == "__main__":
    (Path(__file__).parent / "promised.txt").write_text(promised(), encoding="utf-8")
