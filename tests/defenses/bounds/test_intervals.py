"""Interval bounds by exhaustion: no image of a box has smaller differences of logits than the bounds say.

The worlds are all images of 3x3 pixels of two values, or 2x3 of three, and networks of two layers, with every
place and content of the patch. The twins, each with a part of the proof taken away, must break.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from certipatch.defenses.bounds.defense import IntervalDefense
from certipatch.errors import ConfigError, SoundnessError
from certipatch.geometry.masks import MaskSet
from certipatch.models.build import build, describe
from certipatch.models.small import Normalize
from certipatch.views import intervals
from certipatch.views.intervals import bounds, layers_of
from worlds import World

WORLDS = [
    World((3, 3), (1, 1), 3, values=2, fill=0),
    World((3, 3), (1, 2), 3, values=2, fill=0),
    World((2, 3), (1, 1), 3, values=3, fill=0),
    World((2, 3), (1, 1), 2, values=3, fill=0),
]
BIAS = [1.1, 1.6, 1.1, 1.6]  # so that there are certificates, and attacks on the others
SEEDS = 3
HALF = (0.5, 0.5, 0.5)


def network(seed, middle=None, size=(3, 3), bias=1.1):
    """A convolution and a linear layer that answer 1 the more often, the larger the bias; in double
    precision."""
    torch.manual_seed(seed)
    convolution, linear = nn.Conv2d(3, 4, 2), nn.Linear(4 * (size[0] - 1) * (size[1] - 1), 3)
    with torch.no_grad():
        linear.weight.mul_(2)
        linear.bias.copy_(torch.tensor([0.0, bias, 0.0]))
    layers = [
        Normalize(HALF, HALF),
        convolution,
        nn.ReLU(),
        *([middle] if middle else []),
        nn.Flatten(),
        linear,
    ]
    return nn.Sequential(*layers).double().eval()


def every_image(world):
    grey = torch.from_numpy(world.images).double().view(-1, 1, *world.image) / (world.values - 1)
    return grey.expand(-1, 3, -1, -1).contiguous()


def broken(world, defense):
    """Attack every image in every way, with what the network answers on it as the truth."""
    found = defense.predict(every_image(world))
    certified = np.array([one.certified for one in defense.certify(every_image(world), found)])
    labels, counts = found.numpy(), Counter(certified=int(certified.sum()))
    for pixels, content in world.attacks():
        attacked = world.images.copy()
        attacked[:, pixels] = content
        wrong = labels[world.number(attacked)] != labels
        counts["broken"] += int((wrong & certified).sum())
        counts["others broken"] += int((wrong & ~certified).sum())
    return counts


@pytest.mark.parametrize(("world", "bias"), list(zip(WORLDS, BIAS, strict=True)))
def test_no_attack_on_a_certified_image_succeeds(world, bias):
    counts = Counter()
    for seed in range(SEEDS):
        model = network(seed, size=world.image, bias=bias)
        counts.update(broken(world, IntervalDefense(model, world.masks)))
    assert counts["broken"] == 0
    assert counts["certified"] >= 50
    assert counts["others broken"] >= 50


def test_the_twin_that_forgets_the_absolute_value_of_the_weights_breaks(monkeypatch):
    def forgetful(through, weight, bias, lower, upper):
        centre = through((upper + lower) / 2, weight, bias)
        radius = through((upper - lower) / 2, weight, None)
        return torch.minimum(centre - radius, centre + radius), torch.maximum(
            centre - radius, centre + radius
        )

    monkeypatch.setattr(intervals, "_affine", forgetful)
    assert sum(
        broken(WORLDS[1], IntervalDefense(network(seed), WORLDS[1].masks))["broken"] for seed in range(8)
    )


def test_the_twin_with_a_mask_less_breaks(monkeypatch):
    monkeypatch.setattr(MaskSet, "uncovered_patches", lambda _: None)
    world = WORLDS[0]

    def without(i):
        return replace(world.masks, windows=world.masks.windows[:i] + world.masks.windows[i + 1 :], grid=None)

    twins = (IntervalDefense(network(seed), without(i)) for seed in range(SEEDS) for i in range(9))
    assert any(broken(world, twin)["broken"] for twin in twins)


class Steep(nn.Module):
    """A layer that bounds do not know."""

    def forward(self, values):
        return 6 * values - 1


def test_the_twin_that_skips_a_layer_it_does_not_know_breaks(monkeypatch):
    """As the published converter does."""
    model = network(1, Steep())
    with pytest.raises(SoundnessError, match="found Steep; choose a network of these alone"):
        IntervalDefense(model, WORLDS[1].masks)
    monkeypatch.setitem(intervals.STEPS, Steep, lambda _, lower, upper: (lower, upper))
    with pytest.raises(SoundnessError, match="a layer does not do what its type says"):
        IntervalDefense(model, WORLDS[1].masks)
    monkeypatch.setattr(IntervalDefense, "_check_bounds", lambda _: None)
    twins = (IntervalDefense(network(seed, Steep()), WORLDS[1].masks) for seed in range(8))
    assert any(broken(WORLDS[1], twin)["broken"] for twin in twins)


def deep(seed):
    """Every layer that bounds go through, with random statistics."""
    torch.manual_seed(seed)
    layers = [
        Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)),
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Identity()),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.BatchNorm2d(4, affine=False),
        nn.AvgPool2d(2, 1),
        nn.Conv2d(4, 6, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5, bias=False),
        nn.ReLU(),
        nn.Linear(5, 4),
    ]
    model = nn.Sequential(*layers).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)  # negative ones among them
    return model.eval()


@pytest.mark.parametrize("seed", range(5))
@torch.no_grad()
def test_images_of_a_box_keep_to_the_bounds_and_a_box_of_one_image_meets_them(seed):
    model, rng = deep(seed), torch.Generator().manual_seed(seed)
    image = torch.rand(1, 3, 8, 8, generator=rng, dtype=torch.float64)
    half = 0.3 * torch.rand(1, 3, 8, 8, generator=rng, dtype=torch.float64)
    label = torch.tensor([seed % 4])
    lowest = bounds(model, image - half, image + half, label)
    corners = torch.rand(500, 3, 8, 8, generator=rng, dtype=torch.float64).round() * 2 - 1
    inside = torch.rand(500, 3, 8, 8, generator=rng, dtype=torch.float64) * 2 - 1
    logits = model(image + half * torch.cat([corners, inside]))
    assert (logits[:, label] - logits >= lowest - 1e-12).all()
    assert (lowest[0, label] == 0).all()
    of_one = bounds(model, image, image, label)
    assert torch.allclose(of_one, model(image)[:, label] - model(image), atol=1e-12)


def test_the_bounds_are_those_of_a_restatement_pixel_by_pixel():
    """A convolution and a linear layer in loops over numbers, which know nothing of tensors."""
    model = network(3)
    _, convolution, _, _, linear = model
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.5, (3, 3, 3))
    high = low + rng.uniform(0, 0.5, (3, 3, 3))
    w, b = convolution.weight.detach().numpy(), convolution.bias.detach().numpy()
    hidden = []
    for c, y, x in product(range(4), range(2), range(2)):
        down = up = b[c]
        for k, i, j in product(range(3), range(2), range(2)):
            ends = [(v[k, y + i, x + j] - 0.5) / 0.5 * w[c, k, i, j] for v in (low, high)]
            down, up = down + min(ends), up + max(ends)
        hidden.append((max(down, 0), max(up, 0)))
    v, d = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    expected = [
        d[1] - d[c] + sum(min((v[1, n] - v[c, n]) * end for end in ends) for n, ends in enumerate(hidden))
        for c in range(3)
    ]
    lower, upper = (torch.from_numpy(each)[None] for each in (low, high))
    with torch.no_grad():
        found = bounds(model, lower, upper, torch.tensor([1]))[0]
    assert np.allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("layer", [nn.MaxPool2d(2), nn.GELU(), nn.Dropout(), nn.LayerNorm(2), nn.Softmax(1)])
def test_other_layers_are_refused(layer):
    with pytest.raises(SoundnessError, match=f"found {type(layer).__name__}; choose a network"):
        layers_of(nn.Sequential(nn.Conv2d(3, 4, 2), layer, nn.Flatten(), nn.Linear(4, 2)))


class Louder(nn.ReLU):
    """A subclass that does something else than its parent."""

    def forward(self, values):
        return 2 * values.relu()


def test_what_only_looks_like_a_known_layer_is_refused():
    images = (torch.zeros(1, 3, 3, 3).double(), torch.ones(1, 3, 3, 3).double(), torch.tensor([0]))
    with pytest.raises(SoundnessError, match="found Louder"):
        layers_of(network(0, Louder()))
    padded = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    with pytest.raises(SoundnessError, match="padded with zeros, found circular"):
        bounds(nn.Sequential(padded, nn.Flatten(), nn.Linear(36, 2)), *images)
    with pytest.raises(SoundnessError, match="expected a Linear layer at the end, found ReLU"):
        bounds(nn.Sequential(nn.Flatten(), nn.ReLU()), *images)
    with pytest.raises(SoundnessError, match="BatchNorm in evaluation mode"):
        bounds(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2)), *images)
    hooked = network(0)
    hooked[1].register_forward_hook(lambda *_: None)
    with pytest.raises(SoundnessError, match="layers without hooks"):
        layers_of(hooked)


def test_what_the_defense_refuses():
    masks = WORLDS[0].masks
    with pytest.raises(ConfigError, match="expected 32-true with bounds"):
        IntervalDefense(network(0), masks, precision="bf16-mixed")
    with pytest.raises(SoundnessError, match="expected every patch to be covered"):
        IntervalDefense(network(0), replace(masks, windows=masks.windows[1:], grid=None))
    defense = IntervalDefense(network(0), masks)
    with pytest.raises(SoundnessError, match="float values in"):
        defense.predict(torch.full((1, 3, 3, 3), 1.5, dtype=torch.float64))
    with pytest.raises(SoundnessError, match="classes from 0 to 2"):
        defense.certify(torch.zeros(1, 3, 3, 3, dtype=torch.float64), torch.tensor([3]))


def test_bounds_go_through_the_small_network_of_ours():
    model = build(describe("ibp-small", classes=(), num_classes=10, image_size=(14, 18)))
    masks = MaskSet.covering(image_size=(14, 18), patch_size=(3, 3), masks_per_axis=2)
    images = torch.rand(2, 3, 14, 18, generator=torch.Generator().manual_seed(0))
    defense = IntervalDefense(model, masks)
    verdicts = defense.certify(images, defense.predict(images))
    assert [one.passes for one in verdicts] == [9, 9]
    assert all(len(one.weakest[0]) == 4 for one in verdicts)


def test_a_pooling_that_turns_its_numbers_round_keeps_the_ends_in_order(monkeypatch):
    """Torch divides by a negative number if asked to. The twin that maps both ends as they are breaks."""
    torch.manual_seed(0)
    layers = [nn.AvgPool2d(2, divisor_override=-4), nn.Flatten(), nn.Linear(12, 2)]
    model = nn.Sequential(*layers).double().eval()
    lower = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.rand(500, 3, 4, 4, dtype=torch.float64).round())
        smallest = float((logits[:, 0] - logits[:, 1]).min())

        def bound() -> float:
            return float(bounds(model, lower, lower + 1, torch.tensor([0]))[0, 1])

        assert bound() <= smallest
        for kind in (nn.AvgPool2d, nn.Flatten):
            monkeypatch.setitem(
                intervals.STEPS, kind, lambda layer, lower, upper: (layer(lower), layer(upper))
            )
        assert bound() > smallest


def patched(number):
    """A network of which a part, or all of it, answers the contrary where a pixel is white."""
    model = network(0, size=(2, 3), bias=2.0)
    part = model[number] if number is not None else model
    plain = type(part).forward

    def contrary(values):
        found, white = plain(part, values), values.flatten(1).amax(dim=1) >= 1
        return torch.where(white.view(-1, *[1] * (found.ndim - 1)), -found, found)

    part.forward = contrary
    return model


@pytest.mark.parametrize("number", [None, 1, 2, 4])
def test_a_forward_that_was_set_on_a_module_is_refused(number):
    world = World((2, 3), (1, 1), 3, values=3, fill=0)
    with pytest.raises(SoundnessError, match="the forward that was set on it"):
        IntervalDefense(patched(number), world.masks)


def test_the_twin_that_reads_types_only_breaks(monkeypatch):
    monkeypatch.setattr(IntervalDefense, "_check_bounds", lambda _: None)
    monkeypatch.setattr(intervals, "vars", lambda _: {}, raising=False)
    world = World((2, 3), (1, 1), 3, values=3, fill=0)
    assert broken(world, IntervalDefense(patched(None), world.masks))["broken"]


class Clipped(nn.Module):
    """It calls itself Normalize, and says of white what that is not."""

    mean = std = torch.ones(3, dtype=torch.float64) / 2

    def forward(self, values):
        return torch.where(values >= 1, -9.0, (values - 0.5) / 0.5)


Clipped.__name__ = "Normalize"


def test_a_layer_that_is_not_what_its_name_says_at_the_ends_of_a_box_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(Clipped(), nn.Flatten(), nn.Linear(18, 3)).double().eval()
    with pytest.raises(SoundnessError, match="a layer does not do what its type says"):
        IntervalDefense(model, World((2, 3), (1, 1), 3, values=3, fill=0).masks)
