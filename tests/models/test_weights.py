"""Files of weights as people have them: each loads as what it is, or is refused in one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from certipatch.config import ModelSpec
from certipatch.errors import CertiPatchError, ConfigError, ModelError
from certipatch.models.build import build, classes_in
from certipatch.models.build import describe as describe_model
from certipatch.models.weights import fitting, load_state, read_weights

State = dict[str, Tensor]
SPEC = describe_model("small-cnn", classes=("a", "b", "c"), num_classes=3)


@pytest.fixture(scope="module")
def good() -> State:
    """The weights that are meant; none is what a new network has."""
    state = build(SPEC, seed=1)[1].state_dict()
    return {key: value + 1 for key, value in state.items()}


@pytest.fixture(scope="module")
def bad(good: State) -> State:
    return {key: value + 1 for key, value in good.items()}


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def loaded(path: str) -> State:
    return build(SPEC, weights=path)[1].state_dict()


def check_loads(path: str, expected: State) -> None:
    found = loaded(path)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value.contiguous() for key, value in state.items()}


WRAPPED = [
    "",
    *("".join(each) for n in (1, 2) for each in product(("module.", "_orig_mod.", "model."), repeat=n)),
]


@pytest.mark.parametrize("prefix", WRAPPED)
def test_what_was_around_the_network_is_dropped_in_every_format(prefix: str, good: State, tmp_path: Path):
    safetensors.torch.save_file(prefixed(prefix, good), tmp_path / "w.safetensors")
    check_loads(str(tmp_path / "w.safetensors"), good)
    check_loads(saved(tmp_path / "w.pth", {"state_dict": prefixed(prefix, good), "epoch": 3}), good)


class Named(nn.Module):
    """A network whose own names begin as if something were around it."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.module = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
        self.weight = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize("prefix", WRAPPED)
def test_own_names_that_look_like_prefixes_are_kept(prefix: str):
    network, other = Named(), Named()
    load_state(network, prefixed(prefix, other.state_dict()), source="f", arch="named")
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("one", ["module.", "model.", "_orig_mod."])
@pytest.mark.parametrize("other", ["", "module.model."])
def test_two_entries_of_one_name_are_refused(one: str, other: str, good: State, bad: State, tmp_path: Path):
    for first, second in ((one, other), (other, one)):
        both = prefixed(first, good) | prefixed(second, bad)
        with pytest.raises(ModelError, match="expected one entry"):
            loaded(saved(tmp_path / "w.pth", both))


@pytest.mark.parametrize(
    ("averaged", "plain"),
    [
        ("state_dict_ema", "state_dict"),
        ("model_ema", "model"),
        ("ema", "model"),
        ("ema_state_dict", "net"),
        ("swa.state_dict", "state_dict"),
    ],
)
def test_averaged_weights_are_taken_and_a_line_says_so(
    averaged: str, plain: str, good: State, bad: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for order in (0, 1):
        outer, _, inner = averaged.partition(".")
        entries = [
            (plain, bad),
            (outer, {inner: good} if inner else good),
            ("optimizer", {"state": {0: bad}}),
        ]
        check_loads(saved(tmp_path / "w.pth", dict(entries[::-1] if order else entries)), good)
        (line,) = capsys.readouterr().err.splitlines()
        assert averaged in line
        assert f"not {plain}" in line


def test_the_averaged_model_of_torch(good: State, tmp_path: Path):
    wrapped = torch.optim.swa_utils.AveragedModel(build(SPEC)[1])
    wrapped.module.load_state_dict(good)
    check_loads(saved(tmp_path / "w.pth", wrapped.state_dict()), good)


@pytest.mark.parametrize(
    "names", [("model", "state_dict"), ("student", "teacher"), ("a", "b"), ("model_ema", "state_dict_ema")]
)
def test_of_two_sets_none_is_guessed(names: tuple[str, str], good: State, bad: State, tmp_path: Path):
    with pytest.raises(ModelError, match=f"several sets: {names[0]}, {names[1]}"):
        loaded(saved(tmp_path / "w.pth", dict(zip(names, (good, bad), strict=True))))
    with pytest.raises(ModelError, match="several sets"):
        loaded(saved(tmp_path / "w.pth", {**good, names[0]: bad}))


def test_two_names_of_the_same_weights_are_no_choice(good: State, tmp_path: Path):
    check_loads(saved(tmp_path / "w.pth", {"model": good, "state_dict": dict(good)}), good)


KEPT_BESIDE: dict[str, Any] = {
    "epoch": 3,
    "best": torch.tensor(0.9),
    "rng_state": torch.get_rng_state(),
    "args": argparse.Namespace(lr=0.1),
    "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []},
    "hyper_parameters": {"class_weights": torch.ones(3)},
    "optimizer_state_dict": {},
}


@pytest.mark.parametrize("name", ["state_dict", "model", "net", "model_state_dict", "weights"])
@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoints(name: str, zipped: bool, good: State, tmp_path: Path):
    content = {name: good, **KEPT_BESIDE}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    check_loads(str(tmp_path / "w.pth"), good)


HARMLESS: dict[str, Callable[[State], dict[str, Any]]] = {
    "a number beside": lambda s: {**s, "epoch": 3},
    "counts of a profiler": lambda s: {**s, "total_ops": torch.zeros(1), "0.total_params": torch.zeros(1)},
    "parameters": lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()},
    "other strides": lambda s: {k: v.t().contiguous().t() if v.ndim == 2 else v for k, v in s.items()},
    "double": lambda s: {k: v.double() if v.is_floating_point() else v for k, v in s.items()},
    "counts as floats": lambda s: {k: v.float() for k, v in s.items()},
}


