"""Gradients of depthwise convolutions in float32, in a training in bf16 on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from certipatch.data.load import load_source
from certipatch.models.build import describe
from certipatch.models.small import SMALL_CNN, Normalize
from certipatch.records.manifest import read_manifest
from certipatch.runtime.devices import make_fabric
from certipatch.training import depthwise
from certipatch.training.checkpoint import Checkpoint
from certipatch.training.config import train_config
from certipatch.training.depthwise import in_float32, slow_layers
from certipatch.training.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
BF16 = {"device": "cpu", "precision": "bf16-mixed"}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 5, stride=2, padding=2, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, dilation=2, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return nn.Sequential(Normalize((0.5,) * 3, (0.5,) * 3), body)


def decide(monkeypatch: pytest.MonkeyPatch, pays) -> list[depthwise.Layer]:
    """As if the trial had found that float32 pays where ``pays`` says so; what it was asked."""
    asked: list[depthwise.Layer] = []

    def tried(layer: depthwise.Layer, _images: int) -> tuple[float, float]:
        asked.append(layer)
        return (1.5, 1.0) if pays(layer) else (1.4, 1.0)

    monkeypatch.setattr(depthwise, "_seconds", tried)
    return asked


def test_the_layers_are_found_and_those_that_pay_are_named(monkeypatch: pytest.MonkeyPatch, capsys):
    asked = decide(monkeypatch, lambda layer: layer.stride == (2, 2))
    model = network().train()
    found = slow_layers(model, (16, 16), 64, make_fabric(**BF16))
    first = depthwise.Layer((8, 16, 16), (8, 1, 5, 5), (2, 2), (2, 2), (1, 1), 8)
    assert asked == [first, depthwise.Layer((8, 8, 8), (16, 2, 3, 3), (1, 1), (0, 0), (2, 2), 4)]
    assert found == [first]
    assert model.training
    line = "the gradients of 1 of 2 grouped convolutions in float32, 1.5 times faster here than in bf16\n"
    assert capsys.readouterr().err == line


def test_nothing_is_tried_where_it_cannot_pay(monkeypatch: pytest.MonkeyPatch, capsys):
    asked = decide(monkeypatch, lambda _: True)
    assert slow_layers(network(), (16, 16), 64, make_fabric(device="cpu")) == []
    assert asked == []
    decide(monkeypatch, lambda _: False)
    assert slow_layers(network(), (16, 16), 64, make_fabric(**BF16)) == []
    assert capsys.readouterr().err == ""


def gradients(layers: list[depthwise.Layer]) -> tuple[list[torch.Tensor], list[torch.dtype]]:
    """Of all parameters; and in which types the backward passes of convolutions were computed."""
    model, seen = network(), []
    torch.manual_seed(1)
    images, backward = torch.rand(4, 3, 16, 16), torch.ops.aten.convolution_backward.default

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is backward:
                seen.append(args[1].dtype)
            return function(*args, **(kwargs or {}))

    with make_fabric(**BF16).autocast():
        loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0]))
    with Watch(), in_float32(layers):
        loss.backward()
    return [parameter.grad for parameter in model.parameters()], seen


def test_only_these_layers_compute_in_float32(monkeypatch: pytest.MonkeyPatch):
    """Their gradients are those of float32, rounded; no other layer is touched."""
    decide(monkeypatch, lambda _: True)
    layers = slow_layers(network(), (16, 16), 4, make_fabric(**BF16))
    plain, types = gradients([])
    assert types == [torch.bfloat16] * 3
    mixed, types = gradients(layers)
    assert types == [torch.float32, torch.float32, torch.bfloat16]
    for one, other in zip(plain, mixed, strict=True):
        assert one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=0.05, atol=0.01 * float(one.abs().max()))
    assert gradients(layers[:1])[1] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_the_trial_measures_what_is_run():
    """The gradients of the trial have the shapes of the layer's input and weight, of all groups or some."""
    for layer in depthwise._grouped(network(), (16, 16)):
        assert all(seconds > 0 for seconds in depthwise._seconds(layer, 2))
        for some in (layer, depthwise._some_groups(layer, 2)):
            args = depthwise._arguments(some, 2)
            image, weight, bias = depthwise._backward_in_float32(args)
            assert image.shape == (2, *some.image)
            assert weight.shape == some.weight
            assert bias is None
            with_gradient = args[1].clone().requires_grad_()
            shown = nn.functional.conv2d(with_gradient, args[2], None, *args[4:7], some.groups)
            assert shown.shape == args[0].shape
        assert depthwise._some_groups(layer, 2).groups == 2


def test_a_resume_does_as_the_run_began(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever a trial would find then: the weights are those of the undisturbed run."""
    source = load_source(str(photos))
    spec = describe(SMALL_CNN, classes=source.classes, num_classes=3)
    asked = {"strategy": "vanilla", "patch_size": (5, 5), "masks_per_axis": 6, "epochs": 2, "batch_size": 8}

    def run(out: Path, *, resume: bool = False) -> str:
        fabric, config = make_fabric(**BF16), train_config(**asked)
        train(network(), spec, source, source, config, out, fabric=fabric, resume=resume)
        return read_manifest(out).finished["weights_sha256"]

    decide(monkeypatch, lambda _: True)
    whole = run(tmp_path / "whole")
    assert read_manifest(tmp_path / "whole").finished["layers_with_float32_gradients"] == 2
    save = Checkpoint.save

    class PowerCut(BaseException):
        pass

    def dies(self: Checkpoint, epoch: int, *rest: object) -> None:
        save(self, epoch, *rest)
        raise PowerCut

    monkeypatch.setattr(Checkpoint, "save", dies)
    with pytest.raises(PowerCut):
        run(tmp_path / "broken")
    monkeypatch.setattr(Checkpoint, "save", save)
    asked_again = decide(monkeypatch, lambda _: False)
    assert run(tmp_path / "broken", resume=True) == whole
    assert asked_again == []
    assert run(tmp_path / "other") != whole, "otherwise this test could not fail"
