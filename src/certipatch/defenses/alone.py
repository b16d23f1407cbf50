"""Does the answer to a view depend on that view alone? Every certificate rests on it, so it is looked at.

A view that was certified in one batch comes in another one when the model is in use. A model that looks at
the other views of its batch, draws random numbers or remembers earlier calls then answers otherwise, and its
certificates are worth nothing. So two probes are shown to it alone, twice, in batches of other sizes and at
other places, and among loud companions (black, white, noise): rounding may move their logits, nothing else.

A test of some views is no proof for all. What it cannot see is said in docs/assumptions.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import SoundnessError
from ..geometry.patch import Size
from ..views.masked import check_shape
from ..views.network import Network, eager, fingerprint

# The share of the largest logit (of 1 where all are smaller) that rounding moves a difference of logits by at
# most, several times what was measured (docs/trust.md). A GPU convolves in TF32, which rounds like 16-mixed.
MOST_MOVED = {"32-true": 1e-3, "16-mixed": 0.01, "bf16-mixed": 0.05}

MOST_COMPANIONS = 64  # Views of the largest batch that is tried where nothing demands full ones.

Function = Callable[[Tensor], Tensor]  # views (V, 3, H, W) -> logits (V, classes)

# What was found of a model: its fingerprint then, and its movement by image size and precision. A command
# makes many defenses of one model and looks at it once.
_found: WeakKeyDictionary[nn.Module, tuple[object, dict[tuple[Size, str], float]]] = WeakKeyDictionary()


@torch.inference_mode()
def measure_movement(network: Network, image_size: Size) -> float:
    """By how many logits the margin of a probe moved at most with what is not in the probe.

    The model is looked at as it is, in float32 and in the network's precision; then the network as it runs:
    compiled, cut, and in batches of its size. By how much a compiled network may differ from its model is
    judged where it is compiled; here the difference of any two logits counts as movement.

    Raises SoundnessError if more than rounding moved it, the model draws random numbers, or its output is not
    of the shape of logits.
    """
    parameter = next(network.model.parameters(), torch.zeros(()))
    probes, loud = (views.to(parameter) for views in _pictures(image_size))
    precisions = sorted({"32-true", network.precision})
    moved = [_of_model(network.model, precision, probes, loud) for precision in precisions]
    empty = torch.zeros(1, 1, 4, dtype=torch.int64, device=network.device)

    def as_run(views: Tensor) -> Tensor:
        return network(views, empty.expand(len(views), -1, -1))

    probe = probes[1:]
    plain = _alone(eager(network.model, network.precision), probe)
    alone = _alone(as_run, probe) if network.compiled or network.prefix else plain
    moved.append(_difference(alone[0], plain[0]))
    size = network.batch_size if network.compiled else min(network.batch_size, MOST_COMPANIONS)
    company = torch.stack([*_cycled(loud, size - 1), *probe])
    when = "with the other views of a full batch"
    moved.append(_movement(as_run, probe, [company], alone, network.precision, when))
    network.views = 0  # These views were a trial.
    return max(moved)


@torch.inference_mode()
def measure_cells(cells: Function, image_size: Size, precision: str, device: torch.device) -> float:
    """By how many logits a difference of two logits of a cell moved at most with what is not in the probe.

    Args:
        cells: images (N, 3, H, W) -> logits (N, cells, classes), as they are certified.

    Raises SoundnessError if more than rounding moved it, or the network draws random numbers.
    """
    probes, loud = (views.to(device) for views in _pictures(image_size))

    def all_logits(views: Tensor) -> Tensor:
        return cells(views).flatten(1)

    moved = 0.0
    with _without_chance(device):
        expected = _alone(all_logits, probes)
        for batch in (probes[:1], *_companies(probes, loud)):
            found = all_logits(batch).double()
            for probe, reference in zip(probes, expected, strict=True):
                for one in found[(batch == probe).flatten(1).all(dim=1)]:
                    change = _difference(one, reference)
                    _refuse_more_than_rounding(change, reference, precision, "with the images of a batch")
                    moved = max(moved, change)
    return moved


def _of_model(model: nn.Module, precision: str, probes: Tensor, loud: Tensor) -> float:
    """The movement of a model that runs as it is; of one that was looked at before, what was found then."""
    key, made_of = ((probes.shape[2], probes.shape[3]), precision), fingerprint(model)
    of_then, known = _found.get(model, (None, {}))
    if of_then != made_of:
        known = {}
        _found[model] = made_of, known
    if key not in known:
        function = eager(model, precision)
        with _without_chance(probes.device):
            expected = _alone(function, probes)
            cases = {
                "when a view is shown a second time": [probes[:1]],
                "with the other views of a batch": _companies(probes, loud),
            }
            known[key] = max(
                _movement(function, probes, batches, expected, precision, when)
                for when, batches in cases.items()
            )
    return known[key]


def _pictures(image_size: Size) -> tuple[Tensor, Tensor]:
    """Two probes (2, 3, H, W), one smooth and one of noise, and three loud companions (3, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, *image_size, generator=generator)
    coarse = torch.rand(1, 3, 3, 3, generator=generator)
    smooth = nn.functional.interpolate(coarse, image_size, mode="bilinear")
    black, white = torch.zeros(1, 3, *image_size), torch.ones(1, 3, *image_size)
    return torch.cat([smooth, noise[:1]]), torch.cat([black, white, noise[1:].round()])


