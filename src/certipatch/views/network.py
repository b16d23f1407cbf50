"""The network as a defense runs it: masking, precision, compilation, shared prefix and batch size."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CertiPatchError, SoundnessError, brief
from ..runtime.console import say
from ..runtime.devices import autocast
from ..runtime.progress import seen
from .masked import Hiding, Masked, check_logits, window_tensor
from .prefix import SharedPrefix, find

LARGE = 4e9  # Pixels of all views of a run, at most, from which on it pays to compile and to try batch sizes.

# The memory, in bytes, that the shared prefix's activations of one-mask views may take, and the most images
# whose activations are kept at once.
KEPT_BYTES_ON_CPU, KEPT_BYTES = 2**29, 2**32
KEPT_IMAGES = 128

# Views in a forward pass that the search for the fastest batch size tries, smallest first.
SIZES_ON_CPU = (4, 8, 16, 32)
SIZES = (32, 64, 128, 256, 512, 1024, 2048)

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of one number


class Network:
    """(images, windows) -> activations -> logits, in batches of one size.

    ``tail(head(images, windows))`` are the logits of masked views. The head ends behind the shared prefix; of
    a network without one the head is everything, and the tail does nothing.

    Args:
        model: maps (N, 3, H, W) float in [0, 1] to (N, classes) logits, in evaluation mode.
        fill: (3,) colour of masked pixels.
        batch_size: views in one forward pass.
        precision: "32-true", "bf16-mixed" or "16-mixed"; where the model does not run in it, float32 is used.
        compile: compile with torch.compile, for batches of one shape. ``compiled`` says whether that worked.
        frozen: compile the weights of this moment into the code (BatchNorm folded into convolutions); False
            for a model that is being trained.
        shared_prefix: True to look for one; or the name of the layer where it ends.

    Attributes:
        views: how many views the head has seen in use; the user may set it back to 0.
        compiled: whether the network runs compiled.
        prefix: the shared prefix, or None.
        apart: (masks, masks) bool, the pairs of masks whose activations are pasted and not computed.
        classes: how many classes the model tells apart; None before it was looked at.
        images_at_once: of how many images the activations under every mask are kept at most.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Hiding,
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
        layer = shared_prefix if isinstance(shared_prefix, str) else None
        self.prefix: SharedPrefix | None = find(model, masks, layer=layer) if shared_prefix else None
        self.compiled, self.images_at_once = False, KEPT_IMAGES
        self.classes: int | None = None
        self._windows = 2 * max(len(mask) for mask in masks.windows)
        self._tail: Callable[[Tensor], Tensor] | None = None
        self._activation: Tensor | None = None
        head, self.apart = model, np.zeros((len(masks), len(masks)), dtype=bool)
        if self.prefix:
            head, self._tail, self.apart = self.prefix.head, self.prefix.tail, self.prefix.apart.cpu().numpy()
        self._head: Callable[[Tensor, Tensor], Tensor] = Masked(head, fill.to(self.device))
        if self.prefix:
            self._plan_memory(masks, parameter)
        if compile:
            self._compile(masks, parameter, frozen)
        self.views = 0  # What was seen so far was a trial.
        self._made_of = fingerprint(model) if self.compiled or self.prefix else None

    def __call__(self, images: Tensor, windows: Tensor) -> Tensor:
        """The logits (V, classes) of images (V, 3, H, W) under the windows (V, windows, 4)."""
        return self.tail(self.head(images, windows))

    def check_unchanged(self) -> None:
        """Raises SoundnessError if the model has changed since it was compiled or cut.

        The compiled or cut network would then certify another function than the model's.
        """
        if self._made_of is not None and fingerprint(self.model) != self._made_of:
            raise SoundnessError(
                "model: expected it as it was compiled or its prefix cut, found other weights, parts or "
                "hooks; make a new PatchCleanser of it"
            )

    def describe(self) -> dict[str, Any]:
        """What a manifest records of the network; from these values an equal one can be made."""
        return {
            "batch_size": self.batch_size,
            "compiled": self.compiled,
            "shared_prefix": self.prefix.layer if self.prefix else None,
            "pairs_pasted": int(self.apart.sum()) // 2,
        }

    def room_for(self, views: int) -> Tensor | None:
        """Memory (views, b, c, a) for the activations of so many views, channels last.

        None without a shared prefix, which alone has a use for activations.
        """
        if self._activation is None:
            return None
        _, a, b, c = self._activation.shape
        return self._activation.new_empty(views, b, c, a)

    @torch.inference_mode()
    def head(self, images: Tensor, windows: Tensor) -> Tensor:
        """The activations of images (V, 3, H, W) under windows (V, windows, 4); at most ``batch_size``."""
        self.views += len(images)
        empty = windows.new_zeros(len(windows), self._windows - windows.shape[1], 4)
        return self._run(self._head, images, torch.cat([windows, empty], dim=1))

    @torch.inference_mode()
    def tail(self, activations: Tensor) -> Tensor:
        """The logits (V, classes) of activations that the head has computed or pasting has put together."""
        logits = activations if self._tail is None else self._run(self._tail, activations)
        if isinstance(logits, Tensor) and logits.ndim == 2:
            self.classes = logits.shape[1]
        seen(views=len(activations))
        return logits

    def decided(self, images: int) -> None:
        """So many images need no more views; this is shown while the run goes on."""
        seen(decided=images)

    def _run(self, part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """What the head or the tail makes of up to ``batch_size`` inputs."""
        n = len(inputs[0])
        if self.compiled:
            inputs = self._as_compiled(part, inputs)
        with autocast(self.precision, inputs[0].device):
            outputs = called(part, *inputs)
        return outputs[:n] if self.compiled else outputs

    def _as_compiled(self, part: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The inputs as the compiled code expects them: a full batch, in one layout, made in inference mode.

        Anything else would make torch compile once more. The last input is repeated to fill the batch.
        """
        missing = self.batch_size - len(inputs[0])
        if missing > 0:
            inputs = tuple(torch.cat([each, each[-1:].expand(missing, *each.shape[1:])]) for each in inputs)
        layout = torch.channels_last if part is self._tail else torch.contiguous_format
        first = inputs[0].contiguous(memory_format=layout)
        return (first if first.is_inference() else first.clone(), *inputs[1:])

    def _plan_memory(self, masks: Hiding, parameter: Tensor) -> None:
        """Measure the activations of one view, and keep those of as many images as there is memory for."""
        windows = window_tensor(masks, self.device)[:1]
        self._activation = self.head(torch.zeros(1, 3, *masks.image_size).to(parameter), windows)
        bytes_an_image = self._activation.nbytes * (len(masks) + 1)
        most = KEPT_BYTES_ON_CPU if self.device.type == "cpu" else KEPT_BYTES
        self.images_at_once = max(1, min(KEPT_IMAGES, most // bytes_an_image))

    @torch.inference_mode()
    def _compile(self, masks: Hiding, parameter: Tensor, frozen: bool) -> None:
        """Compile head and tail, and try them on noise under the first masks.

        Where that fails, or gives other logits, the network runs as it is, and a line on stderr says why.
        """
        windows = window_tensor(masks, self.device)[: self.batch_size]
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(len(windows), 3, *masks.image_size, generator=generator).to(parameter)
        plain = self._head, self._tail
        say(f"compiling the network, about {_seconds_to_compile(self.model, self.device)} s")
        try:
            expected = check_logits(self(pixels, windows), len(windows))
            backend = _own_compiler()
            self._head = torch.compile(self._head, dynamic=False, backend=backend)
            self._tail = self._tail and torch.compile(self._tail, dynamic=False, backend=backend)
            self.compiled = True
            # These must be on while torch traces (as options of torch.compile they come too late), which is
            # in the first call: either the weights go into the code, or BatchNorm is folded into the weights
            # of each moment in every call. In reduced precision a BatchNorm that is folded into weights and
            # biases of 8 bits moves logits by whole units, so there the code rounds wherever the model does.
            # The limit is one for the whole process, which may make many networks.
            exact = self.precision == "32-true"
            how = {
                "freezing": frozen and exact,
                "efficient_conv_bn_eval_fx_passes": not frozen and exact,
                "emulate_precision_casts": not exact,
            }
            with torch._inductor.config.patch(how), torch._dynamo.config.patch(recompile_limit=10**6):
                difference = float((self(pixels, windows).float() - expected).abs().max())
            tolerance = (1e-3 if exact else 0.02) * max(1.0, float(expected.abs().max()))
            if not difference <= tolerance:
                raise ValueError(f"it answers otherwise than the model, by {difference:.2g}")
        # A compiler raises whatever it likes: it is not installed, it does not know an operation ...
        except Exception as error:  # noqa: BLE001
            self._head, self._tail = plain
            self.compiled = False
            _say("not compiled, which is slower", error)


def _seconds_to_compile(model: nn.Module, device: torch.device) -> int:
    """A guess at how long torch.compile takes with an empty cache: less if it has met the network before.

    EfficientNet-Lite0, of 199 layers, took 158 s on two cores that other jobs shared, and more than 80 on the
    host of an H200.
    """
    layers = sum(1 for module in model.modules() if next(module.children(), None) is None)
    return 10 * round(1 + layers / (30 if device.type == "cpu" else 15))


def called(part: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """What a part of the model makes of its inputs.

    Raises SoundnessError for what the model, or torch in it, has to say against them.
    """
    try:
        return part(*inputs)
    except (torch.OutOfMemoryError, CertiPatchError):  # these say what is wrong
        raise
    except Exception as error:
        first = inputs[0]
        raise SoundnessError(
            f"model: it fails on images of {first.dtype} and shape {tuple(first.shape)} on {first.device} "
            f"({type(error).__name__}: {brief(error)}); images of another size, or on another device?"
        ) from error


def _own_compiler() -> Callable[..., Any]:
    """The compiler "inductor", as a function that no other network has.

    torch gives code that it has compiled to the next network of the same shape and the same compiler, also if
    the weights in the code are of another moment. A compiler of its own keeps a network from that.
    """

    def inductor(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)

    return inductor


def eager(model: nn.Module, precision: str) -> Callable[[Tensor], Tensor]:
    """The model as it is, views (V, 3, H, W) -> logits, in this precision. It gets a copy of its views, in
    which it may work in place."""

    def function(views: Tensor) -> Tensor:
        with autocast(precision, views.device):
            return called(model, views.clone())

    return function


def fingerprint(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """In brief, what a compiled or cut network has taken from its model: the modules, and the weights.

    Of a module it holds the identity, its hooks, and its plain settings, such as a stride. Of a weight it
    holds where it lies in memory, how often it was written to, and a sum of its bits in which each place
    counts otherwise, so that a permutation changes it: writes to ``.data`` and in inference mode are not
    counted.
    """
    modules = [(id(each), _hooks(each), _settings(each)) for each in model.modules()]
    weights = []
    for each in (*model.parameters(), *model.buffers()):
        version = None if each.is_inference() else each._version
        weights.append((each.data_ptr(), tuple(each.shape), version, _weighted_sum(each.detach())))
    return modules, weights


def _hooks(module: nn.Module) -> tuple[int, ...]:
    """The numbers of a module's hooks, which torch gives out once in a process."""
    return (*module._forward_pre_hooks, *module._forward_hooks)


def _settings(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The attributes of a module that are numbers, texts or tuples of them, and a ``forward`` of its own."""
    settings = [(name, value) for name, value in vars(module).items() if _is_plain(value)]
    return (*settings, ("forward", id(vars(module).get("forward"))))


def _is_plain(value: Any) -> bool:
    """Whether a value can be compared by ``==`` for good; a tuple may hold tensors, which cannot."""
    return isinstance(value, int | float | str) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _weighted_sum(weight: Tensor) -> int:
    """The sum of the weight's bits, the n-th number taken 2n + 1 times, modulo 2**64."""
    bits = weight.contiguous().view(INTEGERS[weight.element_size()]).flatten().to(torch.int64)
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)
    return int((bits * places).sum())


def _say(what: str, error: Exception) -> None:
    """One line on stderr: what is done instead of what was asked for, and the error that is the reason."""
    if isinstance(error, SoundnessError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what torch said
    reason = brief(error, 120)
    say(f"{what}: {type(error).__name__}: {reason}")


@torch.inference_mode()
def usable_precision(model: nn.Module, masks: Hiding, precision: str) -> str:
    """The precision asked for; or float32, with a line on stderr, if the model does not run in that one."""
    parameter = next(model.parameters(), torch.zeros(()))
    reduced = autocast(precision, parameter.device)  # raises ConfigError for a name that it does not know
    if precision == "32-true":
        return precision
    try:
        with reduced:
            check_logits(model(torch.full((1, 3, *masks.image_size), 0.5).to(parameter)), 1)
    except Exception as error:  # noqa: BLE001, without kernels for such numbers a model raises anything
        _say(f"not in {precision} but in float32", error)
        return "32-true"
    return precision


@torch.inference_mode()
def fastest_batch_size(model: nn.Module, masks: Hiding, precision: str) -> int:
    """The number of views in a forward pass at which most go through in a second, found by a quick trial.

    Sizes double until it gets slower, or the memory is full. Out of those within 5 % of the best an
    accelerator takes the smallest, with which fewer views are under way when one of them decides an image; a
    CPU takes the largest, from which compiled code gains most.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    on_cpu = parameter.device.type == "cpu"
    each: dict[int, float] = {}  # the seconds of one view, by batch size
    for size in SIZES_ON_CPU if on_cpu else SIZES:
        try:
            views = torch.rand(size, 3, *masks.image_size).to(parameter)
            each[size] = (
                _seconds(model, views.contiguous(memory_format=torch.channels_last), precision) / size
            )
        except (torch.OutOfMemoryError, RuntimeError):  # the CPU's allocator raises the latter
            break
        if each[size] > 1.2 * min(each.values()):
            break
    good = [size for size, seconds in each.items() if seconds <= 1.05 * min(each.values())]
    return (max if on_cpu else min)(good, default=1)


def _seconds(model: nn.Module, views: Tensor, precision: str) -> float:
    """The seconds of one forward pass: the quickest of several, without the first."""
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
