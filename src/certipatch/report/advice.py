"""What to do next about a certification, from its records."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ..geometry.patch import threat_of, threat_text
from ..records.schema import Record
from .certification import Summary
from .findings import outcome


def advise(summary: Summary, records: Sequence[Record], *, attacked: bool) -> list[tuple[str, str]]:
    """Sentences, each with a command or nothing. ``attacked``: an attack on it is known."""
    s, e = summary, summary.manifest["experiment"]
    states = Counter(outcome(record, s.min_margin) for record in records)
    n, trained = len(records), e.get("trained") or {}
    threat, k = threat_of(e["masks"]), e["masks"]["masks_per_axis"]
    patch = threat_text(**{**threat, "patches": 1})
    model, where = _options_of(s.manifest)
    found: list[tuple[str, str]] = []
    if not s.complete:
        found.append(
            (f"{n} of {e['data']['images']} images are done. Go on with the command below and --resume.", "")
        )
    if trained.get("strategy") != "greedy-multisize" and threat.keys() == {"patch_size"}:
        before = "was not fine-tuned" if not trained else f"was fine-tuned with {trained['strategy']}"
        found.append(
            (
                f"The model {before}. Fine-tuning on the worst pairs of masks (greedy-multisize) makes more "
                "images certifiable.",
                f"certipatch train {model} --data TRAIN --val-data VALIDATION --strategy greedy-multisize "
                f"--patch {patch} --out RUN",
            )
        )
    if 0 < k < 6:
        found.append(
            (
                f"With k={k} each mask hides much of the image. With k=6 masks are smaller and more images "
                "are certified, for more passes.",
                f"certipatch certify {model} {where} --patch {patch} --masks-per-axis 6 --out CERTIFIED",
            )
        )
    if states["just missed"] >= max(1, n // 20):
        found.append(
            (
                f"{states['just missed']} of {n} images just miss: no single mask fools the model on them, "
                "only some pair does. They are what longer fine-tuning "
                "or a larger k (for more passes) can win.",
                "",
            )
        )
    wrong = sum(record.vanilla_label != record.label for record in records)
    if wrong >= max(1, n // 10):
        found.append(
            (
                f"{wrong} of {n} images are answered wrongly without any patch. No defence mends that: "
                "start from a better model.",
                "",
            )
        )
    if few := near(s, records):
        found.append(
            (
                f"{few} of the certificates {'has' if few == 1 else 'have'} a logit margin below "
                f"{rounding(e):g}, which rounding on another machine could turn. "
                "Count without:",
                f"certipatch report {s.folder} --min-margin {rounding(e):g}",
            )
        )
    found.append(
        (
            "Have independent code check these records, and look at images again:",
            f"certipatch verify {s.folder} {model} {where}",
        )
    )
    if not attacked and threat.get("patches", 1) == 1:
        found.append(
            (
                "See what an attacker reaches: an upper bound beside this lower one, with patched images "
                "for this page.",
                f"certipatch attack {model} --records {s.folder} {where} --out ATTACK",
            )
        )
    return found


def rounding(experiment: dict[str, Any]) -> float:
    """Up to what logit margin an answer may turn by rounding, as docs/trust.md has measured."""
    return 0.001 if experiment["precision"] == "32-true" else 0.25


def near(summary: Summary, records: Sequence[Record]) -> int:
    """How many certificates rest on a margin below that."""
    few = rounding(summary.manifest["experiment"])
    return sum(
        outcome(record, summary.min_margin) == "certified" and (record.margin or 0.0) < few
        for record in records
    )


def _options_of(manifest: dict[str, Any]) -> tuple[str, str]:
    """``--model ...`` and ``--data ...`` as the run had them, or words in capitals to fill in."""
    environment = manifest.get("environment")
    command = environment.get("command", "") if isinstance(environment, dict) else ""
    try:
        words = shlex.split(str(command))
    except ValueError:
        words = []
    given = dict(pairwise(words)) if words[1:2] == ["certify"] else {}

    def chosen(*names: str) -> str:
        return " ".join(f"{name} {shlex.quote(given[name])}" for name in names if name in given)

    model = chosen("--model", "--weights", "--image-size", "--crop-pct") or "--model MODEL"
    pretrained = " --pretrained" if "--pretrained" in given else ""
    return model + pretrained, chosen(
        "--data", "--split", "--class-map"
    ) or f"--data {shlex.quote(str(manifest.get('data') or 'DATA'))}"
