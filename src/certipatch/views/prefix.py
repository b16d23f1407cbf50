"""The shared local prefix: a CNN's first layers under two masks, pasted together from those under one.

Up to some stage a CNN is local: a mask changes only the activations near its windows (its *reach*). Where the
reaches of two masks do not meet, the activations under both masks are those under the first, with the reach
of the second mask pasted from the activations under the second. So the layers up to that stage (the *head*)
run for the one-mask views only; the layers behind it (the *tail*) run for all views.

Source: Krypton (Nakandala, Kumar, Papakonstantinou; SIGMOD 2019) computes occlusion maps incrementally in
this way, inside a patch; here the head computes nothing at all for a pair of masks that do not meet.

The reach of each mask is measured, with NaN under the mask, and holds for every picture: the head ends before
the first operation that is not known to carry NaN on to all that can depend on it (``CARRY_NAN``), such as a
comparison. Nothing is assumed about layers, which are made of such operations; and pasted activations are
compared with computed ones before the prefix is used.
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import ConfigError
from ..runtime.console import stderr
from .masked import Hiding, mask_images, visible, window_tensor

LEAST_SAVED = 0.05  # The share of the time of all pairs that a prefix must save to be used.
TRIAL_BATCH_SIZE = 16  # Views in a forward pass while a prefix is looked for and tried.

# torch's operations on floats whose outputs are NaN wherever an input that they depend on is NaN, whatever
# the other inputs are (max_pool2d is such an operation; topk and where are not). An operation that is missing
# here only makes a prefix shorter.
CARRY_NAN = frozenset(
    """
    conv1d conv2d convolution linear batch_norm native_batch_norm cudnn_batch_norm layer_norm
    native_layer_norm group_norm native_group_norm instance_norm add addcmul sub mul div neg mean sum
    relu hardtanh leaky_relu prelu elu gelu silu mish softplus sigmoid tanh hardsigmoid hardswish dropout
    max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d
    pad constant_pad_nd reflection_pad2d replication_pad2d cat stack chunk split split_with_sizes select slice
    narrow permute transpose view _unsafe_view reshape reshape_as flatten unflatten squeeze unsqueeze expand
    expand_as pixel_shuffle pixel_unshuffle clone contiguous alias detach
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class SharedPrefix:
    """A network cut in two behind a local layer, ``tail(head(x)) = network(x)``.

    Attributes:
        layer: the name of the last node of the head in the network's graph.
        head: maps images (N, 3, H, W) to activations (N, a, b, c).
        tail: maps activations to logits (N, classes).
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
        """The head's activations of V views under two masks that are apart.

        Args:
            one: the activations under the first mask alone, (V, b, c, a): channels last, as in memory.
            other: the activations under the second mask alone, which are taken within its reach.
            mask: (V,) the number of the second mask.
        """
        return torch.where(self.reach[mask], other, one)


@torch.inference_mode()
def find(model: nn.Module, masks: Hiding, *, layer: str | None = None) -> SharedPrefix | None:
    """The model cut where that saves most; None if it cannot be traced, or has no local layers worth it.

    Args:
        model: maps (N, 3, H, W) float to (N, classes), in evaluation mode; on any device.
        layer: cut the model behind this layer, as an earlier run has found it.

    Raises:
        ConfigError: ``layer`` is given, and the model cannot be cut there.
    """
    found = _find(model, masks, layer)
    if layer is not None and found is None:
        raise ConfigError(
            f"shared prefix {layer!r}: expected a local layer of this model, found none; start again without "
            "it"
        )
    return found


def _find(model: nn.Module, masks: Hiding, layer: str | None) -> SharedPrefix | None:
    parameter = next(model.parameters(), torch.zeros(()))
    noise = torch.rand(1, 3, *masks.image_size, generator=torch.Generator().manual_seed(0)).to(parameter)
    least = LEAST_SAVED if layer is None else -inf
    cuts = [cut for cut in _local_cuts(model, masks, noise, layer) if cut.saved >= least]
    if not cuts:
        return None
    best = max(cuts, key=lambda cut: cut.saved)
    head, tail = _split(model, best.node)
    found = SharedPrefix(best.node.name, head, tail, best.reach.unsqueeze(3), best.apart, best.saved)
    if not _equal(found, model, masks, noise):
        reason = f"pasting at {found.layer} does not give what the model computes"
        stderr.print(f"shared prefix: not used, {reason}", markup=False)
        return None
    return found


@dataclass(frozen=True)
class _Cut:
    """A node behind which a network can be cut, with the ``reach``, ``apart`` and ``saved`` of the prefix.

    ``reach`` is (masks, b, c) here.
    """

    node: torch.fx.Node
    reach: Tensor
    apart: Tensor
    saved: float


def _local_cuts(model: nn.Module, masks: Hiding, noise: Tensor, layer: str | None) -> list[_Cut]:
    """The cuts behind local layers where some masks are apart; only that behind ``layer``, if one is given.

    There is none if the model cannot be traced or measured, or has hooks, which tracing does not see.
    """
    if model._forward_hooks or model._forward_pre_hooks:
        return []
    try:
        graph = _Tracer().trace(model)
        module = torch.fx.GraphModule(model, graph)
        refuse_numbers_out_of_sight(module, noise)
        reach = _Reach(module, _cuts(graph))
        for windows in torch.split(window_tensor(masks, noise.device), TRIAL_BATCH_SIZE):
            reach.look(_views(noise, windows, masks, torch.nan))
        clock = _Clock(module, reach.found)
        for _ in range(3):  # the quickest run counts
            clock.run(noise.repeat(4, 1, 1, 1).contiguous(memory_format=torch.channels_last))
    except Exception:  # noqa: BLE001, a model that cannot be traced, or meets NaN, raises anything
        return []
    pairs, cuts = len(masks) * (len(masks) - 1) / 2, []
    for node, parts in reach.found.items():
        reached = torch.cat(parts)
        if len(reached) == len(masks) and layer in (None, node.name):  # the reach of every mask was measured
            apart = _apart(reached)
            if apart.any():
                saved = float(apart.sum() / 2 / pairs) * clock.saved(node)
                cuts.append(_Cut(node, reached, apart, saved))
    return cuts


def refuse_numbers_out_of_sight(module: nn.Module, noise: Tensor) -> None:
    """Raises an exception of torch's if the network takes numbers out of tensors, into numpy for example.

    What is computed there, no operation of torch's tells. Tensors without numbers (fake ones) bring it to
    light.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as without_numbers:
        module(without_numbers.from_tensor(noise))


