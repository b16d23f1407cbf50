"""Keep the tables, the figures and all manifests (one a line) of a reproduction, without records and weights.

python scripts/collect_results.py OUT results/NAME
"""

import json
import shutil
import sys
from pathlib import Path

out, kept = Path(sys.argv[1]), Path(sys.argv[2])
kept.mkdir(parents=True, exist_ok=True)
for path in sorted(out.glob("*.*")):
    if path.suffix in (".md", ".csv", ".json", ".png", ".svg"):
        shutil.copy(path, kept)
with open(kept / "manifests.jsonl", "w", encoding="utf-8") as file:
    for path in sorted(out.rglob("manifest*.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["finished"] is None:
            continue
        manifest["environment"].pop("command")  # it names folders of one machine
        epochs = path.with_name("epochs.jsonl")
        lines = [json.loads(line) for line in epochs.read_text().splitlines()] if epochs.exists() else None
        file.write(
            json.dumps({"folder": str(path.parent.relative_to(out)), "manifest": manifest, "epochs": lines})
            + "\n"
        )
