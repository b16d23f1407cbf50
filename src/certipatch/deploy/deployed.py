"""The exported predictor: a graph that ONNX Runtime runs, and Algorithm 1 and the proof around it.

It needs numpy, Pillow and onnxruntime only. ``bundle.py`` puts this file and those that it imports behind one
another: that is the ``runner.py`` of a deployed folder, which needs no CertiPatch.

A graph is another function than the network that it was exported from: its certificates are those that were
made with it. Each of its batches has the same number of views, the last view repeated to fill it, and the
number of threads is fixed; a probe at the start holds it to answer as it did where it was certified.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..config import parse_json
from ..data.decode import decode, open_bytes
from ..data.pillow import preprocess
from ..defenses.patchcleanser.examination import Answers, PatchCleanserVerdict
from ..defenses.patchcleanser.schedule import Schedule
from ..errors import ConfigError, MachineError, RecordsError, SoundnessError, brief
from ..geometry.coverage import uncovered_patches
from ..geometry.patch import Threat, Window
from ..records.seals import sha256, unseal
from .said import Said

DEPLOYED = "defended.json"
GRAPH = "defended.onnx"
RUNNER = "runner.py"
FORMAT = 1


def is_deployed(folder: Path) -> bool:
    """Whether ``export`` has finished a folder."""
    return (folder / DEPLOYED).is_file()


def read_deployed(folder: Path) -> dict[str, Any]:
    """What a deployed folder says of itself.

    Raises RecordsError if there is nothing, it is damaged or changed, or its graph is another one.
    """
    path, graph = folder / DEPLOYED, folder / GRAPH
    if not path.is_file():
        raise ConfigError(f"{folder}: expected a folder that export wrote, with {DEPLOYED}; found none")
    try:
        written = parse_json(path.read_bytes())
        if not isinstance(written, dict):
            raise ValueError("not an object")
        stated = unseal(written)
        if stated["format"] != FORMAT or stated["kind"] != "deployed":
            raise ValueError(f"format {stated['format']} of {stated['kind']}")
        found, expected = sha256(graph.read_bytes()), stated["files"][GRAPH]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecordsError(f"{path}: damaged ({brief(error, 100)}); export again") from error
    if found != expected:
        raise RecordsError(
            f"{graph}: expected sha256 {expected[:12]}..., found {found[:12]}...; it is not the graph that "
            "was certified: export again"
        )
    return dict(stated)


def start(graph: Path | bytes, threads: int) -> Any:
    """A session of ONNX Runtime on the CPU, as deterministic as it can be made; of a file, or its bytes.

    Raises MachineError without onnxruntime, and RecordsError for a file that is no graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MachineError(
            f"onnxruntime: not installed here ({brief(error, 60)}); pip install onnxruntime, or "
            "'certipatch[onnx]' which brings it"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = 4  # what is wrong it raises, and so need not print
    try:
        model = graph if isinstance(graph, bytes) else str(graph)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it raises classes of its own for whatever is wrong with a graph
        name = "the graph" if isinstance(graph, bytes) else graph
        raise RecordsError(f"{name}: onnxruntime cannot load it ({brief(error)}); export again") from error


@dataclass(frozen=True)
class Graph:
    """The session, and how it is called.

    Attributes:
        views: how many views there are in each of its batches.
        boxes: (masks + 1, windows, 4) int64: top, left, bottom, right; the first mask hides nothing.
    """

    session: Any
    views: int
    boxes: np.ndarray

    @classmethod
    def of(cls, path: Path, stated: dict[str, Any]) -> Graph:
        return cls(start(path, stated["threads"]), stated["views"], boxes_of(stated["windows"]))

    def logits(self, pixels: np.ndarray, windows: np.ndarray) -> np.ndarray:
        """The logits (n, classes) of an image (3, H, W) uint8 under windows (n, 2 x windows, 4)."""
        found = []
        for begin in range(0, len(windows), self.views):
            part = windows[begin : begin + self.views]
            filled = np.concatenate([part, np.repeat(part[-1:], self.views - len(part), axis=0)])
            (logits,) = self.session.run(None, {"pixels": pixels, "windows": filled})
            found.append(logits[: len(part)])
        return np.concatenate(found)

    def look(self, pixels: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The labels and the margins (n,) of an image under masks i and j of each of (n, 2) pairs.

        -1 stands for no mask. The label is the first of equals. Raises SoundnessError for logits that are
        no numbers.
        """
        boxes = self.boxes[pairs + 1]  # (n, 2, windows, 4)
        logits = self.logits(pixels, boxes.reshape(len(pairs), -1, 4))
        if not np.isfinite(logits).all():
            raise SoundnessError("model output: expected finite logits, found NaN or infinity; export again")
        best = np.partition(logits, -2, axis=1)[:, -2:]
        return logits.argmax(axis=1), best[:, 1] - best[:, 0]


def boxes_of(windows: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
    """Masks as the graph takes them: see :class:`Graph`; masks with fewer windows are filled up with empty
    ones."""
    boxes = np.zeros((len(windows) + 1, max(map(len, windows)), 4), dtype=np.int64)
    for number, mask in enumerate(windows, start=1):
        for place, (top, left, height, width) in enumerate(mask):
            boxes[number, place] = top, left, top + height, left + width
    return boxes


def probe_pixels(image_size: Sequence[int]) -> np.ndarray:
    """A picture (3, H, W) uint8 of stripes that is the same everywhere."""
    height, width = image_size
    y, x = np.arange(height)[:, None], np.arange(width)
    return np.stack([(y * (3 + c) + x * (5 - c) + 60 * c + (y * x) // 40) % 256 for c in range(3)]).astype(
        np.uint8
    )


@dataclass(frozen=True)
class Deployed:
    """An exported predictor, ready to answer; it has what the service needs of a model."""

    stated: dict[str, Any]
    graph: Graph

    @classmethod
    def open(cls, folder: Path) -> Deployed:
        """The predictor in a folder that ``export`` wrote.

        Raises RecordsError for a folder that is damaged or changed, MachineError without onnxruntime, and
        SoundnessError for masks with a gap or a graph that answers otherwise than where it was certified.
        """
        stated = read_deployed(folder)
        check_masks(stated)
        found = cls(stated, Graph.of(folder / GRAPH, stated))
        found.check_probe()
        return found

    @cached_property
    def said(self) -> Said:
        """Its answers in words."""
        keys = ("shown", "threat", "way", "least", "windows")
        model, known = self.stated["model"], {key: self.stated[key] for key in keys}
        return Said(classes=model["classes"], image_size=model["image_size"], **known)

    def check_probe(self) -> None:
        """Look at a picture that was looked at when it was exported.

        Raises SoundnessError if an answer or a margin is another one, beyond what rounding moves.
        """
        pixels, expected = probe_pixels(self.stated["model"]["image_size"]), self.stated["probe"]
        labels, margins = self.first_round(pixels, len(expected["labels"]))
        there, gaps = np.array(expected["labels"]), np.array(expected["margins"])
        moved = np.where(labels == there, np.abs(margins - gaps), margins + gaps)
        if not moved.max() <= self.said.least:
            raise SoundnessError(
                f"deployed: its margins move by {moved.max():.2g} logits from those where it was certified "
                f"(rounding: {self.said.least:.2g}); onnxruntime {_runtime()} computes otherwise on this "
                f"machine than {self.stated['versions']['onnxruntime']} there: export and certify here"
            )

    def first_round(self, pixels: np.ndarray, views: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Labels and margins (masks + 1,) without a mask and under each; or of so many of these views."""
        one = np.arange(-1, len(self.graph.boxes) - 1)[:views]
        return self.graph.look(pixels, np.stack([one, np.full_like(one, -1)], axis=1))

    def examine(
        self, pixels: np.ndarray, label: int | None = None, *, prove: bool, places: bool = False
    ) -> PatchCleanserVerdict:
        """The verdict on an image (3, H, W) uint8; with its label the certificate too (Algorithm 2)."""
        answers = Answers.of_first_round(*self.first_round(pixels))
        masks, how = len(answers.labels), {"prove": prove, "places": places}
        inference = self.said.way["inference"]
        schedule = Schedule(np.zeros((masks, masks), dtype=bool), inference=inference, **how)
        undecided = schedule.add(0, answers.labels, label, answers.order)
        while undecided:
            views, _ = schedule.next(self.graph.views)
            pairs = np.array(views)[:, 1:]
            labels, margins = self.graph.look(pixels, pairs)
            answers.margins[pairs[:, 0], pairs[:, 1]] = margins
            undecided = not schedule.tell(views, labels.tolist())
        return answers.verdict(label, inference, **how)

    def preprocess(self, image: Any) -> np.ndarray:
        """The pixels (3, H, W) uint8 that the model sees of an upright RGB picture."""
        return preprocess(image, self.stated["model"])

    def read(self, data: bytes) -> np.ndarray:
        """The pixels that the model sees of the bytes of an image file.

        Raises one of ``data.decode.UNREADABLE``.
        """
        return self.preprocess(decode(open_bytes(data)))

    def answer(self, pixels: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """The answer to each image (3, H, W) uint8, as JSON."""
        return [self.said.plain(self.examine(each, prove=False)) for each in pixels]

    def prove(self, pixels: Sequence[np.ndarray], *, places: bool = False) -> list[dict[str, Any]]:
        """The same, and what is proven of each answer: of all places of the patch, or by place too."""
        return [self.said.proven(self.examine(each, prove=True, places=places)) for each in pixels]

    def look(self, pixels: np.ndarray, *, prove: bool) -> dict[str, Any]:
        """The answer to one image, or its proof, also by place, with what a person wants to see of the views
        behind it."""
        return self.said.seen(self.examine(pixels, prove=prove, places=prove), prove=prove)

    def about(self) -> dict[str, Any]:
        """What does not depend on the image: classes, image size, threat, masks and certificate, as JSON."""
        stated = self.stated
        return {
            "model": stated["model"]["arch"],
            "classes": stated["model"]["classes"],
            "shown": stated["shown"],
            "image_size": stated["model"]["image_size"],
            **self.said.threat,
            **self.said.way,
            "windows": stated["windows"],
            "min_margin": self.said.least,
            "onnx_sha256": stated["files"][GRAPH],
            "onnxruntime": {"here": _runtime(), "certified": stated["versions"]["onnxruntime"]},
            **(stated["certificate"] or {"certificate": None}),
        }


def check_masks(stated: dict[str, Any]) -> None:
    """Every place of the patch is tried. Raises SoundnessError if no mask hides the patch at one of them."""
    masks = [tuple(Window(*window) for window in mask) for mask in stated["windows"]]
    size = stated["model"]["image_size"]
    hole = uncovered_patches(masks, (size[0], size[1]), Threat.of(stated["threat"]))
    if hole is not None:
        raise SoundnessError(
            f"masks: expected every patch to be covered, found {' with '.join(map(str, hole))} that no mask "
            "covers; export again"
        )


def _runtime() -> str:
    return str(getattr(sys.modules.get("onnxruntime"), "__version__", "?"))
