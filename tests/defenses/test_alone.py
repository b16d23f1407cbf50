"""Models whose answer to a view depends on more than the view are refused; all others are not."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from certipatch.defenses.masked import MaskedClassifier
from certipatch.defenses.minority_reports.detector import MinorityReports
from certipatch.defenses.patchcleanser.defense import PatchCleanser
from certipatch.errors import SoundnessError
from certipatch.geometry.masks import MaskSet
from networks import SIZE, mask_set

pytestmark = pytest.mark.usefixtures("one_thread")


class Colour(nn.Module):
    """The mean of each colour, times twenty."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(20 * torch.eye(3))

    def means(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.means(x) @ self.weight


class Twisted(Colour):
    """A classifier whose mean colours are twisted by a function."""

    def __init__(self, twist) -> None:
        super().__init__()
        self.twist = twist

    def forward(self, x: Tensor) -> Tensor:
        return self.twist(self.means(x)) @ self.weight


class HiddenLayers(Colour):
    """Layers in a plain list, which ``.eval()`` does not reach."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = [layer]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.layers[0](x))


class Remembering(Colour):
    """The answer to a view is mixed with the one before."""

    last = 0.0

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x) + self.last
        self.last = float(logits[0, 0]) / 2
        return logits


TWO = torch.tensor([1.0, 3.0])


def normalised(means: Tensor) -> Tensor:
    """Each colour normalised over the batch, which has two values of it at least."""
    return F.batch_norm(means[..., None] * TWO, None, None, training=True)[..., 0]


MIXING = {
    "batch mean": Twisted(lambda v: v - v.mean(0)),
    "a little of it": Twisted(lambda v: v - 0.01 * v.mean(0)),
    "functional batch norm": Twisted(
        lambda v: F.batch_norm(v[..., None] * TWO, None, None, training=True)[..., 0]
    ),
    "largest of the batch": Twisted(lambda v: v / v.max()),
    "softmax over the batch": Twisted(lambda v: v.softmax(0)),
    "neighbour": Twisted(lambda v: v + 0.1 * v.roll(1, 0)),
    "place in the batch": Twisted(lambda v: v + 0.1 * torch.arange(len(v))[:, None]),
    "size of the batch": Twisted(lambda v: v * (1 + (len(v) > 4))),
    "large batches alone": Twisted(lambda v: v * (1 + (len(v) > 300))),
    "rounded by the batch": Twisted(lambda v: (v / v.abs().max() * 8).round() * v.abs().max()),
    "sorted batch": Twisted(lambda v: v.sort(0).values),
    "batch norm in a list": HiddenLayers(nn.BatchNorm2d(3)),
    "dropout in a list": HiddenLayers(nn.Dropout(0.5)),
    "memory": Remembering(),
}
CHANCE = {
    "functional dropout": Twisted(lambda v: F.dropout(v, 0.5)),
    "noise": Twisted(lambda v: v + torch.randn_like(v)),
    "noise too small to see": Twisted(lambda v: v + 1e-9 * torch.randn_like(v)),
    "noise of numpy": Twisted(lambda v: v + float(np.random.default_rng().random() + np.random.rand())),
    "noise of python": Twisted(lambda v: v + random.random()),
}
HONEST = {
    "plain": Colour(),
    "in place": Twisted(lambda v: v.sub_(0.5).div_(0.25)),
    "batch norm": nn.Sequential(nn.BatchNorm2d(3), Colour()),
    "group norm": nn.Sequential(nn.GroupNorm(3, 3), Colour()),
    "dropout": nn.Sequential(nn.Dropout(0.5), Colour()),
    "large logits": Twisted(lambda v: 1e4 * v),
    "hidden layer in evaluation mode": HiddenLayers(nn.BatchNorm2d(3).eval()),
    "script": torch.jit.script(Colour()),
}


def build(kind: type[MaskedClassifier], model: nn.Module, **options) -> MaskedClassifier:
    if kind is MinorityReports:
        options["threshold"] = 0.5
    return kind(model.eval(), mask_set(3), **options)


@pytest.mark.parametrize("kind", [PatchCleanser, MinorityReports])
@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_views_is_refused(kind: type[MaskedClassifier], name: str):
    with pytest.raises(SoundnessError, match="expected answers that depend on one view alone"):
        build(kind, MIXING[name])


@pytest.mark.parametrize("name", CHANCE)
def test_a_model_that_draws_random_numbers_is_refused(name: str):
    with pytest.raises(SoundnessError, match="draws random numbers"):
        build(PatchCleanser, CHANCE[name])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_model_is_not_refused(name: str, batch_size: int):
    defense = build(PatchCleanser, HONEST[name], batch_size=batch_size)
    assert 0 <= defense.moved < 1
    images = torch.rand(2, 3, *SIZE)
    assert len(defense.certify(images, torch.tensor([0, 1]))) == 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet"]
)
def test_networks_of_timm_are_not_refused(name: str, precision: str):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=4).eval()
    masks = MaskSet.covering(image_size=(160, 160), patch_size=(30, 30), masks_per_axis=3)
    assert PatchCleanser(network, masks, precision=precision, batch_size=4).moved < 0.0625


def test_the_rounding_of_a_compiler_is_not_taken_for_mixing():
    """In bf16 compiled code rounds otherwise than the model does, by more than batches move either."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=100).eval()
    with torch.no_grad():
        network.get_classifier().weight.mul_(300)
    masks = MaskSet.covering(image_size=(96, 96), patch_size=(20, 20), masks_per_axis=3)
    defense = PatchCleanser(network, masks, precision="bf16-mixed", batch_size=4, compile=True)
    assert defense.network.compiled
    assert defense.moved > 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_what_rounding_hides_in_low_precision_is_seen_in_float32(precision: str):
    with pytest.raises(SoundnessError, match="one view alone"):
        build(PatchCleanser, MIXING["a little of it"], precision=precision)
    assert build(PatchCleanser, HONEST["plain"], precision=precision).moved < 0.5


@pytest.mark.parametrize("options", [{"compile": True}, {"shared_prefix": True}, {"batch_size": 1}])
def test_the_fast_ways_refuse_too(options: dict[str, object]):
    with pytest.raises(SoundnessError, match="one view alone"):
        build(PatchCleanser, MIXING["batch mean"], **options)


def test_dynamic_quantisation_is_refused_by_name():
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE[0] * SIZE[1], 4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that torchao does it now
        quantised = torch.ao.quantization.quantize_dynamic(layers, {nn.Linear})
    with pytest.raises(SoundnessError, match=r"found 1 \(Linear\) quantised dynamically"):
        build(PatchCleanser, quantised)


def test_a_model_that_cannot_answer_one_view_says_so_in_one_line():
    with pytest.raises(SoundnessError, match=r"\(1, 3, 12, 12\).*ValueError: too dark"):
        build(PatchCleanser, Twisted(too_dark))


def too_dark(_means: Tensor) -> Tensor:
    raise ValueError("too dark\nby far")


def test_a_model_in_training_mode_is_looked_at_when_it_is_used():
    model = MIXING["batch mean"].train()
    defense = PatchCleanser(model, mask_set(3))
    model.eval()
    with pytest.raises(SoundnessError, match="one view alone"):
        defense.predict(torch.rand(1, 3, *SIZE))


def test_a_model_is_looked_at_once_until_it_changes():
    model, seen = Colour().eval(), []
    model.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    build(PatchCleanser, model)
    first = len(seen)
    build(MinorityReports, model)
    again = len(seen) - first
    assert 0 < again < first, "only the network as it runs is looked at again"
    model.register_forward_hook(lambda _module, _inputs, logits: logits - logits.mean(0))
    with pytest.raises(SoundnessError, match="one view alone"):
        build(PatchCleanser, model)


class Cast(nn.Module):
    """A network that computes in fewer bits by itself, and may give float32 back."""

    def __init__(self, dtype: torch.dtype, back: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 4))
        self.dtype, self.back = dtype, back

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype is not torch.float32):
            logits = self.network(x)
        return logits.float() if self.back else logits


