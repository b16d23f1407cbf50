"""The fast ways through the network give what the plain one gives, and are left where they would not."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from torch import nn

import oracle
from certipatch import MaskSet, PatchCleanser
from certipatch.data.load import load_source
from certipatch.errors import ConfigError, SoundnessError
from certipatch.models.build import build, describe
from certipatch.models.small import Normalize
from certipatch.records.manifest import read_manifest
from certipatch.records.read import read_records
from certipatch.runtime.devices import make_fabric
from certipatch.training.config import TrainConfig
from certipatch.training.strategies import STRATEGIES
from certipatch.training.train import train
from certipatch.views.masked import frozen, mask_images, visible, window_tensor
from certipatch.views.network import Network, fastest_batch_size
from certipatch.views.prefix import CARRY_NAN, Watch, _equal, find
from inputs import typed

pytestmark = pytest.mark.usefixtures("one_thread")

MASKS = MaskSet.covering(image_size=(24, 24), patch_size=(3, 3), masks_per_axis=6)


def cnn(*, late: nn.Module | None = None) -> nn.Sequential:
    """A local stem whose maps are as large as the image, then a global head; double precision, so equal means
    equal."""
    torch.manual_seed(1)
    stem = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
    )
    rest = nn.Sequential(late or nn.Identity(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(8 * 9, 4))
    model = nn.Sequential(Normalize((0.5,) * 3, (0.25,) * 3), stem, rest)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    nn.init.normal_(model[2][-1].weight, std=0.5)
    return model.double().eval()


def pictures(n: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(n, 3, 24, 24, generator=generator, dtype=torch.float64)
    return noise * torch.linspace(0.1, 1, n).view(-1, 1, 1, 1)


def labels_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images).argmax(1)


def settled(verdicts):
    return [(v.vanilla_label, v.defended_label, v.case, v.certified) for v in verdicts]


# The shared prefix.


@pytest.mark.parametrize(("batch_size", "exhaustive"), [(7, False), (64, False), (64, True)])
def test_pasting_changes_no_answer(batch_size, exhaustive):
    model, images = cnn(), pictures()
    labels = labels_of(model, images)
    labels[1] = (labels[1] + 1) % 4
    options = {"batch_size": batch_size, "exhaustive": exhaustive}
    plain = PatchCleanser(model, MASKS, **options)
    fast = PatchCleanser(model, MASKS, **options, shared_prefix=True)
    assert fast.network.prefix is not None
    found, expected = fast.certify(images, labels), plain.certify(images, labels)
    assert settled(found) == settled(expected)
    assert {v.certified for v in found} == {True, False}
    for one, other in zip(found, expected, strict=True):
        if exhaustive or one.certified:  # the same views were looked at
            assert one.passes == other.passes
            assert one.margin == pytest.approx(other.margin, rel=1e-6)
    assert fast.predict(images).tolist() == plain.predict(images).tolist()


def test_pasting_with_room_for_few_images():
    """The activations of an image stay its own while others come and go."""
    model, images = cnn(), pictures(7)
    labels = labels_of(model, images)
    fast = PatchCleanser(model, MASKS, batch_size=64, shared_prefix=True)
    fast.network.images_at_once = 2
    found, expected = (
        fast.certify(images, labels),
        PatchCleanser(model, MASKS, batch_size=64).certify(images, labels),
    )
    assert settled(found) == settled(expected)
    margins = [
        (one.margin, other.margin) for one, other in zip(found, expected, strict=True) if one.certified
    ]
    assert len(margins) >= 2
    assert all(one == pytest.approx(other, rel=1e-6) for one, other in margins)


def test_the_head_runs_for_fewer_views():
    model, images = cnn(), pictures(2)
    fast = PatchCleanser(model, MASKS, shared_prefix=True, exhaustive=True, batch_size=32)
    seen = {"head": 0, "tail": 0}
    fast.network.prefix.head.register_forward_hook(
        lambda _m, x, _y: seen.__setitem__("head", seen["head"] + len(x[0]))
    )
    fast.network.prefix.tail.register_forward_hook(
        lambda _m, x, _y: seen.__setitem__("tail", seen["tail"] + len(x[0]))
    )
    fast.predict(images)
    k, apart = len(MASKS), int(fast.network.apart.sum()) // 2
    assert apart > 0.3 * k * (k - 1) / 2
    assert seen["tail"] == 2 * (1 + k * (k + 1) // 2)
    assert seen["head"] == seen["tail"] - 2 * apart


class Uneven(nn.Module):
    """Channels that see more than others."""

    def forward(self, x):
        return torch.cat([x[:, :1], nn.functional.avg_pool2d(x[:, 1:], 5, 1, 2)], dim=1)


@pytest.mark.parametrize("late", [None, Uneven()])
def test_reach_is_what_a_mask_changes(late):
    """Against one pixel at a time: no activation outside of a mask's reach depends on a pixel under it."""
    found = find(cnn(late=late), MASKS, layer="_2_0")
    image = pictures(1).requires_grad_()
    with torch.no_grad():
        shape = found.head(image).shape
    for i in (0, 8, 21, 35):
        keep = torch.from_numpy(
            oracle.keep_of((24, 24), [(w.top, w.left, w.height, w.width) for w in MASKS.windows[i]])
        )
        outside = ~found.reach[i].permute(2, 0, 1).expand(shape[1:])
        gradient = torch.autograd.grad(found.head(image)[0][outside].pow(2).sum(), image)[0]
        assert (gradient[0].abs().sum(0)[~keep] == 0).all()
        inside = torch.autograd.grad(found.head(image)[0][~outside].pow(2).sum(), image)[0]
        assert (inside[0].abs().sum(0)[~keep] > 0).any()


