"""A network with its masking as a graph of ONNX: (uint8 image, windows) -> logits of the masked views.

The exporter is not believed: exported networks have answered wrongly for months without an error (PyTorch
issues 166797, 168224, 169178). Whatever it writes is compared with the network.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.source import as_float
from ..errors import MachineError, ModelError, SoundnessError, brief
from ..geometry.masks import MaskSet
from ..views.masked import Masked
from .deployed import Graph, boxes_of, probe_pixels, start

OPSET = 20
EXPORTERS = ("dynamo", "torchscript")  # torch's new one, and where that fails the one before

# The share of the largest logit (of 1 where all are smaller) by which a logit of the graph may differ from
# the network's; measured: 1e-5 (docs/export.md).
MOST_APART = 1e-4


class Views(nn.Module):
    """The graph: an image (3, H, W) uint8 under windows (V, windows, 4) int64 to logits (V, classes)."""

    def __init__(self, network: nn.Module, fill: Tensor) -> None:
        super().__init__()
        self.masked = Masked(network, fill)

    def forward(self, pixels: Tensor, windows: Tensor) -> Tensor:
        images = as_float(pixels).expand(windows.shape[0], -1, -1, -1)
        logits: Tensor = self.masked(images, windows).float()
        return logits


def check_libraries() -> None:
    """Raises MachineError where one of the libraries is not installed that an export needs."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError as error:
            raise MachineError(
                f"export: expected the extra onnx, found no {error.name or name}; pip install "
                "'certipatch[onnx]'"
            ) from error


def views_of(masks: MaskSet) -> int:
    """How many views a batch has unless it is asked for: so that the first round, a view for each mask and
    one without, fills batches of at most some million pixels evenly."""
    height, width = masks.image_size
    most, first_round = max(8, min(64, 2**20 // (height * width))), len(masks) + 1
    return -(-first_round // -(-first_round // most))


def write_graph(
    network: nn.Module, fill: Tensor, masks: MaskSet, path: Path, *, views: int, threads: int
) -> dict[str, Any]:
    """Export a network, and compare the graph with it.

    Returns which exporter wrote it, how far logits are apart at most, and how far a margin moves with what
    else is in a batch. Raises ModelError for a network that cannot be exported, or whose graph answers
    otherwise.
    """
    module = Views(network, fill).eval()
    boxes = boxes_of(masks.to_json()["windows"])
    why = []
    for exporter in EXPORTERS:
        try:
            _export(module, boxes, masks, path, exporter, views)
            graph = Graph(start(path, threads), views, boxes)
            apart = compare(graph, module, masks)
        except Exception as error:  # noqa: BLE001, an exporter fails in any way
            why.append(f"{exporter}: {type(error).__name__}: {brief(error, 100)}")
            continue
        return {"exporter": exporter, "opset": OPSET, "apart": apart, "moved": movement(graph, masks)}
    raise ModelError(f"export: the network cannot be exported ({'; '.join(why)})")


@torch.no_grad()
def _export(module: Views, boxes: np.ndarray, masks: MaskSet, path: Path, exporter: str, views: int) -> None:
    windows = torch.zeros(views, 2 * boxes.shape[1], 4, dtype=torch.int64)
    example = torch.zeros(3, *masks.image_size, dtype=torch.uint8), windows
    dynamo: dict[str, Any] = {"external_data": False, "verbose": False} if exporter == "dynamo" else {}
    how = {"dynamo": exporter == "dynamo", **dynamo}
    module(*example)  # some networks settle on their padding in the first pass
    with _quiet():
        torch.onnx.export(
            module,
            example,
            str(path),
            input_names=["pixels", "windows"],
            output_names=["logits"],
            opset_version=OPSET,
            **how,
        )


@contextmanager
def _quiet() -> Any:
    """A block in which an exporter says nothing, neither in warnings nor in a log nor on standard output."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def pictures(image_size: Sequence[int]) -> list[np.ndarray]:
    """Pictures (3, H, W) uint8 on which graph and network are compared: stripes, noise, black and white."""
    stripes = probe_pixels(image_size)
    noise = np.random.default_rng(0).integers(0, 256, stripes.shape, dtype=np.uint8)
    return [stripes, noise, np.zeros_like(stripes), np.full_like(stripes, 255)]


@torch.inference_mode()
def compare(graph: Graph, module: Views, masks: MaskSet) -> float:
    """How far a logit of the graph is from the network's at most, over views of some pictures.

    Raises SoundnessError if that is more than rounding.
    """
    rng, most, scale = np.random.default_rng(1), 0.0, 1.0
    for number, pixels in enumerate(pictures(masks.image_size)):
        pairs = rng.integers(-1, len(masks), (graph.views, 2))
        if number == 0:  # each mask once
            one = np.arange(-1, len(masks))
            pairs = np.stack([one, np.full_like(one, -1)], axis=1)
        windows = graph.boxes[pairs + 1].reshape(len(pairs), -1, 4)
        found = graph.logits(pixels, windows)
        parts = torch.split(torch.from_numpy(windows), graph.views)
        expected = torch.cat([module(torch.from_numpy(pixels), part) for part in parts]).numpy()
        if found.shape != expected.shape:
            raise SoundnessError(f"it answers {found.shape} logits, the network {expected.shape}")
        most = max(most, float(np.nan_to_num(np.abs(found - expected), nan=np.inf).max()))
        scale = max(scale, float(np.abs(expected).max()))
    if not most <= MOST_APART * scale:
        raise SoundnessError(
            f"it answers otherwise than the network, by {most:.2g} logits (rounding: "
            f"{MOST_APART * scale:.2g})"
        )
    return most


def movement(graph: Graph, masks: MaskSet) -> float:
    """How far the margin of a view moves at most with what else is in its batch, and at which place it is.

    Raises SoundnessError for a view whose label or logits depend on more than rounding.
    """
    moved = 0.0
    for pixels in pictures(masks.image_size)[:2]:
        one = np.arange(-1, len(masks))
        pairs = np.stack([one, np.full_like(one, -1)], axis=1)
        labels, margins = graph.look(pixels, pairs)
        for number in (0, len(one) // 2, len(one) - 1):
            alone = graph.look(pixels, pairs[number : number + 1])
            order = np.roll(np.arange(len(one)), 1 - number)
            turned = graph.look(pixels, pairs[order])
            place = int(np.flatnonzero(order == number)[0])
            for label, margin in ((alone[0][0], alone[1][0]), (turned[0][place], turned[1][place])):
                same = label == labels[number]
                gap = margin - margins[number] if same else margin + margins[number]
                moved = max(moved, abs(float(gap)))
    limit = MOST_APART * 10
    if not moved <= limit * max(1.0, float(margins.max())):
        raise SoundnessError(
            f"export: its answer to a view moves by {moved:.2g} logits with what else is in the batch"
        )
    return moved
