"""A defended model as it was certified to a folder that answers without torch, with a certificate of its own.

An export is another function than the model: other kernels round otherwise. So nothing is copied; every image
is certified again with the exported session, and the records are compared with those of the model.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..certification.blocks import blocks_of, examined, look, write_blocks
from ..certification.experiment import experiment_of
from ..certification.methods import method_of
from ..config import ROUNDING
from ..data.source import Images, Source
from ..data.words import in_words
from ..defenses.contract import check_labels
from ..defenses.patchcleanser.defense import PatchCleanser
from ..defenses.patchcleanser.examination import PatchCleanserVerdict
from ..errors import RecordsError, SoundnessError
from ..geometry.patch import Threat
from ..models.runs import Opened
from ..records.files import guard, write_atomically
from ..records.manifest import Manifest, begin_manifest
from ..records.read import read_folder
from ..records.schema import RECORDS, PatchCleanserRecord
from ..records.seals import seal, sha256
from ..records.store import Store
from ..runtime.progress import progress_bar
from .bundle import runner
from .deployed import DEPLOYED, FORMAT, GRAPH, RUNNER, Deployed, Graph, is_deployed, probe_pixels
from .graph import check_libraries, views_of, write_graph

CERTIFICATE = "certificate"  # the folder of records of the export
VERSIONS = ("certipatch", "torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow")


@dataclass(frozen=True)
class Original:
    """The model to export, as it was certified.

    Attributes:
        manifest: of the certification; ``opened`` and ``defense`` are the model that it is of.
        names: words for class folders.
    """

    manifest: Manifest
    opened: Opened
    defense: PatchCleanser
    names: dict[str, str] | None = None


@dataclass
class ExportedDefense:
    """The exported predictor as a certified defense, whose images become records like any other's."""

    deployed: Deployed
    original: PatchCleanser
    places: bool
    prove: bool
    moved: float
    name: str = PatchCleanser.name

    @property
    def threat(self) -> Threat:
        return self.original.threat

    def examine(self, images: Tensor, labels: Tensor | None = None) -> Sequence[PatchCleanserVerdict]:
        """The verdicts on images (N, 3, H, W) in [0, 1], whose values are 8 bits."""
        check_labels(labels, images, self.original.network.classes)
        pixels = (images * 255).round().to(torch.uint8).numpy()
        truth: list[int | None] = [None] * len(images) if labels is None else labels.tolist()
        known = labels is not None
        how = {"prove": self.prove and known, "places": self.places and known}
        images_and_labels = zip(pixels, truth, strict=True)
        return [self.deployed.examine(one, label, **how) for one, label in images_and_labels]

    def describe(self) -> dict[str, Any]:
        """What can change a result: that of the original, but for its precision and its thoroughness."""
        return {**self.original.describe(), "precision": "32-true", "exhaustive": False}

    def describe_network(self) -> dict[str, Any]:
        """How the graph is run."""
        used = {"compiled": False, "shared_prefix": None, "pairs_pasted": 0}
        return {"batch_size": self.deployed.graph.views, **used, "moved": self.moved}


def check_folder(out: Path, *, resume: bool) -> None:
    """Refuse a folder that holds something else, or a finished export. Raises RecordsError."""
    if is_deployed(out):
        raise RecordsError(f"out {out}: holds an export already; choose another --out")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not resume)):
        raise RecordsError(
            f"out {out}: expected an empty folder; choose another --out, or --resume an export that was "
            "interrupted"
        )


def write(original: Original, out: Path, *, views: int | None, threads: int | None) -> dict[str, Any]:
    """Write graph and runner, and what the folder will say of itself but for the certificate."""
    check_libraries()
    defense, spec = original.defense, original.opened.spec
    guard(out, partial(out.mkdir, parents=True, exist_ok=True))
    count, width = views or views_of(defense.masks), threads or torch.get_num_threads()
    masks, model = defense.masks, original.opened.network.cpu().eval()
    found = write_graph(model, defense.fill, masks, out / GRAPH, views=count, threads=width)
    write_atomically(out / RUNNER, runner().encode())
    way = {"masks_per_axis": masks.masks_per_axis, "precision": "32-true", "inference": defense.inference}
    stated = {
        "format": FORMAT,
        "kind": "deployed",
        "model": spec.model_dump(mode="json"),
        "trained": original.opened.trained,
        "shown": in_words(spec.classes, original.names),
        "threat": dict(defense.threat),
        "way": way,
        "fill": defense.fill.tolist(),
        "windows": masks.to_json()["windows"],
        "least": max(ROUNDING["32-true"], found["moved"]),
        "views": count,
        "threads": width,
        "exported": found,
        "files": {name: sha256((out / name).read_bytes()) for name in (GRAPH, RUNNER)},
        "of": {
            "weights_sha256": original.opened.weights_sha256,
            "records_sha256": original.manifest.line_hashes,
            "precision": original.manifest.certification.precision,
        },
        "versions": {name: metadata.version(name) for name in VERSIONS},
        "machine": platform.machine(),
        "certificate": None,
        "compared": None,
    }
    stated = json.loads(json.dumps(stated))
    graph = Graph.of(out / GRAPH, stated)
    labels, margins = Deployed(stated, graph).first_round(probe_pixels(spec.image_size), graph.views)
    stated["probe"] = {"labels": labels.tolist(), "margins": margins.tolist()}
    return stated