class GlobalNorm(nn.Module):
    def forward(self, x):
        return x - x.mean(dim=(1, 2, 3), keepdim=True)


class Forgetful(nn.Module):
    """A blur over the whole map that hides NaN from whoever measures with it."""

    def forward(self, x):
        return (
            torch.nan_to_num(x, nan=0.0).mean(dim=(2, 3), keepdim=True) + torch.where(x.isnan(), x, 0.0) + x
        )


class Glare(nn.Module):
    """Turns a bright picture's map down. Local for all others, and for NaN, which is not greater than
    anything."""

    def forward(self, x):
        return torch.where(x.sum(dim=(1, 2, 3), keepdim=True) > 127, -x, x)


class Folded(nn.Module):
    """Two rows for each image, for a while."""

    def forward(self, x):
        return x.reshape(-1, x.shape[1] // 2, *x.shape[2:])


class Strict(nn.Module):
    def forward(self, x):
        if not x.isfinite().all():
            raise ValueError("no numbers")
        return x


@pytest.mark.parametrize("late", [GlobalNorm(), nn.GroupNorm(2, 8).double()], ids=["mean", "group norm"])
def test_global_layers_are_not_in_the_prefix(late):
    found = find(cnn(late=late), MASKS)
    assert found is not None
    with_late = find(cnn(late=late), MASKS, layer=found.layer)
    assert with_late.layer == found.layer
    assert not any(isinstance(module, type(late)) for module in found.head.modules())
    with pytest.raises(ConfigError, match="expected a local layer"):
        find(cnn(late=late), MASKS, layer="_2_0")


def test_what_may_depend_on_the_picture_is_not_in_the_prefix():
    """No measurement on some pictures shows what a comparison does to another; here the false certificate
    that followed."""
    model, picture = cnn(late=Glare()), torch.full((1, 3, 24, 24), 0.5, dtype=torch.float64)
    picture[..., :3, :3] = picture[..., -3:, -3:] = 1  # dark under the two masks in the corners only
    labels, plain = labels_of(model, picture), PatchCleanser(model, MASKS, fill=0.5)
    fast = PatchCleanser(model, MASKS, fill=0.5, shared_prefix=True)
    (expected,) = plain.certify(picture, labels)
    assert (expected.certified, expected.failing_pair) == (False, (0, 35))
    assert fast.network.apart[0, 35]
    assert settled(fast.certify(picture, labels)) == settled([expected])


SWALLOW = [
    torch.sign,
    torch.nan_to_num,
    lambda x: x.sort(dim=2).values,
    lambda x: x.bool() * x,
    lambda x: x.contiguous().view(torch.float32)[..., 1::2] + torch.zeros(1, dtype=x.dtype),
    lambda x: x.view(torch.int64) * torch.full((1,), 1e-20, dtype=x.dtype),
    lambda x: nn.functional.max_pool2d(x, 3, 1, 1, return_indices=True)[1] + torch.zeros(1, dtype=x.dtype),
]


@pytest.mark.parametrize("swallow", SWALLOW)
def test_the_head_ends_where_nan_may(swallow):
    class Swallow(nn.Module):
        def forward(self, x):
            return swallow(x)

    model = cnn()
    model[1].insert(3, Swallow())
    found = find(model, MASKS)
    assert found.layer == "_1_2"


CARRY = [
    *(
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, stride=2, groups=4),
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(12),
    ),
    *(
        nn.InstanceNorm2d(4),
        nn.ReLU(),
        nn.ReLU6(),
        nn.LeakyReLU(),
        nn.PReLU(),
        nn.ELU(),
        nn.GELU(),
        nn.SiLU(),
        nn.Mish(),
        nn.Softplus(),
    ),
    *(
        nn.Sigmoid(),
        nn.Tanh(),
        nn.Hardsigmoid(),
        nn.Hardswish(),
        nn.MaxPool2d(3, 2),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(5),
    ),
    *(
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=1.5, mode="bilinear"),
        nn.ReflectionPad2d(1),
        nn.ReplicationPad2d(1),
    ),
    *(nn.ZeroPad2d(1), nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.Linear(12, 3), nn.Dropout()),
    *(
        lambda x: x + x.mean(1, keepdim=True),
        lambda x: x * x.sum((2, 3), keepdim=True),
        lambda x: torch.cat([-x, x - 1, x / 0.1], 1),
    ),
    lambda x: (
        torch.stack(x.chunk(2, 1), 4).flatten(3).permute(0, 2, 3, 1)[:, ::2].unsqueeze(0).squeeze(0).clone()
    ),
]


