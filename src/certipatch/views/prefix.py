"""The shared local prefix: what the first layers of a CNN make of an image under two masks, without running
them again.

Up to some stage a CNN is local: a mask changes only the activations near its windows (its *reach*). Where the
reaches of two masks do not meet, the activations under both are those under the one, with the reach of the
other pasted from those under the other. So the layers up to there (the *head*) run for the one-mask views
only; the rest (the *tail*) runs for all.

Source: Krypton (Nakandala, Kumar, Papakonstantinou; SIGMOD 2019) computes occlusion maps incrementally in
this way, inside a patch; here nothing at all is computed in the head for a pair of masks that do not meet.

The reach of each mask is measured, with NaN under the mask, and holds for every picture: the head ends before
the first operation that is not known to carry NaN on to all that can depend on it (``CARRY_NAN``), such as a
comparison. Nothing is assumed about layers, which are made of such operations; and pasted activations are
compared with computed ones before they are used.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError
from ..geometry.masks import MaskSet
from ..runtime.console import stderr
from .masked import mask_images, visible, window_tensor

WORTH = 0.05  # of the time of all pairs: a prefix that saves less is left alone


TOGETHER = 16  # views in a batch here


# torch's operations on floats of which each output is NaN if any input is that it depends on, for whatever
# values of the others (max_pool2d is one, topk and where are none). What is missing here only makes a prefix
# shorter.
CARRY_NAN = frozenset(
    """
    conv1d conv2d convolution linear batch_norm native_batch_norm cudnn_batch_norm layer_norm native_layer_norm
    group_norm native_group_norm instance_norm add addcmul sub mul div neg mean sum
    relu hardtanh leaky_relu prelu elu gelu silu mish softplus sigmoid tanh hardsigmoid hardswish dropout
    max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d
    pad constant_pad_nd reflection_pad2d replication_pad2d cat stack chunk split split_with_sizes select slice narrow
    permute transpose view _unsafe_view reshape reshape_as flatten unflatten squeeze unsqueeze expand expand_as
    pixel_shuffle pixel_unshuffle clone contiguous alias detach
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class SharedPrefix:
    """A network cut in two behind a local layer, ``tail(head(x)) = network(x)``.

    Attributes:
        layer: the name of the last node of the head in the network's graph.
        head: (N, 3, H, W) images -> (N, a, b, c) activations. tail: activations -> (N, classes) logits.
        reach: (masks, b, c, 1) bool, the activations that a mask can change.
        apart: (masks, masks) bool, True where the reaches of two masks do not meet.
        saved: the share of the time of all pairs that pasting saves, as estimated.
    """

    layer: str
    head: nn.Module
    tail: nn.Module
    reach: Tensor
    apart: Tensor
    saved: float

    def paste(self, one: Tensor, other: Tensor, mask: Tensor) -> Tensor:
        """The head's activations under two masks that are apart: those under the ``one``, and in the reach of
        the other ``mask`` (V,)
        those under the ``other``. Here activations are (V, b, c, a), channels last, as memory holds them."""
        return torch.where(self.reach[mask], other, one)


@torch.inference_mode()
def find(model: nn.Module, masks: MaskSet, *, layer: str | None = None) -> SharedPrefix | None:
    """The cut of a model that saves most, or None if the model cannot be traced or has no local layers worth
    it.

    Args:
        model: maps (N, 3, H, W) float to (N, classes), in evaluation mode; on any device.
        layer: this cut, as an earlier run has found it.

    Raises:
        ConfigError: ``layer`` is given, and the model cannot be cut there.
    """
    found = _find(model, masks, layer)
    if layer is not None and found is None:
        raise ConfigError(
            f"shared prefix {layer!r}: expected a local layer of this model, found none; start again "
            "without it"
        )
    return found