def finish(out: Path, stated: dict[str, Any]) -> None:
    """Write what the folder says of itself, with its seal: from now on it is a deployed folder."""
    write_atomically(out / DEPLOYED, json.dumps(seal(stated), indent=1).encode() + b"\n")


def certify(original: Original, source: Source, out: Path, stated: dict[str, Any], *, data: str) -> Path:
    """Certify the images with the exported session, each from a file to a record; the folder of records.

    Interrupted runs go on where they stopped. Raises SoundnessError where a premise fails.
    """
    deployed = Deployed(stated, Graph.of(out / GRAPH, stated))
    known, moved = original.manifest.certification, stated["exported"]["moved"]
    defense = ExportedDefense(deployed, original.defense, known.places, known.prove, moved)
    exported = replace(original.opened, weights_sha256=stated["files"][GRAPH])
    experiment = experiment_of(exported, source, defense, "onnxruntime-cpu")
    run_on = {
        "network": defense.describe_network(),
        **{"device": "onnxruntime-cpu", "machine": stated["machine"], "threads": stated["threads"]},
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "onnxruntime": stated["versions"]["onnxruntime"],
    }
    about = {**begin_manifest("certify", experiment, **run_on), "data": data}
    images = Images(source, original.opened.spec)
    images.transform = lambda picture: torch.from_numpy(deployed.preprocess(picture))
    blocks, folder = blocks_of(len(source), (1, 1)), out / CERTIFICATE
    with (
        Store(folder, about, RECORDS, resume=folder.exists()) as store,
        progress_bar(len(source), "certify the export") as progress,
    ):
        examine = partial(look, defense, torch.device("cpu"))
        write_blocks(partial(examined, [examine], images), blocks, [store], progress, method_of(defense.name))
        store.finish()
    return folder


def compare(original: Original, source: Source, out: Path, stated: dict[str, Any]) -> dict[str, Any]:
    """How the records of the export differ from those of the model.

    Raises SoundnessError, naming images, for other pixels, or another answer, case or certificate where
    rounding cannot be the reason.
    """
    pairs = _pairs(original, out)
    least = max(original.manifest.rounding, stated["least"])
    _refuse(out, "pixels", _where(pairs, lambda its, mine: its.pixels != mine.pixels))
    _refuse(out, "answers", _where(pairs, lambda its, mine: _differ(its, mine) and _clear(its, mine, least)))
    vanilla = _where(pairs, lambda its, mine: its.vanilla_label != mine.vanilla_label)
    deployed = Deployed(stated, Graph.of(out / GRAPH, stated))
    _refuse(out, "undefended answers", [one for one in vanilla if _margin(deployed, source, one) >= least])
    both = [
        (its.margin or 0.0, mine.margin or 0.0) for its, mine in pairs if its.certified and mine.certified
    ]
    listed = {
        "answers_differ": _where(pairs, _differ),
        "undefended_answers_differ": vanilla,
        "certificates_lost": _where(pairs, lambda its, mine: its.certified and not mine.certified),
        "certificates_won": _where(pairs, lambda its, mine: mine.certified and not its.certified),
    }
    return {
        "images": len(pairs),
        "tolerance": least,
        **{what: [one.name for one in images] for what, images in listed.items()},
        "largest_change_of_a_margin": max((abs(a - b) for a, b in both), default=0.0),
    }


def _pairs(original: Original, out: Path) -> list[tuple[PatchCleanserRecord, PatchCleanserRecord]]:
    """Of each image the model's record and the export's."""
    theirs = {record.index: record for record in read_folder(original.manifest.folder).records}
    return [(theirs[record.index], record) for record in read_folder(out / CERTIFICATE).records]


def _where(
    pairs: Sequence[tuple[PatchCleanserRecord, PatchCleanserRecord]], holds: Callable[[Any, Any], bool]
) -> list[PatchCleanserRecord]:
    """The export's records of the images on which something holds of both."""
    return [mine for its, mine in pairs if holds(its, mine)]


def _differ(one: PatchCleanserRecord, other: PatchCleanserRecord) -> bool:
    return _answers(one) != _answers(other)


def _answers(record: PatchCleanserRecord) -> tuple[Any, ...]:
    return record.defended_label, record.case, record.certified, record.unchangeable, record.proven


def _clear(one: PatchCleanserRecord, other: PatchCleanserRecord, least: float) -> bool:
    """Whether no view of either was so close to another label that rounding may have turned it."""
    return min(one.margin or 0.0, other.margin or 0.0) >= least


def _margin(deployed: Deployed, source: Source, record: PatchCleanserRecord) -> float:
    """The margin of the view without a mask."""
    from ..data.decode import decode

    pixels = deployed.preprocess(decode(source.open(record.index)))
    return float(deployed.graph.look(pixels, np.array([[-1, -1]]))[1][0])


def _refuse(out: Path, what: str, images: list[PatchCleanserRecord]) -> None:
    if images:
        names = ", ".join(one.name for one in images[:3])
        more = f" and {len(images) - 3} more" if len(images) > 3 else ""
        raise SoundnessError(
            f"export: its {what} differ from the model's beyond rounding on {len(images)} images ({names}"
            f"{more}); {out} is not finished and cannot be used"
        )
