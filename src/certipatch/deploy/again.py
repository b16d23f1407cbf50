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
        shape = (3, *stated["model"]["image_size"])
        for self.views in (1, stated["views"]):  # verify looks at one view at a time
            self._session = start(_behind_masks(folder / GRAPH, self.views), stated["threads"])
            self._input = self._session.get_inputs()[0].name
            if self._takes(np.zeros((self.views, *shape), np.float32)):
                break

    def forward(self, images: Tensor) -> Tensor:
        found = []
        for part in torch.split(images, self.views):
            missing = self.views - len(part)
            filled = torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]).contiguous()
            (logits,) = self._session.run(None, {self._input: filled.float().cpu().numpy()})
            found.append(np.array(logits[: len(part)]))
        return torch.from_numpy(np.concatenate(found))

    def _takes(self, views: np.ndarray) -> bool:
        """Whether the graph takes batches of this size, for which it was not made; some networks do."""
        try:
            (logits,) = self._session.run(None, {self._input: views})
        except Exception:  # noqa: BLE001, onnxruntime has classes of its own
            return False
        return len(logits) == len(views)


def _behind_masks(path: Path, views: int) -> bytes:
    """The graph from its masked views on, as a model of its own for batches of so many views."""
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
        inner = Extractor(shaped).extract_model([masked], ["logits"])
        for each in (*inner.graph.input, *inner.graph.output):
            each.type.tensor_type.shape.dim[0].dim_value = views
        del inner.graph.value_info[:]
        return bytes(inner.SerializeToString())
    except Exception as error:  # onnx raises whatever it likes
        raise RecordsError(f"{path}: cannot be cut behind its masks ({brief(error)})") from error


def open_again(folder: Path) -> Opened:
    """The network of a deployed folder, as ``verify`` compares a model with what a certificate says."""
    stated = read_deployed(folder)
    try:
        spec = ModelSpec.model_validate_json(json.dumps(stated["model"]), strict=True)
    except ValidationError as error:
        raise RecordsError(f"{folder}: does not describe a model ({brief(error)}); export again") from error
    network = nn.Sequential(nn.Identity(), Inside(folder, stated)).eval()
    return Opened(spec, network, stated["trained"], stated["files"][GRAPH])
