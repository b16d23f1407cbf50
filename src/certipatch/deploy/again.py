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
from ..errors import RecordsError, brief
from ..models.runs import Opened
from .deployed import GRAPH, read_deployed, start
from .graph import check_libraries


class Inside(nn.Module):
    """Masked views (n, 3, H, W) float in [0, 1] to logits (n, classes): the graph behind its masks.

    Raises RecordsError for a graph in which views are not made of an image and windows at one place.
    """

    def __init__(self, folder: Path, stated: dict[str, Any]) -> None:
        super().__init__()
        self.views: int = stated["views"]
        inner = folder / GRAPH
        self._session = start(_behind_masks(inner), stated["threads"])
        self._input = self._session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        found = []
        for part in images.split(self.views):
            missing = self.views - len(part)
            filled = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]).contiguous()
            (logits,) = self._session.run(None, {self._input: filled.float().cpu().numpy()})
            found.append(np.array(logits[: len(part)]))
        return torch.from_numpy(np.concatenate(found))


def _behind_masks(path: Path) -> bytes:
    """The graph from its masked views on, as a model of its own."""
    check_libraries()
    import onnx
    from onnx.utils import Extractor

    model = onnx.load(str(path))
    # The only choice between two images by a mask is the masking itself; it is made first.
    masked = next((node.output[0] for node in model.graph.node if node.op_type == "Where"), None)
    if masked is None:
        raise RecordsError(f"{path}: expected masks in the graph, found none; export again")
    try:
        shaped = onnx.shape_inference.infer_shapes(model)
        inner: bytes = Extractor(shaped).extract_model([masked], ["logits"]).SerializeToString()
    except Exception as error:  # onnx raises whatever it likes
        raise RecordsError(f"{path}: cannot be cut behind its masks ({brief(error)})") from error
    return inner


def open_again(folder: Path) -> Opened:
    """The network of a deployed folder, as ``verify`` compares a model with what a certificate says."""
    stated = read_deployed(folder)
    try:
        spec = ModelSpec.model_validate_json(json.dumps(stated["model"]), strict=True)
    except ValidationError as error:
        raise RecordsError(f"{folder}: does not describe a model ({brief(error)}); export again") from error
    network = nn.Sequential(nn.Identity(), Inside(folder, stated)).eval()
    return Opened(spec, network, stated["trained"], stated["files"][GRAPH])
