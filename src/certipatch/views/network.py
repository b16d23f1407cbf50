"""The network as the defense runs it: masking, precision, compilation, the shared prefix, and the size of its
batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SoundnessError
from ..geometry.masks import MaskSet
from ..runtime.console import stderr
from ..runtime.devices import autocast
from .masked import Masked, check_logits, window_tensor
from .prefix import SharedPrefix, find

LARGE = 4e9  # pixels of all views at most, from which on it pays to compile and to try batch sizes


KEPT_ON_CPU, KEPT = 2**29, 2**32  # bytes of activations of the shared prefix


BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


class Network:
    """(images, windows) -> activations -> logits, in batches of one size.

    ``tail(head(images, windows))`` are the logits of masked views. The head ends behind the shared prefix; of
    a network without one the head is everything, and the tail does nothing.

    Args:
        model: maps (N, 3, H, W) float in [0, 1] to (N, classes) logits, in evaluation mode.
        fill: (3,) colour of masked pixels.
        batch_size: views in one forward pass.
        precision: "32-true", "bf16-mixed" or "16-mixed"; float32 where the model does not run in it.
        compile: compile with torch.compile, for one batch shape. ``compiled`` says whether it could be.
        frozen: compile the weights of this moment into the code (BatchNorm folded into convolutions); False
            for a model that is being trained.
        shared_prefix: look for one; or the name of the layer where it ends.

    Attributes:
        views: how many the head has seen.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: MaskSet,
        *,
        fill: Tensor,
        batch_size: int,
        precision: str,
        compile: bool,
        frozen: bool = True,
        shared_prefix: bool | str = False,
    ) -> None:
        parameter = next(model.parameters(), torch.zeros(()))
        self.model, self.batch_size, self.device, self.views = model, batch_size, parameter.device, 0
        self.precision = usable_precision(model, masks, precision)
        self.prefix: SharedPrefix | None = None
        if shared_prefix:
            self.prefix = find(model, masks, layer=shared_prefix if isinstance(shared_prefix, str) else None)
        self._windows = 2 * max(len(mask) for mask in masks.windows)
        self._head: Callable[[Tensor, Tensor], Tensor] = Masked(
            self.prefix.head if self.prefix else model, fill.to(self.device)
        )
        self._tail: Callable[[Tensor], Tensor] | None = self.prefix.tail if self.prefix else None
        self.compiled = False
        self.apart = (
            self.prefix.apart.cpu().numpy() if self.prefix else np.zeros((len(masks), len(masks)), dtype=bool)
        )
        self.images_at_once, self._activation = 128, None
        if self.prefix:
            nothing = window_tensor(masks, self.device)[:1]
            self._activation = self.head(torch.zeros(1, 3, *masks.image_size).to(parameter), nothing)
            each = self._activation.nbytes * (len(masks) + 1)
            self.images_at_once = max(
                1, min(128, (KEPT_ON_CPU if self.device.type == "cpu" else KEPT) // each)
            )
        if compile:
            self._compile(masks, parameter, frozen)
            self.views = 0  # of use
        self._made_of = _state(model) if self.compiled or self.prefix else None

    def __call__(self, images: Tensor, windows: Tensor) -> Tensor:
        """The logits of masked views: of V images (V, 3, H, W) under (V, windows, 4)."""
        return self.tail(self.head(images, windows))

    def check_unchanged(self) -> None:
        """Raises SoundnessError if the model is no longer what has been compiled or cut: then it is not what
        would be certified."""
        if self._made_of is not None and _state(self.model) != self._made_of:
            raise SoundnessError(
                "model: expected it as it was compiled or its prefix cut, found other weights, parts or "
                "hooks; make a new PatchCleanser of it"
            )

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it, and what makes an equal one."""
        return {
            "batch_size": self.batch_size,
            "compiled": self.compiled,
            "shared_prefix": self.prefix.layer if self.prefix else None,
            "pairs_pasted": int(self.apart.sum()) // 2,
        }

    def room_for(self, views: int) -> Tensor | None:
        """Memory for the activations of so many views, channels last: (views, b, c, a), if a shared prefix
        has a use for them."""
        if self._activation is None:
            return None
        _, a, b, c = self._activation.shape
        return self._activation.new_empty(views, b, c, a)

    @torch.inference_mode()
    def head(self, images: Tensor, windows: Tensor) -> Tensor:
        """What the head makes of (V, 3, H, W) images under (V, windows, 4), V at most ``batch_size``."""
        self.views += len(images)
        empty = windows.new_zeros(len(windows), self._windows - windows.shape[1], 4)
        return self._run(self._head, images, torch.cat([windows, empty], dim=1))

    @torch.inference_mode()
    def tail(self, activations: Tensor) -> Tensor:
        """The logits (V, classes) of what the head, or pasting, has made."""
        return activations if self._tail is None else self._run(self._tail, activations)

    def _run(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        n = len(inputs[0])
        if self.compiled:  # for one shape: repeat the last; and for one layout
            if n < self.batch_size:
                inputs = tuple(
                    torch.cat([each, each[-1:].expand(self.batch_size - n, *each.shape[1:])])
                    for each in inputs
                )
            first = inputs[0].contiguous(
                memory_format=torch.channels_last if part is self._tail else torch.contiguous_format
            )
            # Compiled for tensors made in inference mode: for others torch would compile once more.
            inputs = (first if first.is_inference() else first.clone(), *inputs[1:])
        with autocast(self.precision, inputs[0].device):
            outputs = part(*inputs)
        return outputs[:n] if self.compiled else outputs

    @torch.inference_mode()
    def _compile(self, masks: MaskSet, parameter: Tensor, frozen: bool) -> None:
        """Compile head and tail and try them, on noise under the first masks; or say in a line why they
        cannot be."""
        windows = window_tensor(masks, self.device)[: self.batch_size]
        pixels = torch.rand(
            len(windows), 3, *masks.image_size, generator=torch.Generator().manual_seed(0)
        ).to(parameter)
        plain = self._head, self._tail
        try:
            expected = check_logits(self(pixels, windows), len(windows))

            # torch keeps what it compiled for the next network of the same shape, also if the weights in the
            # code are of another moment, unless the compiler is another one. This one is nobody else's.
            def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
                return torch._dynamo.lookup_backend("inductor")(graph, inputs)

            self._head = torch.compile(self._head, dynamic=False, backend=inductor)
            self._tail = self._tail and torch.compile(self._tail, dynamic=False, backend=inductor)
            self.compiled = True
            # These must be on while torch traces (as options of torch.compile they come too late), which is
            # in the first call: either the weights go into the code, or BatchNorm is folded into the weights
            # of each moment in every call. The limit is one for the whole process, which may make many
            # networks.
            how = {"freezing": frozen, "efficient_conv_bn_eval_fx_passes": not frozen}
            with torch._inductor.config.patch(how), torch._dynamo.config.patch(recompile_limit=10**6):
                difference = float((self(pixels, windows).float() - expected).abs().max())
            tolerance = (1e-3 if self.precision == "32-true" else 0.1) * max(1.0, float(expected.abs().max()))
            if not difference <= tolerance:
                raise ValueError(f"it answers otherwise than the model, by {difference:.2g}")
        except Exception as error:  # noqa: BLE001, whatever a compiler raises: no compiler, an operation it does not know ...
            self._head, self._tail = plain
            self.compiled = False
            reason = " ".join(str(error).split())[:120]
            stderr.print(
                f"not compiled, which is slower: {type(error).__name__}: {reason}",
                markup=False,
                soft_wrap=True,
            )


def _state(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """In brief what a compiled or cut network has of a model: its modules with their hooks, and of each
    weight where it lies, how often it
    was written to, and the sum of its bits: ``.data`` and inference mode write without counting, equal sums
        are seldom but can be."""
    weights = []
    for each in (*model.parameters(), *model.buffers()):
        bits, version = BITS[each.element_size()], None if each.is_inference() else each._version
        weights.append((each.data_ptr(), version, int(each.detach().view(bits).sum(dtype=bits))))
    return [
        (id(each), len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()
    ], weights


@torch.inference_mode()
def usable_precision(model: nn.Module, masks: MaskSet, precision: str) -> str:
    """The precision, or float32 if the model does not run in it on its device, and a line that says so."""
    parameter = next(model.parameters(), torch.zeros(()))
    reduced = autocast(precision, parameter.device)  # refuses a name that it does not know
    if precision == "32-true":
        return precision
    try:
        with reduced:
            check_logits(model(torch.full((1, 3, *masks.image_size), 0.5).to(parameter)), 1)
    except Exception as error:  # noqa: BLE001, whatever a model raises that knows no such numbers
        reason = " ".join(str(error).split())[:120]
        stderr.print(
            f"not in {precision} but in float32: {type(error).__name__}: {reason}",
            markup=False,
            soft_wrap=True,
        )
        return "32-true"
    return precision


@torch.inference_mode()
def fastest_batch_size(model: nn.Module, masks: MaskSet, precision: str) -> int:
    """The number of views in a forward pass at which most go through in a second, found by a quick trial.

    Sizes double until it gets slower, or the memory is full. Out of those within 5 % of the best an
    accelerator takes the smallest, with which fewer views are under way when one of them decides an image; a
    CPU the largest, from which compiled code gains most.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    on_cpu = parameter.device.type == "cpu"
    best: dict[int, float] = {}
    size = 4 if on_cpu else 32
    while size <= (32 if on_cpu else 2048):
        try:
            views = (
                torch.rand(size, 3, *masks.image_size)
                .to(parameter)
                .contiguous(memory_format=torch.channels_last)
            )
            best[size] = _seconds(model, views, precision) / size
        except (torch.OutOfMemoryError, RuntimeError):  # the CPU's allocator raises the latter
            break
        if best[size] > 1.2 * min(best.values()):
            break
        size *= 2
    if not best:
        return 1
    good = [size for size, seconds in best.items() if seconds <= 1.05 * min(best.values())]
    return max(good) if on_cpu else min(good)


def _seconds(model: nn.Module, views: Tensor, precision: str) -> float:
    """Of one forward pass, the best of some."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < 10 and time.perf_counter() - began < 0.3):
        started = time.perf_counter()
        with autocast(precision, views.device):
            model(views)
        if views.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])