@pytest.mark.parametrize("back", [True, False])
@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.bfloat16, 2**-4), (torch.float16, 2**-7), (torch.float32, 1e-3)]
)
def test_a_model_that_computes_in_fewer_bits_by_itself_is_counted_as_such(dtype, least, back):
    """Whatever the precision is called: rounding moves its margins as far as in that of fewer bits."""
    defense = build(PatchCleanser, Cast(dtype, back))
    assert defense.describe()["precision"] == "32-true"
    assert defense.least_margin == least
    assert (defense.describe_network()["moved"] == least) == (dtype is not torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_autocast_around_the_call_changes_nothing(dtype: torch.dtype):
    """The precision is the defense's own: in float32 nothing is cast, though the caller casts."""
    defense, images = build(PatchCleanser, Cast(torch.float32, back=False)), torch.rand(2, 3, *SIZE)
    labels = torch.tensor([0, 1])
    expected = [verdict.margin for verdict in defense.certify(images, labels)]
    with torch.autocast("cpu", dtype=dtype):
        assert [verdict.margin for verdict in defense.certify(images, labels)] == expected
        assert build(PatchCleanser, Cast(torch.float32, back=False)).least_margin == 1e-3


@pytest.mark.parametrize("kind", [PatchCleanser, MinorityReports])
def test_a_model_that_begins_to_mix_views_while_it_is_in_use_is_refused(kind: type[MaskedClassifier]):
    """By a hook, or a setting; what was found of it before counts no more."""
    images, labels = torch.rand(2, 3, *SIZE), torch.tensor([0, 1])
    model = Colour()
    defense = build(kind, model)
    defense.certify(images, labels)
    model.register_forward_hook(lambda _module, _inputs, logits: None)
    defense.certify(images, labels)  # a hook that only looks
    handle = model.register_forward_hook(lambda _module, _inputs, logits: logits - logits.mean(0))
    with pytest.raises(SoundnessError, match="expected answers that depend on one view alone"):
        defense.certify(images, labels)
    with pytest.raises(SoundnessError, match="expected answers that depend on one view alone"):
        defense.predict(images)
    handle.remove()
    defense.certify(images, labels)
    model.forward = lambda x: (model.means(x) - model.means(x).mean(0)) @ model.weight
    with pytest.raises(SoundnessError, match="expected answers that depend on one view alone"):
        defense.certify(images, labels)