@pytest.mark.parametrize("how", HARMLESS)
def test_what_changes_nothing_loads(how: str, good: State, tmp_path: Path):
    check_loads(saved(tmp_path / "w.pth", HARMLESS[how](good)), good)


def test_without_the_counts_of_batchnorm(good: State, tmp_path: Path):
    found = loaded(saved(tmp_path / "w.pth", {k: v for k, v in good.items() if "num_batches" not in k}))
    for key, value in found.items():
        assert torch.equal(value, torch.tensor(0) if "num_batches" in key else good[key])


@pytest.mark.parametrize("type", [torch.float16, torch.bfloat16])
def test_half_the_bits_load_as_the_numbers_that_they_are(type: torch.dtype, good: State, tmp_path: Path):
    rounded = {k: v.to(type) if v.is_floating_point() else v for k, v in good.items()}
    expected = {k: v.float() if v.is_floating_point() else v for k, v in rounded.items()}
    check_loads(saved(tmp_path / "w.pth", rounded), expected)


@pytest.mark.parametrize("key", ["13.weight", "1.running_var", "10.bias"])
@pytest.mark.parametrize(
    "convert",
    [
        lambda v: v.double() + 1e-12,
        lambda v: v.to(torch.float8_e4m3fn),
        lambda v: v.to(torch.float8_e5m2),
        lambda v: v.to(torch.int8),
        lambda v: v.to(torch.complex64) + 1j,
        lambda v: v.to_sparse(),
        lambda v: v.double() * 1e300,
    ],
)
def test_numbers_that_would_change_are_refused(key: str, convert: Any, good: State, tmp_path: Path):
    with pytest.raises(ModelError, match=key):
        loaded(saved(tmp_path / "w.pth", {**good, key: convert(good[key])}))


def test_a_count_that_is_no_whole_number_is_refused(good: State, tmp_path: Path):
    changed = {**good, "1.num_batches_tracked": torch.tensor(0.5)}
    with pytest.raises(ModelError, match="num_batches_tracked"):
        loaded(saved(tmp_path / "w.pth", changed))


@pytest.mark.parametrize("key", ["13.bias", "0.weight", "4.running_mean"])
def test_what_is_missing_or_left_over_is_refused(key: str, good: State, tmp_path: Path):
    with pytest.raises(ModelError, match=f"missing {key}"):
        loaded(saved(tmp_path / "w.pth", {k: v for k, v in good.items() if k != key}))
    with pytest.raises(ModelError, match=r"unexpected extra\.weight"):
        loaded(saved(tmp_path / "w.pth", {**good, "extra.weight": torch.zeros(1)}))


def test_a_buffer_that_the_network_computes_may_lie_in_the_file():
    """Older versions of a network kept in its file what it now computes; it must be the same."""
    network = nn.BatchNorm1d(2)
    network.register_buffer("index", torch.arange(3), persistent=False)
    state = network.state_dict()
    load_state(network, {**state, "index": torch.arange(3)}, source="f", arch="a")
    with pytest.raises(ModelError, match="unexpected index"):
        load_state(network, {**state, "index": torch.arange(3).flip(0)}, source="f", arch="a")


def test_where_no_name_fits_those_found_are_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"found bone\.weight, joint\.bias"):
        loaded(saved(tmp_path / "w.pth", {"bone.weight": torch.ones(2), "joint.bias": torch.ones(2)}))


