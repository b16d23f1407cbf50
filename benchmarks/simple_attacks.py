"""Simple patch attacks on a defended classifier, as anyone would write them first.

They import nothing of certipatch, and are the oracles of ``attacks.py``: an attack that knows the defense has
to find what each of these finds with as many queries. A query is an image that the network sees in a forward
or in a backward pass. The words: ``keep`` is a (masks, height, width) array of bool, True where a pixel stays
visible; a *view* is the image under one or two masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OutOfQueriesError(BaseException):
    """The network was asked as often as was agreed."""


class Counted(nn.Module):
    """A network that counts what it is asked, and refuses what is beyond ``budget``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.asked, self.budget = network, 0, float("inf")

    def count(self, images: Tensor) -> None:
        if self.asked + len(images) > self.budget:
            raise OutOfQueriesError
        self.asked += len(images)

    def forward(self, images: Tensor) -> Tensor:
        self.count(images)
        logits: Tensor = self.network(images)
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits


@dataclass(frozen=True)
class Victim:
    """One image (3, H, W) in [0, 1] with its label, and the defended classifier.

    ``predict`` gives the defended labels of images (N, 3, H, W), ``model`` the logits of views; ``fill``
    (3, 1, 1) is the colour of what a mask hides, ``patch`` the height and width of the patch.
    """

    model: Callable[[Tensor], Tensor]
    predict: Callable[[Tensor], Tensor]
    image: Tensor
    label: int
    patch: tuple[int, int]
    keep: Tensor
    fill: Tensor

    def paste(self, content: Tensor, place: tuple[int, int]) -> Tensor:
        (top, left), (h, w) = place, self.patch
        whole = F.pad(content, (left, self.image.shape[2] - left - w, top, self.image.shape[1] - top - h))
        outside = torch.ones(self.image.shape[1:], dtype=torch.bool)
        outside[top : top + h, left : left + w] = False
        return torch.where(outside, self.image, whole)

    def views(self, place: tuple[int, int], pairs: int, rng: torch.Generator) -> Tensor:
        """What is visible (V, H, W) in the one-mask views that show some of the patch, and in some random
        two-mask ones that do."""
        (top, left), (h, w), n = place, self.patch, len(self.keep)
        first, second = torch.randint(n, (2, pairs), generator=rng)
        keep = torch.cat([self.keep, self.keep[first] & self.keep[second]])
        return keep[keep[:, top : top + h, left : left + w].flatten(1).any(1)]

    def fooled(self, content: Tensor, place: tuple[int, int]) -> Tensor | None:
        """The patched image, of 8 bits a pixel, if the defended answer to it is wrong."""
        patched = self.paste((content * 255).round() / 255, place)
        return patched if int(self.predict(patched[None])) != self.label else None

    def random_place(self, rng: torch.Generator) -> tuple[int, int]:
        rows, columns = (side - p + 1 for side, p in zip(self.image.shape[1:], self.patch, strict=True))
        return int(torch.randint(rows, (), generator=rng)), int(torch.randint(columns, (), generator=rng))


def cross_entropy(logits: Tensor, label: int) -> Tensor:
    return F.cross_entropy(logits, torch.full((len(logits),), label))


def margin(logits: Tensor, label: int) -> Tensor:
    """How far another label is ahead of the true one, where it is by less than a logit."""
    others = logits.scatter(1, torch.full((len(logits), 1), label), -torch.inf).amax(1)
    return (others - logits[:, label]).clamp(max=1).mean()


def runner_up(logits: Tensor, label: int) -> Tensor:
    """Towards the label that is most often ahead of the others but the true one."""
    target = int(logits.detach().scatter(1, torch.full((len(logits), 1), label), -torch.inf).mean(0).argmax())
    return -cross_entropy(logits, target)


Places = Callable[[Victim, torch.Generator], Iterator[tuple[int, int]]]


def anywhere(victim: Victim, rng: torch.Generator) -> Iterator[tuple[int, int]]:
    while True:
        yield victim.random_place(rng)


def one_place(victim: Victim, rng: torch.Generator) -> Iterator[tuple[int, int]]:
    yield from repeat(victim.random_place(rng))


def failing_pairs(victim: Victim, rng: torch.Generator) -> Iterator[tuple[int, int]]:
    """A random place under a mask of a pair that is wrong on the clean image, and one anywhere, in turn."""
    first, second = torch.triu_indices(len(victim.keep), len(victim.keep))
    keep = victim.keep[first] & victim.keep[second]
    with torch.no_grad():
        wrong = victim.model(torch.where(keep[:, None], victim.image, victim.fill)).argmax(1) != victim.label
    masks = torch.cat([first[wrong], second[wrong]])
    (h, w) = victim.patch
    while True:
        mask = victim.keep[masks[int(torch.randint(len(masks), (), generator=rng))]]
        top, left = victim.random_place(rng)
        while mask[top : top + h, left : left + w].any():
            top, left = victim.random_place(rng)
        yield top, left
        yield victim.random_place(rng)


