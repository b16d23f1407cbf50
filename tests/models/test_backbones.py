"""The paper's three networks in full size, from random weights.

They are built, given a new head, trained for one step and read back.
"""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from certipatch.cli.open import _smaller, build_asked
from certipatch.config import ModelAsked, ModelSpec
from certipatch.data.load import load_source
from certipatch.data.source import Images, Source
from certipatch.errors import ConfigError, ModelError
from certipatch.models.build import build
from certipatch.models.build import describe as describe_model
from certipatch.models.runs import load_run
from certipatch.records.manifest import read_manifest
from certipatch.runtime.devices import make_fabric
from certipatch.training.config import TrainConfig, default_lr
from certipatch.training.train import train
from inputs import typed, write_photos

RESNET, VIT, CONVNEXT = TAGS = (
    "resnetv2_50x1_bit.goog_distilled_in1k",
    "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "convnext_tiny.fb_in22k_ft_in1k",
)
BIT_448 = "resnetv2_50x1_bit.goog_in21k_ft_in1k"
DIGITS = tuple("0123456789")


def describe(tag: str, classes: tuple[str, ...] = DIGITS) -> ModelSpec:
    return describe_model(tag, classes=classes, num_classes=len(classes), image_size=(224, 224))


def head(tag: str) -> str:
    return "head" if tag == VIT else "head.fc"


def slow(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def random_state(tag: str) -> dict[str, torch.Tensor]:
    """Random weights of 1000 classes with the names and shapes of the real ones.

    All are views of one tensor, and no two are the same.
    """
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in timm.create_model(tag).state_dict().items()}
    noise = torch.empty(max(map(math.prod, shapes.values())) + len(shapes)).uniform_(
        -0.02, 0.02, generator=torch.Generator().manual_seed(0)
    )
    return {key: noise[i : i + math.prod(shape)].view(shape) for i, (key, shape) in enumerate(shapes.items())}


def hand_over(state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the hub be a machine that has ``state`` under every name; the names asked for are returned."""
    asked: list[str] = []

    def hub(name: str, **_: object) -> dict[str, torch.Tensor]:
        asked.append(name)
        return dict(state)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", hub)
    return asked


@pytest.mark.parametrize(
    ("tag", "way"), [(RESNET, "file"), (CONVNEXT, "file"), (VIT, "hub"), slow(VIT, "file")]
)
def test_weights_of_1000_classes_get_a_new_head(
    tag: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    state, file = random_state(tag), tmp_path / "w.safetensors"
    asked = hand_over(state, monkeypatch)
    if way == "file":
        safetensors.torch.save_file({key: value.clone() for key, value in state.items()}, file)
    have: dict[str, Any] = {"pretrained": True} if way == "hub" else {"weights": str(file)}
    with pytest.raises(ModelError, match="1000 classes"):
        build(describe(tag), **have)
    model = build(describe(tag), **have, replace_head=True)
    file.unlink(missing_ok=True)  # hundreds of megabytes

    assert asked == ([f"timm/{tag}"] if way == "hub" else [])
    with torch.inference_mode():
        assert model(torch.rand(1, 3, 224, 224)).shape == (1, 10)
    for key, value in model[1].state_dict().items():
        assert key.startswith(head(tag)) or torch.equal(value, state[key]), key
    # BiT's head is a 1x1 convolution.
    assert isinstance(model[1].get_classifier(), torch.nn.Conv2d) == (tag == RESNET)


@pytest.mark.parametrize(
    ("tag", "strategy"),
    [
        (RESNET, "vanilla"),
        (CONVNEXT, "vanilla"),
        slow(VIT, "vanilla"),
        *(slow(tag, "greedy-multisize") for tag in TAGS),
    ],
)
def test_one_step_from_pretrained_weights(
    tag: str, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As with --pretrained: one step through ``train``, and the run is read back."""
    state = random_state(tag)
    asked = hand_over(state, monkeypatch)
    source = load_source(str(write_photos(tmp_path / "photos", classes=("blue", "green"), each=1)))
    spec = describe(tag, source.classes)
    model = build(spec, pretrained=True, replace_head=True)
    assert asked == [f"timm/{tag}"]
    body, last = next(key for key in state if "weight" in key), f"{head(tag)}.weight"
    new_head = model[1].state_dict()[last].clone()
    assert len(new_head) == 2

    if strategy == "vanilla":  # spare the fast suite a checkpoint that only a killed run would need
        monkeypatch.setattr(torch, "save", lambda _, file: file.write(b"none"))
    config = TrainConfig(
        strategy=strategy, patch_size=(39, 39), masks_per_axis=6, epochs=1, batch_size=2, lr=default_lr(tag)
    )
    train(model, spec, source, source, config, tmp_path / "run", fabric=make_fabric(device="cpu"))
    assert not torch.equal(model[1].state_dict()[body], state[body])
    assert not torch.equal(model[1].state_dict()[last], new_head)

    read_spec, read, manifest = load_run(tmp_path / "run")  # which compares the hash of the weights
    shutil.rmtree(tmp_path / "run")  # hundreds of megabytes
    assert read_spec == spec
    assert manifest["experiment"]["model"]["arch"] == tag
    assert torch.equal(read[1].state_dict()[last], model[1].state_dict()[last])


def test_the_table_of_the_documentation_is_what_timm_says():
    rows = re.findall(
        r"^\| `([\w.]+)` \|(.*)\|$",
        (Path(__file__).parents[2] / "docs" / "models.md").read_text(),
        flags=re.MULTILINE,
    )
    assert {*TAGS, BIT_448} == {tag for tag, _ in rows}
    for tag, cells in rows:
        config = timm.get_pretrained_cfg(tag)
        statistics = {(0.5, 0.5, 0.5): "0.5, 0.5", (0.485, 0.456, 0.406): "ImageNet's"}[config.mean]
        size, classes = str(config.input_size[1]), str(config.num_classes)
        expected = [
            size,
            config.interpolation,
            f"{config.crop_pct:g}",
            statistics,
            f"`{config.classifier}`",
            classes,
            config.license,
        ]
        assert [cell.strip() for cell in cells.split("|")][: len(expected)] == expected, tag


def ladder(width: int, height: int) -> Image.Image:
    """A picture in which every row, column and channel differs."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("tag", "short", "interpolation"),
    [
        (RESNET, 256, "BICUBIC"),
        (VIT, 248, "BICUBIC"),
        (CONVNEXT, 256, "BICUBIC"),
        (BIT_448, 224, "BILINEAR"),
    ],
)
def test_large_images_are_cropped_as_timm_says(tag: str, short: int, interpolation: str):
    """The short side becomes 224 / crop_pct, then the centre is cut out; here by hand, with Pillow alone."""
    picture = ladder(400, 300)
    item = Images(Source(("a",), ["a"], [0], lambda _: picture), describe(tag))[0]
    width = math.floor(400 * short / 300)
    resized = picture.resize((width, short), Image.Resampling[interpolation])
    left, top = round((width - 224) / 2), round((short - 224) / 2)
    assert np.array_equal(
        item.pixels.permute(1, 2, 0), np.asarray(resized.crop((left, top, left + 224, top + 224)))
    )


@pytest.mark.parametrize("tag", [*TAGS, BIT_448])
@pytest.mark.parametrize("crop_pct", [None, 1.0])
def test_small_images_are_resized_bicubic_without_a_crop(
    tag: str, crop_pct: float | None, monkeypatch: pytest.MonkeyPatch
):
    """Whatever the tag says: BiT's own interpolation is bilinear."""
    monkeypatch.setattr("certipatch.models.build.build", lambda *_, **__: torch.nn.Sequential())
    picture = ladder(32, 32)
    source = Source(DIGITS, [str(i) for i in range(20)], [i % 10 for i in range(20)], lambda _: picture)
    asked = ModelAsked(tag, pretrained=True, image_size="224", crop_pct=crop_pct)
    opened = build_asked(asked, source, training=True)
    expected = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC))
    assert np.array_equal(Images(source, opened.spec)[3].pixels.permute(1, 2, 0), expected)