def _find(model: nn.Module, masks: MaskSet, layer: str | None) -> SharedPrefix | None:
    if model._forward_hooks or model._forward_pre_hooks:  # which tracing does not see
        return None
    parameter = next(model.parameters(), torch.zeros(()))
    noise = torch.rand(1, 3, *masks.image_size, generator=torch.Generator().manual_seed(0)).to(parameter)
    try:
        graph = _Tracer().trace(model)
        module = torch.fx.GraphModule(model, graph)
        reach = _Reach(module, _cuts(graph))
        for windows in torch.split(window_tensor(masks, noise.device), TOGETHER):
            reach.look(_views(noise, windows, masks, torch.nan))
        clock = _Clock(module, reach.found)
        for _ in range(3):  # of which the quickest counts
            clock.run(noise.repeat(4, 1, 1, 1).contiguous(memory_format=torch.channels_last))
    except Exception:  # noqa: BLE001, whatever a model does that tracing cannot follow, or with NaN
        return None
    pairs = len(masks) * (len(masks) - 1) / 2
    best: tuple[float, torch.fx.Node, Tensor] | None = None
    for node, parts in reach.found.items():
        reached = torch.cat(parts)
        if len(reached) < len(masks) or layer not in (None, node.name) or not _apart(reached).any():
            continue
        saved = float(_apart(reached).sum() / 2 / pairs) * clock.saved(node)
        if (saved >= WORTH or layer is not None) and (best is None or saved > best[0]):
            best = (saved, node, reached)
    if best is None:
        return None
    saved, node, reached = best
    head, tail = _split(model, graph, node)
    found = SharedPrefix(node.name, head, tail, reached.unsqueeze(3), _apart(reached), saved)
    if not _equal(found, model, masks, noise):
        stderr.print(
            f"shared prefix: not used, pasting at {node.name} does not give what the model computes",
            markup=False,
        )
        return None
    return found


def _apart(reach: Tensor) -> Tensor:
    """(masks, masks) bool: which of the regions (masks, b, c) share nothing."""
    flat = reach.flatten(1).float()
    return flat @ flat.T == 0


def _equal(prefix: SharedPrefix, model: nn.Module, masks: MaskSet, noise: Tensor) -> bool:
    """Whether pasting gives what the model computes, on noise, with each mask pasted into the view of one
    that is apart from it."""
    every = window_tensor(masks, noise.device)
    pasted_ones = prefix.apart.any(dim=1).nonzero()[:, 0]
    for j in torch.split(pasted_ones, TOGETHER):
        i = prefix.apart[j].int().argmax(dim=1)
        one, other = (
            prefix.head(_views(noise, every[mask], masks, 0.0)).permute(0, 2, 3, 1) for mask in (i, j)
        )
        pasted = prefix.paste(one, other, j).permute(0, 3, 1, 2)
        both = _views(noise, torch.cat([every[i], every[j]], dim=1), masks, 0.0)
        if not _close(pasted, prefix.head(both)):
            return False
        if not _close(prefix.tail(pasted), model(both)):
            return False
    return True


def _close(found: Any, expected: Any) -> bool:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    found, expected = found.float(), expected.float()
    if not expected.isfinite().all():  # refused when it is used
        return False
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def _views(image: Tensor, windows: Tensor, masks: MaskSet, fill: float) -> Tensor:
    """The image (1, 3, H, W) under each of (V, windows, 4)."""
    return mask_images(image.expand(len(windows), -1, -1, -1), visible(windows, masks.image_size), fill)


class _Tracer(torch.fx.Tracer):
    """Modules without parts are one step: also timm's and a user's own, whatever control flow is in them."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not any(True for _ in module.children())


def _cuts(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The nodes behind which nothing but their own value is needed."""
    alive: set[torch.fx.Node] = set()
    cuts = []
    for node in graph.nodes:
        if node.op == "get_attr":  # a weight: both parts may have it
            continue
        alive -= {used for used in node.all_input_nodes if list(used.users)[-1] is node}
        if node.users:
            alive.add(node)
        if alive == {node} and node.op not in ("placeholder", "output"):
            cuts.append(node)
    return cuts