def _apart(reach: Tensor) -> Tensor:
    """(masks, masks) bool: which of the regions (masks, b, c) have no place in common."""
    flat = reach.flatten(1).float()
    return flat @ flat.T == 0


def _equal(prefix: SharedPrefix, model: nn.Module, masks: Hiding, noise: Tensor) -> bool:
    """Whether pasting gives what the model computes on noise, in the activations and in the logits.

    Each mask that can be pasted is, into the view under a mask that is apart from it.
    """
    every = window_tensor(masks, noise.device)
    pasted_ones = prefix.apart.any(dim=1).nonzero()[:, 0]
    for j in torch.split(pasted_ones, TRIAL_BATCH_SIZE):
        i = prefix.apart[j].int().argmax(dim=1)
        one, other = (
            prefix.head(_views(noise, every[mask], masks, 0.0)).permute(0, 2, 3, 1) for mask in (i, j)
        )
        pasted = prefix.paste(one, other, j).permute(0, 3, 1, 2)
        both = _views(noise, torch.cat([every[i], every[j]], dim=1), masks, 0.0)
        if not _close(pasted, prefix.head(both)) or not _close(prefix.tail(pasted), model(both)):
            return False
    return True


def _close(found: Any, expected: Any) -> bool:
    """Whether two outputs of a model are finite tensors that differ by rounding only."""
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    found, expected = found.float(), expected.float()
    if not expected.isfinite().all():  # a defense refuses such a model when it first uses it
        return False
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def _views(image: Tensor, windows: Tensor, masks: Hiding, fill: float) -> Tensor:
    """(V, 3, H, W): the image (1, 3, H, W) under each of the windows (V, windows, 4)."""
    return mask_images(image.expand(len(windows), -1, -1, -1), visible(windows, masks.image_size), fill)


class _Tracer(torch.fx.Tracer):
    """Traces a module without parts as one step, so that control flow inside of it does not matter."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not any(True for _ in module.children())


def _cuts(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The nodes behind which nothing is needed but their own value, so that the graph can be cut there."""
    alive: set[torch.fx.Node] = set()
    cuts = []
    for node in graph.nodes:
        if node.op == "get_attr":  # a weight, which both parts may have
            continue
        alive -= {used for used in node.all_input_nodes if list(used.users)[-1] is node}
        if node.users:
            alive.add(node)
        if alive == {node} and node.op not in ("placeholder", "output"):
            cuts.append(node)
    return cuts