@pytest.mark.parametrize(
    ("sides", "smaller"),
    [
        ([32] * 30, True),
        ([32] + [300] * 29, False),
        ([300] * 29 + [32], False),
        ([300] + [32] * 29, False),
        ([0] + [32] * 29, True),
        ([0] * 30, False),
    ],
)
def test_one_small_or_large_image_does_not_decide(sides: list[int], smaller: bool):
    def image(i: int) -> Image.Image:
        if not sides[i]:
            raise OSError("unreadable")
        return Image.new("RGB", (sides[i], sides[i]))

    source = Source(DIGITS, [str(i) for i in range(30)], [0] * 30, image)
    assert _smaller(source, (224, 224)) is smaller


def test_certify_resizes_as_the_run_was_trained(cli, photos: Path, tmp_path: Path):
    """Small images have chosen bicubic without a crop, and large ones in certify do not choose again; nor do
    they the other way round."""
    large = write_photos(tmp_path / "large", each=1, size=80)
    for trained_on, crop_pct, interpolation, other in (
        (photos, 1.0, "bicubic", large),
        (large, 0.875, "bilinear", photos),
    ):
        run, certified = tmp_path / f"run{crop_pct}", tmp_path / f"certified{crop_pct}"
        given = typed("train", model="tf_mobilenetv3_small_minimal_100.in1k", image_size=40)
        given += typed(data=trained_on, val_data=trained_on, strategy="vanilla", patch=5)
        done = cli(*given, epochs=1, batch_size=3, limit=3, out=run)
        assert done.code == 0, done.err
        assert ("resized bicubic without a crop" in done.err) == (trained_on == photos)
        done = cli("certify", model=run, data=other, patch=5, masks_per_axis=2, limit=1, out=certified)
        assert done.code == 0, done.err
        assert "resized" not in done.err
        spec = read_manifest(certified).stated["model"]
        assert spec == read_manifest(run).stated["model"]
        assert (spec["crop_pct"], spec["interpolation"]) == (crop_pct, interpolation)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resnetv2_50x1_bit_distilled", RESNET),  # the names of the papers' timm
        ("convnext_tiny_in22ft1k", CONVNEXT),
        ("convnext_tiny.fb_in22k_ft_in1", CONVNEXT),
        ("resnt18", "resnet18"),
    ],
)
def test_a_name_of_older_timm_and_a_mistyped_tag_get_a_hint(name: str, hint: str):
    with pytest.raises(ConfigError, match=re.escape(hint)):
        describe_model(name, classes=DIGITS, num_classes=10)