def _split(model: nn.Module, graph: torch.fx.Graph, cut: torch.fx.Node) -> tuple[nn.Module, nn.Module]:
    """The graph up to the node, and the graph from there on. They share the model's weights."""
    head, tail = torch.fx.Graph(), torch.fx.Graph()
    in_head: dict[torch.fx.Node, torch.fx.Node] = {}
    in_tail: dict[torch.fx.Node, torch.fx.Node] = {}
    passed = False
    for node in graph.nodes:
        if node.op == "get_attr":
            in_head[node], in_tail[node] = head.node_copy(node), tail.node_copy(node)
        elif passed:
            in_tail[node] = tail.node_copy(node, in_tail.__getitem__)
        else:
            in_head[node] = head.node_copy(node, in_head.__getitem__)
        if node is cut:
            passed = True
            head.output(in_head[node])
            in_tail[node] = tail.placeholder("activations")
    parts = torch.fx.GraphModule(model, head).eval(), torch.fx.GraphModule(model, tail).eval()
    for part in parts:  # the weights of the other
        part.graph.eliminate_dead_code()
        part.recompile()
    return parts


class _Reach(torch.fx.Interpreter):
    """Runs the network node by node, to see behind each cut what masks reach."""

    def __init__(self, module: torch.fx.GraphModule, cuts: list[torch.fx.Node]) -> None:
        super().__init__(module)
        self.cuts = set(cuts)
        self.found: dict[torch.fx.Node, list[Tensor]] = {}

    def look(self, views: Tensor) -> None:
        """Views with NaN under a mask each, up to where what follows is not local, or not known to be."""
        self.views = len(views)
        with suppress(_NotLocal):
            self.run(views)

    def run_node(self, node: torch.fx.Node) -> Any:
        with _Watch() as watch:  # type: ignore[no-untyped-call]
            value = super().run_node(node)
        if not watch.carried:
            raise _NotLocal
        # One row an image: parts of images in rows of their own would be taken for images.
        if (
            node in self.cuts
            and isinstance(value, Tensor)
            and value.ndim == 4
            and len(value) == self.views
            and min(value.shape[2:]) > 1
        ):
            self.found.setdefault(node, []).append(value.isnan().any(dim=1))
            if self.found[node][-1].all():
                raise _NotLocal
        return value


class _NotLocal(Exception):  # noqa: N818, no error
    pass


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether all that torch does meanwhile, inside of whatever module, carries NaN on."""

    carried = True

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        known = operation.overloadpacket.__name__.removesuffix("_") in CARRY_NAN and all(
            each.is_floating_point() for each in tensors
        )
        known &= operation._overloadname != "dtype"  # view(dtype): the same bits as other numbers
        self.carried &= known or not tensors
        return operation(*args, **(kwargs or {}))


class _Clock(torch.fx.Interpreter):
    """Runs the network node by node, to see how long it takes to come to each cut."""

    def __init__(self, module: torch.fx.GraphModule, cuts: Iterable[torch.fx.Node]) -> None:
        super().__init__(module)
        self.seconds: dict[torch.fx.Node, float] = {}
        self.paste_seconds = dict.fromkeys(cuts, inf)

    def saved(self, cut: torch.fx.Node) -> float:
        """The share of the time of the whole network that is spent up to the cut, less what pasting costs
        there."""
        order = list(self.seconds)
        until = sum(self.seconds[node] for node in order[: order.index(cut) + 1])
        return (until - self.paste_seconds[cut]) / sum(self.seconds.values())

    def run_node(self, node: torch.fx.Node) -> Any:
        started = time.perf_counter()
        value = super().run_node(node)
        self.seconds[node] = min(_since(started, value), self.seconds.get(node, inf))
        if node in self.paste_seconds:
            started = time.perf_counter()
            for _ in range(3):  # of which two stand for fetching the activations
                torch.where(value > 0, value, value)
            self.paste_seconds[node] = min(_since(started, value), self.paste_seconds[node])
        return value


def _since(started: float, value: Any) -> float:
    if isinstance(value, Tensor) and value.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