@torch.inference_mode()
@pytest.mark.parametrize("operation", CARRY, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_operations_that_are_said_to_carry_nan_do(operation, layout):
    """What changes with a pixel, to whatever value, is NaN where that is NaN."""
    operation = operation.eval() if isinstance(operation, nn.Module) else operation
    images = torch.randn(6, 4, 12, 12, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=layout
    )
    reached = False
    for at in (0, 5, 11):  # some layers leave pixels out
        hurt = images.clone()
        hurt[:, :, at, at] = torch.nan
        with Watch() as watch:
            found = operation(hurt)
        assert watch.carried
        found = found.isnan()
        reached |= bool(found.any())
        for value in (0.0, -1e3, 1e3, 7.0):
            changed = images.clone()
            changed[:, :, at, at] = value
            assert not ((operation(changed) != operation(images)) & ~found).any()
    assert reached


@torch.inference_mode()
@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.topk(3, dim=3).values,
        lambda x: x.max(dim=3).values,
        lambda x: torch.where(x > 0, x, 1),
        lambda x: x.argmax(1),
        torch.isnan,
        lambda x: x.nan_to_num(),
        lambda x: x.sort(dim=3).values,
        lambda x: x.median(dim=3).values,
        lambda x: x.long(),
        lambda x: x[:, [0, 1]],
    ],
)
def test_other_operations_are_not_taken_for_such(operation):
    with Watch() as watch:
        operation(torch.randn(1, 4, 12, 12))
    assert not watch.carried


@torch.inference_mode()
@pytest.mark.parametrize("name", sorted(CARRY_NAN))
def test_an_operation_of_others_is_not_trusted_by_its_name(name: str):
    """Anybody can register an operation of this name, which does with NaN what it likes."""
    with torch.library._scoped_library("strangers", "FRAGMENT") as library:
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, lambda x: x.nan_to_num(), "CPU")
        with Watch() as watch:
            getattr(torch.ops.strangers, name)(torch.randn(1, 4, 12, 12))
    assert not watch.carried


class ThroughNumpy(nn.Module):
    """Leaves torch for a moment, out of sight of whoever watches torch's operations."""

    def forward(self, x):
        return x + torch.from_numpy(np.nan_to_num(x.detach().numpy())).mean(dim=(2, 3), keepdim=True)


def test_what_is_computed_out_of_sight_is_in_no_prefix():
    assert find(cnn(), MASKS) is not None
    assert find(cnn(late=ThroughNumpy()), MASKS) is None


def add_hook(register: str):
    return lambda model: getattr(model[1], register)(lambda _module, *tensors: tensors[-1])