def eot(
    victim: Victim,
    rng: torch.Generator,
    *,
    places: Places = anywhere,
    loss: Callable[[Tensor, int], Tensor] = cross_entropy,
    momentum: float = 0.9,
    step: float = 0.1,
    steps: int = 40,
    pairs: int = 16,
    look_every: int = 10,
) -> Tensor:
    """Gradient of the loss, averaged over views, from a random content at each of the places.

    The content is rounded to 8 bits before it is looked at. Returns the patched image, or raises
    OutOfQueriesError.
    """
    for place in places(victim, rng):
        content = torch.rand(3, *victim.patch, generator=rng)
        velocity = torch.zeros_like(content)
        for t in range(steps):
            content = ((content.detach() * 255).round() / 255).requires_grad_()
            keep = victim.views(place, pairs, rng)[:, None]
            with torch.enable_grad():
                logits = victim.model(torch.where(keep, victim.paste(content, place), victim.fill))
                (gradient,) = torch.autograd.grad(loss(logits, victim.label), content)
            velocity = momentum * velocity + gradient / gradient.abs().mean().clamp(min=1e-12)
            content = (content.detach() + step * (1 - t / steps) * velocity.sign()).clamp(0, 1)
            if (t + 1) % look_every == 0 and (found := victim.fooled(content, place)) is not None:
                return found
    raise OutOfQueriesError


def random_places(victim: Victim, rng: torch.Generator) -> Tensor:
    """Random contents at random places: noise, one colour, or checks of black and white."""
    while True:
        noise = torch.rand(3, *victim.patch, generator=rng)
        colour = torch.rand(3, 1, 1, generator=rng).expand_as(noise)
        for content in (noise, colour, noise.round(), colour.round()):
            if (found := victim.fooled(content, victim.random_place(rng))) is not None:
                return found


def squares(victim: Victim, rng: torch.Generator, *, tries: int = 100) -> Tensor:
    """Random search without gradients: a square of the patch gets a colour of the cube's corners, and keeps
    it if more views are nearer to wrong."""
    h, w = victim.patch
    while True:
        place = victim.random_place(rng)
        keep = victim.views(place, 16, rng)[:, None]
        content = torch.rand(3, 1, w, generator=rng).round().expand(3, h, w).clone()
        best = -torch.inf
        for t in range(tries):
            side = max(1, round(min(h, w) * (1 - t / tries) / 2))
            top, left = (int(torch.randint(n - side + 1, (), generator=rng)) for n in (h, w))
            tried = content.clone()
            if t:
                tried[:, top : top + side, left : left + side] = torch.rand(3, 1, 1, generator=rng).round()
            with torch.no_grad():
                now = float(
                    margin(
                        victim.model(torch.where(keep, victim.paste(tried, place), victim.fill)), victim.label
                    )
                )
            if now >= best:
                content, best = tried, now
        if (found := victim.fooled(content, place)) is not None:
            return found


def plain_eot(victim: Victim, rng: torch.Generator) -> Tensor:
    return eot(victim, rng, places=one_place)


def eot_failing_pairs(victim: Victim, rng: torch.Generator) -> Tensor:
    return eot(victim, rng, places=failing_pairs)


def eot_margin(victim: Victim, rng: torch.Generator) -> Tensor:
    return eot(victim, rng, loss=margin, places=failing_pairs, pairs=8)


def eot_runner_up(victim: Victim, rng: torch.Generator) -> Tensor:
    return eot(victim, rng, loss=runner_up, places=failing_pairs, pairs=8)


def eot_no_momentum(victim: Victim, rng: torch.Generator) -> Tensor:
    return eot(victim, rng, momentum=0, step=0.05)


def mi_fgsm(victim: Victim, rng: torch.Generator) -> Tensor:
    """Momentum that forgets nothing, few and large steps."""
    return eot(victim, rng, places=failing_pairs, momentum=1, step=0.25, steps=10, look_every=5, pairs=0)


SIMPLE: dict[str, Callable[[Victim, torch.Generator], Tensor]] = {
    "eot, one place": plain_eot,
    "eot": eot,
    "eot, failing pairs": eot_failing_pairs,
    "eot, margin": eot_margin,
    "eot, runner-up": eot_runner_up,
    "eot, no momentum": eot_no_momentum,
    "mi-fgsm": mi_fgsm,
    "random contents": random_places,
    "squares": squares,
}
