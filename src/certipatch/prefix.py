"""The shared local prefix: what the first layers of a CNN make of an image under two masks, without running them again.

Up to some stage a CNN is local: a mask changes only the activations near its windows (its *reach*). Where the
reaches of two masks do not meet, the activations under both are those under the one, with the reach of the other pasted from
those under the other. So the layers up to there (the *head*) run for the one-mask views only; the rest (the *tail*)
runs for all.

Source: Krypton (Nakandala, Kumar, Papakonstantinou; SIGMOD 2019) computes occlusion maps incrementally in this way, inside a patch;
here nothing at all is computed in the head for a pair of masks that do not meet.

Nothing is assumed about layers: the reach of each mask is measured, with NaN under the mask, and pasted
activations are compared with computed ones before they are used.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from .errors import ConfigError
from .masks import MaskSet
from .runtime import stderr
from .views import mask_images, visible, window_tensor

WORTH = 0.05  # of the time of all pairs: a prefix that saves less is left alone
COMPARED = 16  # pairs of masks


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
        """The head's activations under two masks that are apart: those under the ``one``, and in the reach of the other ``mask`` (V,)
        those under the ``other``. Here activations are (V, b, c, a), channels last, as memory holds them."""
        return torch.where(self.reach[mask], other, one)


@torch.inference_mode()
def find(model: nn.Module, masks: MaskSet, *, layer: str | None = None) -> SharedPrefix | None:
    """The cut of a model that saves most, or None if the model cannot be traced or has no local layers worth it.

    Args:
        model: maps (N, 3, H, W) float to (N, classes), in evaluation mode; on any device.
        layer: this cut, as an earlier run has found it.

    Raises:
        ConfigError: ``layer`` is given, and the model cannot be cut there.
    """
    found = _find(model, masks, layer)
    if layer is not None and found is None:
        raise ConfigError(f"shared prefix {layer!r}: expected a local layer of this model, found none; start again without it")
    return found


def _find(model: nn.Module, masks: MaskSet, layer: str | None) -> SharedPrefix | None:
    try:
        graph = _Tracer().trace(model)
    except Exception:  # noqa: BLE001, whatever a model does that tracing cannot follow
        return None
    module = torch.fx.GraphModule(model, graph)
    cuts = _cuts(graph)
    parameter = next(model.parameters(), torch.zeros(()))
    blank = torch.zeros(1, 3, *masks.image_size, device=parameter.device, dtype=parameter.dtype)
    profile = _Profile(module, cuts)
    try:
        for windows in torch.split(window_tensor(masks, blank.device), 16):
            profile.look(mask_images(blank, visible(windows, masks.image_size), torch.nan))
        profile.clock(mask_images(blank.expand(4, -1, -1, -1), torch.ones(4, *masks.image_size, dtype=torch.bool, device=blank.device), 0))
    except RuntimeError:  # an operation that was traced for another shape
        return None
    pairs = len(masks) * (len(masks) - 1) / 2
    best: tuple[float, torch.fx.Node, Tensor] | None = None
    for node in cuts:
        if layer is not None and node.name != layer:
            continue
        reach = torch.cat(profile.reach.get(node, [torch.empty(0, 1, 1)]))
        if len(reach) < len(masks):
            continue
        apart = _apart(reach)
        saved = float(apart.sum() / 2 / max(pairs, 1)) * profile.saved(node)
        if (saved >= WORTH or layer is not None) and (best is None or saved > best[0]):
            best = (saved, node, reach)
    if best is None:
        return None
    saved, node, reach = best
    head, tail = _split(model, graph, node)
    found = SharedPrefix(node.name, head, tail, reach.unsqueeze(3), _apart(reach), saved)
    if not _equal(found, model, masks, blank):
        stderr.print(f"shared prefix: not used, pasting at {node.name} does not give what the model computes", markup=False)
        return None
    return found


def _apart(reach: Tensor) -> Tensor:
    """(masks, masks) bool: which of the regions (masks, b, c) share nothing."""
    flat = reach.flatten(1).float()
    return flat @ flat.T == 0


def _equal(prefix: SharedPrefix, model: nn.Module, masks: MaskSet, blank: Tensor) -> bool:
    """Whether pasting gives what the model computes, on noise, for pairs spread over all that are apart."""
    noise = torch.rand(blank.shape, generator=torch.Generator().manual_seed(0)).to(blank)
    windows = window_tensor(masks, blank.device)

    def head(pair: Tensor) -> Tensor:
        out: Tensor = prefix.head(mask_images(noise, visible(pair[None], masks.image_size), 0.0))
        return out

    pairs = prefix.apart.triu().nonzero()
    for i, j in pairs[:: max(1, len(pairs) // COMPARED)]:
        one, other = head(windows[i]).permute(0, 2, 3, 1), head(windows[j]).permute(0, 2, 3, 1)
        pasted = prefix.paste(one, other, j[None]).permute(0, 3, 1, 2)
        pair = torch.cat([windows[i], windows[j]])
        whole = model(mask_images(noise, visible(pair[None], masks.image_size), 0.0))
        for found, expected in ((pasted, head(pair)), (prefix.tail(pasted), whole)):
            if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
                return False
    return True


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


class _Profile(torch.fx.Interpreter):
    """Runs the network node by node, to see behind each cut what masks reach, and how long it took to come there."""

    def __init__(self, module: torch.fx.GraphModule, cuts: list[torch.fx.Node]) -> None:
        super().__init__(module)
        self.cuts = set(cuts)
        self.reach: dict[torch.fx.Node, list[Tensor]] = {}
        self.seconds: dict[torch.fx.Node, float] = {}
        self.paste_seconds: dict[torch.fx.Node, float] = {}
        self._clock = False

    def look(self, views: Tensor) -> None:
        """Views with NaN under a mask each, up to where the NaN is everywhere: what follows is not local."""
        with suppress(_Everywhere):
            self.run(views)

    def clock(self, views: Tensor) -> None:
        self._clock = True
        for _ in range(3):
            self.run(views)

    def saved(self, cut: torch.fx.Node) -> float:
        """The share of the time of the whole network that is spent up to the cut, less what pasting costs there."""
        order = list(self.seconds)
        until = sum(self.seconds[node] for node in order[: order.index(cut) + 1])
        return (until - self.paste_seconds[cut]) / sum(self.seconds.values())

    def run_node(self, node: torch.fx.Node) -> Any:
        started = time.perf_counter()
        value = super().run_node(node)
        if self._clock:
            if isinstance(value, Tensor) and value.device.type == "cuda":
                torch.cuda.synchronize()
            spent = time.perf_counter() - started
            self.seconds[node] = min(spent, self.seconds.get(node, spent))  # of three
            if node in self.reach:
                started = time.perf_counter()
                for _ in range(3):  # of which two stand for fetching the activations
                    torch.where(value > 0, value, value)
                if value.device.type == "cuda":
                    torch.cuda.synchronize()
                spent = time.perf_counter() - started
                self.paste_seconds[node] = min(spent, self.paste_seconds.get(node, spent))
        elif node in self.cuts and isinstance(value, Tensor) and value.ndim == 4 and min(value.shape[2:]) > 1:
            self.reach.setdefault(node, []).append(value.isnan().any(dim=1))
            if self.reach[node][-1].all():
                raise _Everywhere
        return value


class _Everywhere(Exception):  # noqa: N818, no error
    pass
