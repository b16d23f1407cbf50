"""The network inside an exported graph, without its masking: ``verify`` lays its own masks over images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ..config import ModelSpec
from ..errors import RecordsError, SoundnessError, brief
from ..models.runs import Opened
from .deployed import GRAPH, Graph, probe_pixels, read_deployed, start
from .graph import MOST_APART, check_libraries


class Inside(nn.Module):
    """Masked views (n, 3, H, W) float in [0, 1] to logits (n, classes): the graph behind its masks.

    Raises RecordsError for a graph in which no masked views are found.
    """

    def __init__(self, folder: Path, stated: dict[str, Any]) -> None:
        super().__init__()
        self.views: int = stated["views"]
        self._session = self._started(folder, stated, 1) or self._started(folder, stated, self.views)
        self.views = self._session.get_inputs()[0].shape[0]
        self._input = self._session.get_inputs()[0].name

    def _started(self, folder: Path, stated: dict[str, Any], views: int) -> Any:
        """A session for batches of so many views; None for a graph that takes its own size only.

        ``verify`` looks at one view at a time.
        """
        graph, image = _behind_masks(folder / GRAPH, views), (views, 3, *stated["model"]["image_size"])
        try:
            session = start(graph, stated["threads"])
            (logits,) = session.run(None, {session.get_inputs()[0].name: np.zeros(image, np.float32)})
        except Exception:  # onnxruntime has classes of its own
            if views == self.views:
                raise
            return None
        return session if len(logits) == views else None

    def forward(self, images: Tensor) -> Tensor:
        found = []
        for part in torch.split(images, self.views):
            missing = self.views - len(part)
            filled = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]).contiguous()
            (logits,) = self._session.run(None, {self._input: filled.float().cpu().numpy()})
            found.append(np.array(logits[: len(part)]))
        return torch.from_numpy(np.concatenate(found))


def _behind_masks(path: Path, views: int) -> bytes:
    """The graph from its masked views on, as a model of its own for batches of so many views."""
    check_libraries()
    import onnx
    from onnx.utils import Extractor

    try:
        model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
        # The first choice between images by a mask is the masking itself.
        pictures = {each.name for each in model.graph.value_info if _has_axes(each, 4)}
        choices = (node.output[0] for node in model.graph.node if node.op_type == "Where")
        masked = next(name for name in choices if name in pictures)
        inner = Extractor(model).extract_model([masked], ["logits"])
        for each in (*inner.graph.input, *inner.graph.output):
            each.type.tensor_type.shape.dim[0].dim_value = views
        del inner.graph.value_info[:]
        return bytes(inner.SerializeToString())
    except Exception as error:  # onnx raises whatever it likes
        raise RecordsError(f"{path}: cannot be cut behind its masks ({brief(error)})") from error


def _has_axes(value: Any, axes: int) -> bool:
    return len(value.type.tensor_type.shape.dim) == axes


def _check_masks(folder: Path, stated: dict[str, Any], inside: Inside) -> None:
    """The graph must show the network what is stated: rectangles of the fill and nothing else.

    Raises SoundnessError for logits that differ from those of views that are masked here, pixel by pixel.
    """
    graph, pixels = Graph.of(folder / GRAPH, stated), probe_pixels(stated["model"]["image_size"])
    fill = np.array(stated["fill"], np.float32)[:, None, None]
    views, names = [], [-1, *range(len(stated["windows"]))]
    for name in names:
        view = (torch.from_numpy(pixels).float() / 255).numpy()  # rounds as the network's own does
        for top, left, height, width in stated["windows"][name] if name >= 0 else []:
            view[:, top : top + height, left : left + width] = fill
        views.append(view)
    expected = inside(torch.from_numpy(np.stack(views))).numpy()
    pairs = np.stack([names, np.full_like(names, -1)], axis=1)
    found = graph.logits(pixels, graph.boxes[pairs + 1].reshape(len(names), -1, 4))
    apart, most = np.abs(found - expected).max(), MOST_APART * max(1.0, float(np.abs(expected).max()))
    if not apart <= most:
        raise SoundnessError(
            f"{folder / GRAPH}: masks otherwise than is stated: logits of masked views differ by {apart:.2g} "
            f"(rounding: {most:.2g}); export again"
        )


def open_again(folder: Path) -> Opened:
    """The network of a deployed folder, as ``verify`` compares a model with what a certificate says.

    Raises RecordsError for a damaged folder, and SoundnessError for a graph that masks otherwise than stated.
    """
    stated = read_deployed(folder)
    try:
        spec = ModelSpec.model_validate_json(json.dumps(stated["model"]), strict=True)
    except ValidationError as error:
        raise RecordsError(f"{folder}: does not describe a model ({brief(error)}); export again") from error
    inside = Inside(folder, stated)
    _check_masks(folder, stated, inside)
    return Opened(
        spec, nn.Sequential(nn.Identity(), inside).eval(), stated["trained"], stated["files"][GRAPH]
    )
