"""``runner.py``: files of this package, one behind the other, as a script that needs no CertiPatch.

The text is the library's own, so that there is one Algorithm 1 and not two; what is left out is what needs
torch or pydantic, and imports between the files.
"""

from __future__ import annotations

import ast
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
LEFT_OUT = ("torch", "pydantic")

# Each file after those that it needs; of some only these parts.
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("errors.py", ()),
    ("config.py", ("parse_json", "_once_each", "_finite", "_refuse_number")),
    ("geometry/patch.py", ()),
    ("geometry/coverage.py", ()),
    ("geometry/masks.py", ("MaskPair",)),
    ("geometry/places.py", ("Places",)),
    ("records/seals.py", ("sha256", "seal", "unseal")),
    ("data/decode.py", ()),
    ("data/pillow.py", ()),
    ("defenses/contract.py", ("Verdict",)),
    ("defenses/patchcleanser/algorithms.py", ()),
    ("defenses/patchcleanser/schedule.py", ()),
    ("defenses/patchcleanser/examination.py", ("PatchCleanserVerdict", "Answers")),
    ("deploy/claims.py", ()),
    ("deploy/said.py", ()),
    ("deploy/deployed.py", ()),
    ("deploy/alone.py", ()),
)

HEAD = '''"""The defended model of this folder, without CertiPatch: it needs numpy, Pillow and onnxruntime.

python runner.py photo.jpg            the answer, as one line of JSON
python runner.py --prove photo.jpg    also whether any single patch changed it or can change it
python runner.py --about              what is known of the model

Written by certipatch {version} (Apache-2.0) out of its own files; do not edit it: verify knows its hash.
"""

from __future__ import annotations

'''


def runner() -> str:
    """The text of ``runner.py``."""
    text = HEAD.format(version=metadata.version("certipatch"))
    return text + "\n\n".join(_part(name, chosen) for name, chosen in PARTS) + "\n"


def _part(name: str, chosen: tuple[str, ...]) -> str:
    """The text of a file without imports of ours; or of the chosen functions, classes and values."""
    source = (PACKAGE / name).read_text(encoding="utf-8")
    kept = [f"# {name}"]
    rows = source.splitlines()
    body = ast.parse(source).body
    for node, before in zip(body, [None, *body], strict=False):
        if isinstance(node, ast.Import | ast.ImportFrom):
            wanted = not _left_out(node)
        else:
            wanted = not chosen or bool(_names(node) & set(chosen))
        if wanted:
            kept.append("\n".join(rows[_begin(node, before, rows) : node.end_lineno]))
    return "\n".join(kept)


def _begin(node: ast.stmt, before: ast.stmt | None, rows: list[str]) -> int:
    """The first row of a statement, with its decorators and the comments and blank rows before it."""
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))]) - 1
    end = before.end_lineno if before and before.end_lineno else 0
    while first > end and (not rows[first - 1].strip() or rows[first - 1].startswith("#")):
        first -= 1
    return first


def _left_out(node: ast.Import | ast.ImportFrom) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or str(node.module).split(".")[0] in (*LEFT_OUT, "__future__")
    return any(alias.name.split(".")[0] in LEFT_OUT for alias in node.names)


def _names(node: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}