def _cycled(pictures: Tensor, n: int) -> list[Tensor]:
    return [pictures[i % len(pictures)] for i in range(n)]


def _companies(probes: Tensor, loud: Tensor) -> list[Tensor]:
    """Batches in which the probes are together, among all companions, and among equal ones."""
    (first, second), (black, white, noise) = probes, loud
    batches = [[first, second], [black, first, white, second, noise], [second, white, white, white, first]]
    return [torch.stack(batch) for batch in batches]


def _alone(function: Function, probes: Tensor) -> Tensor:
    """The logits (probes, classes) of each probe by itself."""
    return torch.cat([check_shape(function(probe[None]), 1) for probe in probes]).double()


def _movement(
    function: Function, probes: Tensor, batches: list[Tensor], expected: Tensor, precision: str, when: str
) -> float:
    """How far a probe's margin is at most from that expected, wherever the probe is in a batch.

    Raises SoundnessError if a difference of any two of its logits moved by more than rounding moves it.
    """
    moved = 0.0
    for batch in batches:
        logits = check_shape(function(batch), len(batch)).double()
        for probe, reference in zip(probes, expected, strict=True):
            for found in logits[(batch == probe).flatten(1).all(dim=1)]:
                _refuse_more_than_rounding(_difference(found, reference), reference, precision, when)
                moved = max(moved, abs(_margin(found) - _margin(reference)))
    return moved


def _margin(logits: Tensor) -> float:
    """The best logit minus the second best; 0 where they are no numbers, which is refused when it is met."""
    best, second = logits.nan_to_num(0, 0, 0).topk(2).values.tolist()
    return float(best - second)


def _difference(found: Tensor, expected: Tensor) -> float:
    """The most that a difference of two of the logits moved; infinite where a number became none."""
    same = (found == expected) | (found.isnan() & expected.isnan())
    change = torch.where(same, 0.0, found - expected).nan_to_num(nan=torch.inf)
    return float(change.amax().clamp(min=0) - change.amin().clamp(max=0))


def _refuse_more_than_rounding(moved: float, expected: Tensor, precision: str, when: str) -> None:
    if precision == "32-true" and expected.device.type != "cpu":
        precision = "16-mixed"
    limit = MOST_MOVED[precision] * max(1.0, float(expected.nan_to_num(0, 0, 0).abs().max()))
    if not moved <= limit:
        raise SoundnessError(
            f"model: expected answers that depend on one view alone, found logits that move by {moved:.2g} "
            f"{when} (rounding: at most {limit:.2g}); take out what looks at the whole batch, draws random "
            "numbers or remembers earlier calls, and call .eval() on layers in plain lists"
        )


@contextmanager
def _without_chance(device: torch.device) -> Iterator[None]:
    """Raises SoundnessError at the end if anything inside has drawn from a generator of random numbers."""
    before = _states(device)
    yield
    if _states(device) != before:
        raise SoundnessError(
            "model: expected the same answer each time, found that it draws random numbers in a forward "
            "pass; F.dropout needs training=self.training, noise does not belong into a certified model"
        )


def _states(device: torch.device) -> list[object]:
    """The states of the generators that a model could draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return [random.getstate(), repr(np.random.get_state()), *(state.numpy().tobytes() for state in states)]