def other_files(tmp_path: Path) -> dict[str, str]:
    """By the word that must be said of it, a file that is no file of weights."""
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "script.pt"))
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    np.savez(tmp_path / "jax.npz", w=np.zeros(3))
    texts = {
        "page.pth": "<!DOCTYPE html><html>Quota exceeded</html>",
        "page.safetensors": "\n<html>404</html>",
        "lfs.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "lfs.pth": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "empty.pth": "",
        "empty.safetensors": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    words = {"page": "a web page", "lfs": "Git LFS", "empty": "an empty", "script": "TorchScript"}
    words |= {"module": "with code in it", "jax": "NumPy"}
    names = ["script.pt", "module.pth", "jax.npz", *texts]
    return {str(tmp_path / name): words[name.partition(".")[0]] for name in names}


def test_what_is_no_file_of_weights_is_called_what_it_is(tmp_path: Path):
    for path, word in other_files(tmp_path).items():
        with pytest.raises(ModelError, match=word) as refusal:
            read_weights(path)
        assert "\n" not in str(refusal.value)


def meta(tag: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(tag, **options)


def one_of_each_architecture() -> dict[str, str]:
    """A pretrained tag of each architecture of timm."""
    return {tag.partition(".")[0]: tag for tag in reversed(timm.list_pretrained())}


OF_ALL_KINDS = (  # two heads, a head in a head, none, own names with prefixes, a count that is no float
    "resnet18.a1_in1k",
    "deit_tiny_distilled_patch16_224.fb_in1k",
    "volo_d1_224.sail_in1k",
    "convnext_atto.d2_in1k",
    "convnextv2_atto.fcmae",
    "vit_small_patch14_dinov2.lvd142m",
    "vit_base_patch16_clip_224.openai",
    "swin_tiny_patch4_window7_224.ms_in1k",
    "levit_128s.fb_dist_in1k",
    "test_vit.r160_in1k",
)


def check_loads_again(tag: str, prefix: str) -> None:
    """Weights saved from a tag fit our network of the tag, with as many classes as they are said to have."""
    config = timm.get_pretrained_cfg(tag)
    state = prefixed(prefix, meta(tag).state_dict())
    spec = describe_model(tag, classes=(), num_classes=config.num_classes or 2)
    assert classes_in(state, spec) == config.num_classes
    found = fitting(meta(tag), state, source="file", arch=tag)
    assert found.keys() == meta(tag).state_dict().keys()


@pytest.mark.parametrize("tag", OF_ALL_KINDS)
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_weights_saved_from_a_tag_load_again(tag: str, prefix: str):
    check_loads_again(tag, prefix)


@pytest.mark.slow
def test_weights_saved_from_any_architecture_load_again():
    failed = {}
    for tag in one_of_each_architecture().values():
        try:
            check_loads_again(tag, "")
        except (CertiPatchError, AssertionError) as error:
            failed[tag] = str(error)
    assert not failed


def described(tag: str, classes: int = 10) -> ModelSpec:
    return describe_model(tag, classes=tuple(map(str, range(classes))), num_classes=classes)


@pytest.mark.parametrize("left_out", ["fc.weight", "layer1.0.conv1.weight"])
def test_pretrained_weights_that_leave_a_part_random_are_refused(
    left_out: str, monkeypatch: pytest.MonkeyPatch
):
    """timm does not demand all of some networks' weights."""
    whole = timm.create_model("resnet18").state_dict()
    state = {key: value for key, value in whole.items() if key != left_out}
    strict = nn.Module.load_state_dict
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
    monkeypatch.setattr(
        nn.Module, "load_state_dict", lambda self, given, **_: strict(self, given, strict=False)
    )
    spec = described("resnet18.a1_in1k", 1000)
    with pytest.raises(ModelError, match=f"nothing for {left_out}"):
        build(spec, pretrained=True)
    state = whole
    build(spec, pretrained=True)


def test_the_small_network_has_no_pretrained_weights():
    with pytest.raises(ConfigError, match="no pretrained weights"):
        build(SPEC, pretrained=True)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit", (100, 100)),
        ("inception_v3", (32, 48)),
    ],
)
def test_a_size_that_the_network_does_not_take_is_one_line(name: str, size: tuple[int, int]):
    spec = describe_model(name, classes=("a", "b"), num_classes=2, image_size=size)
    with pytest.raises(ConfigError, match=f"{size[0]}x{size[1]} pixels .*--image-size") as refusal:
        build(spec)
    assert "\n" not in str(refusal.value)


def test_weights_of_another_image_size_are_not_said_to_be_of_other_classes(tmp_path: Path):
    state = timm.create_model("test_vit", num_classes=3).state_dict()
    spec = describe_model("test_vit", classes=("a", "b", "c"), num_classes=3, image_size=(64, 64))
    with pytest.raises(ModelError, match=r"pos_embed of shape .*another image size"):
        build(spec, weights=saved(tmp_path / "w.pth", state))