def _split(model: nn.Module, cut: torch.fx.Node) -> tuple[nn.Module, nn.Module]:
    """The model up to a node of its graph, and the model behind that node. They share the model's weights."""
    head, tail = torch.fx.Graph(), torch.fx.Graph()
    in_head: dict[torch.fx.Node, torch.fx.Node] = {}
    in_tail: dict[torch.fx.Node, torch.fx.Node] = {}
    passed = False
    for node in cut.graph.nodes:
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
    for part in parts:  # leave out the weights that only the other part uses
        part.graph.eliminate_dead_code()
        part.recompile()
    return parts


class _Reach(torch.fx.Interpreter):
    """Runs the network node by node, to see behind each cut what the masks reach.

    ``found`` holds for each cut the reach of the masks seen so far: for each look (masks, b, c) bool.
    """

    def __init__(self, module: torch.fx.GraphModule, cuts: list[torch.fx.Node]) -> None:
        super().__init__(module)
        self.cuts = set(cuts)
        self.found: dict[torch.fx.Node, list[Tensor]] = {}

    def look(self, views: Tensor) -> None:
        """Run views with NaN under one mask each, up to where the network is no longer known to be local."""
        self.views = len(views)
        with suppress(_NotLocal):
            self.run(views)

    def run_node(self, node: torch.fx.Node) -> Any:
        with Watch() as watch:  # type: ignore[no-untyped-call]
            value = super().run_node(node)
        if not watch.carried:
            raise _NotLocal
        if node in self.cuts and _are_maps(value, self.views):
            reached = value.isnan().any(dim=1)
            self.found.setdefault(node, []).append(reached)
            if reached.all():
                raise _NotLocal
        return value


def _are_maps(value: Any, views: int) -> bool:
    """Whether a value has a map of several pixels for each view: (views, a, b, c).

    Rows that are parts of images, or several images, must not be taken for images.
    """
    return isinstance(value, Tensor) and value.ndim == 4 and len(value) == views and min(value.shape[2:]) > 1


class _NotLocal(Exception):  # noqa: N818, no error
    """What follows in the network is not local, or is not known to be."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether every operation of torch's within the context, in whatever module, carries NaN on."""

    carried = True

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        self.carried &= not tensors or _carries_nan(operation, tensors)
        return operation(*args, **(kwargs or {}))


def _carries_nan(operation: Any, tensors: list[Tensor]) -> bool:
    """Whether an operation is one of ``CARRY_NAN``, on floats.

    It must be torch's own (of the namespace ``aten``): anybody can give an operation any name.
    """
    if operation.namespace != "aten":
        return False
    if operation._overloadname == "dtype":  # view(dtype) reads the same bits as other numbers
        return False
    known = operation.overloadpacket.__name__.removesuffix("_") in CARRY_NAN
    return known and all(each.is_floating_point() for each in tensors)


class _Clock(torch.fx.Interpreter):
    """Runs the network node by node, to see how long it takes to come to each cut, and to paste there."""

    def __init__(self, module: torch.fx.GraphModule, cuts: Iterable[torch.fx.Node]) -> None:
        super().__init__(module)
        self.seconds: dict[torch.fx.Node, float] = {}
        self.paste_seconds = dict.fromkeys(cuts, inf)

    def saved(self, cut: torch.fx.Node) -> float:
        """The share of the network's time that is spent up to the cut, less what pasting costs there."""
        order = list(self.seconds)
        until = sum(self.seconds[node] for node in order[: order.index(cut) + 1])
        return (until - self.paste_seconds[cut]) / sum(self.seconds.values())

    def run_node(self, node: torch.fx.Node) -> Any:
        started = time.perf_counter()
        value = super().run_node(node)
        self.seconds[node] = min(_since(started, value), self.seconds.get(node, inf))
        if node in self.paste_seconds:
            started = time.perf_counter()
            for _ in range(3):  # one for pasting, two for fetching the activations that are pasted
                torch.where(value > 0, value, value)
            self.paste_seconds[node] = min(_since(started, value), self.paste_seconds[node])
        return value


def _since(started: float, value: Any) -> float:
    """The seconds since ``started``, when the value has been computed."""
    if isinstance(value, Tensor) and value.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