def permute(model: nn.Module) -> None:
    """The same weights at other places: neither their sum nor, through ``.data``, their version changes."""
    weight = model[2][-1].weight
    weight.data.view(-1).copy_(weight.data.flatten().flip(0))


AFTER_CUTTING = {
    "hook": add_hook("register_forward_hook"),
    "hook before": add_hook("register_forward_pre_hook"),
    "hook in place of another": lambda model: (
        model[0]._forward_pre_hooks.clear(),
        model[0].register_forward_pre_hook(lambda _module, inputs: inputs),
    ),
    "permutation": permute,
    "swap of two": lambda model: model[2][-1].bias.data[:2].copy_(model[2][-1].bias.data[:2].flip(0)),
    "buffer": lambda model: model[1][1].running_mean.data.add_(1),
    "setting": lambda model: setattr(model[1][3], "stride", (1, 1)),
    "tuple of tensors beside a setting": lambda model: (
        setattr(model[1][3], "seen", (torch.zeros(2), torch.ones(2))),
        setattr(model[1][3], "padding", (0, 0)),
    ),
    "method": lambda model: setattr(model[1][2], "forward", torch.abs),
}


@pytest.mark.parametrize("name", AFTER_CUTTING)
def test_a_change_after_the_network_was_cut_is_seen(name: str):
    model = cnn()
    model[0].register_forward_pre_hook(lambda _module, _inputs: None)
    defense = PatchCleanser(model, MASKS, shared_prefix=True)
    images = pictures(1)
    defense.predict(images)
    AFTER_CUTTING[name](model)
    with pytest.raises(SoundnessError, match="as it was compiled or its prefix cut"):
        defense.predict(images)


def test_a_wrong_reach_is_caught(monkeypatch, capsys):
    """A layer that looks local and is not: pasting would give something else, so it is not used."""
    model = cnn(late=Forgetful())
    model[1].append(model[2][0])
    model[2][0] = nn.Identity()
    assert find(model, MASKS).layer == "_1_4"
    with pytest.raises(ConfigError, match="shared prefix '_1_5'"):
        find(model, MASKS, layer="_1_5")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("certipatch.views.prefix.Watch", lambda: nullcontext(SimpleNamespace(carried=True)))
    with pytest.raises(ConfigError, match="shared prefix '_1_5'"):
        find(model, MASKS, layer="_1_5")
    assert "shared prefix: not used, pasting at _1_5" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("blind", [False, True])
def test_a_wrong_reach_of_any_mask_is_caught(blind):
    """Also where the logits do not show it on noise."""
    model, noise = cnn(), pictures(5)[4:]
    model[2][-1].weight *= not blind
    found = find(model, MASKS)
    assert _equal(found, model, MASKS, noise)
    for mask in range(len(MASKS)):
        reach = found.reach.clone()
        reach[mask] = False
        assert not _equal(dataclasses.replace(found, reach=reach), model, MASKS, noise), mask


def test_a_network_that_is_not_finite_has_no_prefix_and_is_refused(capsys):
    model = cnn()
    with torch.no_grad():
        model[2][-1].weight[0] = float("nan")
    defense = PatchCleanser(model, MASKS, shared_prefix=True)
    assert defense.network.prefix is None
    assert "shared prefix: not used" in capsys.readouterr().err
    with pytest.raises(SoundnessError, match="finite logits"):
        defense.predict(pictures(1))


def test_a_network_that_is_changed_in_place_can_be_cut_before_it():
    """What follows the cut may write into the activations that it is given."""
    model = cnn()
    model[1][2] = nn.ReLU(inplace=True)
    assert find(model, MASKS, layer="_1_1").layer == "_1_1"
    images = pictures()
    options = {"batch_size": 7, "exhaustive": True}
    found = PatchCleanser(model, MASKS, **options, shared_prefix="_1_1").certify(
        images, labels_of(model, images)
    )
    assert settled(found) == settled(
        PatchCleanser(model, MASKS, **options).certify(images, labels_of(model, images))
    )


@pytest.mark.parametrize("start", [Strict(), Folded()])
def test_what_cannot_be_measured_is_not_in_the_prefix(start):
    """A network that refuses NaN has none; rows that are no images are not taken for such."""
    model = cnn()
    model[1].insert(1, start)
    model[1].insert(2, nn.Identity())
    model[1].insert(3, nn.Unflatten(0, (-1, 2)) if isinstance(start, Folded) else nn.Identity())
    model[1].insert(4, nn.Flatten(1, 2) if isinstance(start, Folded) else nn.Identity())
    found = find(model, MASKS)
    assert (found is None) == isinstance(start, Strict)
    if found:
        with pytest.raises(ConfigError):
            find(model, MASKS, layer="_1_2")


def test_a_hook_on_the_network_is_not_lost():
    """Tracing goes past it, and what it does to a seldom picture would not be noticed."""
    model = cnn()
    model.register_forward_hook(lambda _model, _inputs, logits: logits)
    assert find(model, MASKS) is None


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "resnetv2_50x1_bit"])
def test_networks_without_local_layers_have_none(arch):
    """Attention, and GroupNorm over space behind the first pooling: nothing worth pasting."""
    size = 64
    options = {"img_size": size} if arch.startswith("vit") else {}
    model = timm.create_model(arch, num_classes=3, **options).eval()
    masks = MaskSet.covering(image_size=(size, size), patch_size=(11, 11), masks_per_axis=3)
    assert find(model, masks) is None
    with pytest.raises(ConfigError, match="shared prefix 'add_1'"):
        find(model, masks, layer="add_1")


def test_a_model_that_cannot_be_traced_has_none():
    class Branching(nn.Module):
        def forward(self, x):
            return x[:, :, 0, 0].repeat(1, 2) if x.sum() > 0 else x[:, :, 1, 1].repeat(1, 2)

    model = Branching().eval()
    assert find(model, MASKS) is None
    PatchCleanser(model, MASKS, shared_prefix=True).predict(pictures(1))


# Compilation.


@pytest.mark.parametrize("how", ["raises", "lies"])
def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch, capsys, how):
    def broken(module, **_options):
        def run(*inputs):
            if how == "raises":
                raise RuntimeError("no C++ compiler\non this machine")
            return module(*inputs) + 5 * torch.arange(4)

        return run

    monkeypatch.setattr(torch, "compile", broken)
    model, images = cnn(), pictures(2)
    defense = PatchCleanser(model, MASKS, compile=True)
    announced, said = capsys.readouterr().err.splitlines()
    assert announced.startswith("compiling the network")
    assert said.startswith("not compiled, which is slower:")
    assert defense.network.compiled is False
    assert defense.predict(images).tolist() == PatchCleanser(model, MASKS).predict(images).tolist()


def test_compiled_batches_have_one_shape(monkeypatch):
    """Whatever is left for the last batch is filled up, and what fills it is not read."""
    shapes = set()

    def compiled(module, **_options):
        def run(*inputs):
            shapes.add(tuple(len(each) for each in inputs))
            return module(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    model, images = cnn(), pictures(3)
    labels = labels_of(model, images)
    for shared_prefix in (False, True):
        shapes.clear()
        defense = PatchCleanser(model, MASKS, compile=True, shared_prefix=shared_prefix, batch_size=10)
        assert defense.network.compiled
        assert settled(defense.certify(images, labels)) == settled(
            PatchCleanser(model, MASKS).certify(images, labels)
        )
        assert shapes == ({(10, 10), (10,)} if shared_prefix else {(10, 10)})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_compiled_answers(precision):
    """With the real compiler and prefix: labels as computed one view at a time, wherever the margin is above
    rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(
        Normalize((0.5,) * 3, (0.25,) * 3), timm.create_model("test_resnet", num_classes=5)
    ).eval()
    size = (48, 48)
    masks = MaskSet.covering(image_size=size, patch_size=(8, 8), masks_per_axis=6)
    images = torch.rand(4, 3, *size, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [0.2, 0.4, 0.7, 1]
    ).view(-1, 1, 1, 1)
    fast = PatchCleanser(model, masks, precision=precision, compile=True, shared_prefix=True, exhaustive=True)
    assert fast.network.compiled
    assert fast.network.prefix is not None
    labels = labels_of(model, images)
    plain = PatchCleanser(model, masks, precision=precision, exhaustive=True)
    with torch._dynamo.config.patch(error_on_recompile=True):  # one batch shape is one program
        found = fast.certify(images, labels)
    for one, other in zip(found, plain.certify(images, labels), strict=True):
        if other.margin > (1e-4 if precision == "32-true" else 0.02):
            assert settled([one]) == settled([other])
        assert one.margin == pytest.approx(other.margin, abs=1e-4 if precision == "32-true" else 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_compiled_code_rounds_where_the_model_does(frozen):
    """In bf16 a BatchNorm with large means, folded into a convolution's weights and bias of 8 bits, would
    move logits by whole units; the code answers within a few steps of bf16."""
    model = cnn().float()
    with torch.no_grad():
        model[1][0].bias += 3.7
        model[1][1].running_mean += 3.7
        model[1][1].running_var.fill_(0.01)
    images, windows = pictures(4).float(), window_tensor(MASKS, torch.device("cpu"))[:4]
    make = partial(Network, model, MASKS, fill=torch.full((3,), 0.5), batch_size=4, precision="bf16-mixed")
    code, plain = make(compile=True, frozen=frozen), make(compile=False)
    assert code.compiled
    answers, expected = code(images, windows).float(), plain(images, windows).float()
    step = float(expected.abs().max()) / 256
    assert float((answers - expected).abs().max()) <= 2 * step


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_compiled_weights_are_todays(frozen):
    """Of a model that was compiled before: with other weights, if by so little that a comparison with the
    model would let it pass."""
    model, images = cnn().float(), pictures(2).float()
    windows, fill = window_tensor(MASKS, torch.device("cpu"))[:2], torch.full((3,), 0.5)
    make = partial(Network, model, MASKS, fill=fill, batch_size=4, precision="32-true", compile=True)
    before = make(frozen=True)(images, windows)
    with torch.no_grad():
        model[2][-1].bias += 5e-4
    now = make(frozen=frozen)
    assert now.compiled
    assert torch.allclose(now(images, windows) - before, torch.tensor(5e-4), atol=1e-5)


def test_a_large_run_is_fast_and_predict_follows(monkeypatch, cli, trained, photos, tmp_path):
    """Compiled, with a batch size of its own, by default; the manifest says so, --resume and predict do the
    same again."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, **_options: (asked.append(module), module)[1])
    monkeypatch.setattr("certipatch.certification.certify.LARGE", 0)
    monkeypatch.setattr("certipatch.certification.work.fastest_batch_size", lambda *_: 11)
    certify = typed("certify", model=trained, data=photos, patch=5, masks_per_axis=3, out=tmp_path)
    assert cli(*certify).code == 0
    way = read_manifest(tmp_path).environment["network"]
    assert way["compiled"]
    assert way["batch_size"] == 11
    assert way["shared_prefix"] is not None
    assert way["pairs_pasted"] > 0
    before = (tmp_path / "records.jsonl").read_bytes()

    made = []
    init = PatchCleanser.__init__
    monkeypatch.setattr(
        PatchCleanser, "__init__", lambda self, *a, **k: (made.append(k), init(self, *a, **k))[1]
    )
    monkeypatch.setattr("certipatch.certification.certify.LARGE", float("inf"))
    assert cli(*certify, "--resume").code == 0
    assert (tmp_path / "records.jsonl").read_bytes() == before
    assert cli("predict", "--model", trained, "--certified", tmp_path, photos / "red" / "0.png").code == 0
    for options in made:
        assert (options["compile"], options["batch_size"], options["shared_prefix"]) == (
            True,
            11,
            way["shared_prefix"],
        )

    out = tmp_path / "plain"
    assert cli(*certify[:-1], out, "--no-compile", "--no-shared-prefix", "--batch-size", 5).code == 0
    network = read_manifest(out).environment["network"]
    assert network.pop("moved") < 1e-3
    assert network == {"batch_size": 5, "compiled": False, "shared_prefix": None, "pairs_pasted": 0}
    for one, other in zip(read_records(tmp_path), read_records(out), strict=True):
        assert (one.certified, one.defended_label, one.case) == (
            other.certified,
            other.defended_label,
            other.case,
        )


@pytest.mark.slow
def test_compiled_search(monkeypatch, photos, tmp_path):
    """With the real compiler: training goes the same way at the same count of passes, and the weights that it
    sees are today's."""
    source = load_source(str(photos))
    spec = describe("test_resnet", classes=source.classes, num_classes=3, image_size=(32, 32))
    config = TrainConfig(
        strategy="greedy-multisize", patch_size=(5, 5), masks_per_axis=6, epochs=3, batch_size=8, lr=0.01
    )
    monkeypatch.setattr(
        "certipatch.training.masking.default_batch_size", lambda _size: 16
    )  # batches that are full, and some that are not
    last = {}
    for compile in (False, True):
        fabric = make_fabric(device="cpu")
        with torch._dynamo.config.patch(error_on_recompile=True):
            model, out = build(spec, seed=1), tmp_path / str(compile)
            last[compile] = train(model, spec, source, source, config, out, fabric=fabric, compile=compile)
    assert last[True]["forward_equivalents"] == last[False]["forward_equivalents"] == (25 + 6) * 24
    assert last[True]["loss"] == pytest.approx(last[False]["loss"], rel=1e-3)


@pytest.mark.slow
def test_compiled_search_finds_the_same_masks():
    """In float32, with BatchNorm folded into weights and statistics that move on between the searches, as in
    training."""
    size = (48, 48)
    torch.manual_seed(0)
    model = nn.Sequential(
        Normalize((0.5,) * 3, (0.25,) * 3), timm.create_model("test_resnet", num_classes=5)
    ).eval()
    masks, fill = (
        MaskSet.covering(image_size=size, patch_size=(8, 8), masks_per_axis=6),
        torch.full((3,), 0.5),
    )
    images, labels = (
        torch.rand(12, 3, *size) * torch.linspace(0.1, 1, 12).view(-1, 1, 1, 1),
        torch.arange(12) % 5,
    )
    torch._dynamo.utils.counters.clear()
    no_cache = (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    )
    with frozen(model), no_cache[0], no_cache[1]:  # what a cache holds is not counted
        look = Network(
            model, masks, fill=fill, batch_size=16, precision="32-true", compile=True, frozen=False
        )
    assert look.compiled
    assert torch._dynamo.utils.counters["inductor"]["efficient_conv_bn_eval"] == sum(
        isinstance(m, nn.BatchNorm2d) for m in model.modules()
    )
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(3):
        plain, fast = (
            torch.stack(STRATEGIES["greedy-multisize"](model, images, labels, masks, fill=fill, look=each))
            for each in (None, look)
        )
        assert torch.equal(plain, fast)
        seen.append(plain)
        torch.nn.functional.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()
        model.eval()
    assert not torch.equal(seen[0], seen[1]), "or yesterday's weights would do"
    assert not torch.equal(seen[1], seen[2])


# Precision and batches.


def test_precision():
    model, images = cnn().float(), pictures(1).float()
    seen: list[torch.dtype] = []
    model[2][-1].register_forward_hook(lambda _m, _x, y: seen.append(y.dtype))
    for precision, dtype in (("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)):
        defense = PatchCleanser(model, MASKS, precision=precision)
        seen.clear()
        defense.predict(images)
        assert set(seen) == {dtype}
    with pytest.raises(ConfigError, match=r"'bf16-true'.*32-true"):
        PatchCleanser(model, MASKS, precision="bf16-true")


def test_what_does_not_run_in_bf16_runs_in_float32(monkeypatch, cli, trained, photos, tmp_path):
    """One line says so, the manifest names the precision that was used, and predict uses it."""

    @contextmanager
    def no_bf16(precision, _device):
        if precision == "bf16-mixed":
            raise NotImplementedError("no kernel\nfor BFloat16")
        yield

    monkeypatch.setattr("certipatch.views.network.autocast", no_bf16)
    certify = typed("certify", model=trained, data=photos, patch=5, masks_per_axis=3, limit=3)
    done = cli(*certify, "--precision", "bf16-mixed", "--out", tmp_path / "bf16")
    assert done.code == 0
    said = [line for line in done.err.splitlines() if "bf16" in line]
    assert said == ["not in bf16-mixed but in float32: NotImplementedError: no kernel for BFloat16"]
    assert read_manifest(tmp_path / "bf16").certification.precision == "32-true"
    assert cli(*certify, "--out", tmp_path / "float32").code == 0
    assert (tmp_path / "bf16" / "records.jsonl").read_bytes() == (
        tmp_path / "float32" / "records.jsonl"
    ).read_bytes()
    answered = cli("predict", "--model", trained, "--certified", tmp_path / "bf16", photos / "red" / "0.png")
    assert answered.code == 0
    assert json.loads(answered.out)["precision"] == "32-true"

    monkeypatch.undo()  # another machine, on which bf16 runs; and back
    assert cli(*certify, "--precision", "bf16-mixed", "--out", tmp_path / "elsewhere").code == 0
    assert read_manifest(tmp_path / "elsewhere").certification.precision == "bf16-mixed"
    monkeypatch.setattr("certipatch.views.network.autocast", no_bf16)
    attack = typed(
        "attack", model=trained, data=photos, records=tmp_path / "elsewhere", out=tmp_path / "attack"
    )
    for line in (
        ["predict", "--model", trained, "--certified", tmp_path / "elsewhere", photos / "red" / "0.png"],
        attack,
    ):
        refused = cli(*line)
        assert refused.code == 2
        assert "precision: expected bf16-mixed, in which it was certified, found 32-true" in refused.err


CHANGES = {
    "one weight": lambda model: model[1][3].weight.data[0, 0, 0, 0].add_(1e-9),
    "other weights": lambda model: model.load_state_dict(
        {key: value * 2 for key, value in model.state_dict().items()}
    ),
    "statistics": lambda model: model[1][1].running_mean.neg_(),
    "weights elsewhere": lambda model: model[2][3].weight.__setattr__("data", -model[2][3].weight),
    "part": lambda model: model[1].__setitem__(2, nn.Sigmoid().eval()),
    "hook": lambda model: model[2].register_forward_hook(lambda _module, _inputs, logits: -logits),
    "precision": lambda model: model.float(),
}


@pytest.mark.parametrize("option", ["compile", "shared_prefix"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_that_changes_after_it_was_compiled_or_cut_is_refused(monkeypatch, change, option):
    monkeypatch.setattr(torch, "compile", lambda module, **_options: module)
    model, images = cnn(), pictures(1)
    defense, plain = PatchCleanser(model, MASKS, **{option: True}), PatchCleanser(model, MASKS)
    before = defense.predict(images)
    change(model)
    for call in (defense.predict, lambda images: defense.certify(images, before)):
        with pytest.raises(SoundnessError, match="make a new PatchCleanser"):
            call(images)
    images = images.to(model[1][0].weight)
    assert (
        PatchCleanser(model, MASKS, **{option: True}).predict(images).tolist()
        == plain.predict(images).tolist()
    )
    with pytest.raises(AttributeError):
        plain.model = cnn()


def test_training_mode_is_refused_before_the_model_is_cut_or_compiled():
    for option in ("compile", "shared_prefix"):
        with pytest.raises(SoundnessError, match="training mode"):
            PatchCleanser(cnn().train(), MASKS, **{option: True})


def test_fastest_batch_size(monkeypatch):
    """As good as the best within 5 %, on a CPU the largest; what no longer fits into memory ends the
    trial."""

    cost = {4: 1.0, 8: 0.8, 16: 0.82, 32: 0.9}

    def seconds(most, _model, views, _precision):
        if len(views) > most:
            raise torch.OutOfMemoryError
        return cost[len(views)] * len(views)

    for most, expected in [(32, 16), (8, 8), (4, 4), (2, 1)]:
        monkeypatch.setattr("certipatch.views.network._seconds", partial(seconds, most))
        assert fastest_batch_size(cnn(), MASKS, "32-true") == expected
    monkeypatch.undo()
    assert fastest_batch_size(cnn().float(), MASKS, "32-true") in (4, 8, 16, 32)


def test_paste_equals_the_head_under_both_masks():
    model, image = cnn(), pictures(1)
    found, windows = find(model, MASKS), window_tensor(MASKS, torch.device("cpu"))

    def head(*masks):
        keep = visible(torch.cat([windows[m] for m in masks])[None], MASKS.image_size)
        return found.head(mask_images(image, keep, 0.5)).permute(0, 2, 3, 1)

    with torch.no_grad():
        for i, j in np.argwhere(np.triu(found.apart.numpy())).tolist()[::17]:
            assert torch.equal(found.paste(head(i), head(j), torch.tensor([j])), head(i, j))
            assert torch.equal(found.paste(head(j), head(i), torch.tensor([i])), head(i, j))
