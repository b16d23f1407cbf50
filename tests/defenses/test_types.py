"""Numbers of another type than a defense computes with are refused in words, in each of its entries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import Normalize

from certipatch import MaskSet, MinorityReports, PatchCleanser
from certipatch.errors import ConfigError, SoundnessError

MASKS = MaskSet.covering(image_size=(12, 12), patch_size=(3, 3), masks_per_axis=2)
IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 1])


class Colours(nn.Module):
    """Three classes, by the mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3) * 20)

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) @ self.weight


def made(kind: str, model: nn.Module | None = None, **options: Any) -> PatchCleanser | MinorityReports:
    model = (model or Colours()).eval()
    if kind == "detector":
        return MinorityReports(model, MASKS, threshold=0.5, **options)
    return PatchCleanser(model, MASKS, **options)


KINDS = ["defense", "detector"]

ENTRIES: dict[str, Callable[[Any, Any], Any]] = {
    "predict": lambda defense, images: defense.predict(images),
    "examine": lambda defense, images: defense.examine(images),
    "certify": lambda defense, images: defense.certify(images, LABELS),
}


@pytest.mark.parametrize(
    ("convert", "found"),
    [
        (lambda x: x.double(), "torch.float64"),
        (lambda x: x.half(), "torch.float16"),
        (lambda x: x.bfloat16(), "torch.bfloat16"),
        (lambda x: (x * 255).byte(), "torch.uint8"),
        (lambda x: x.to(torch.complex64), "torch.complex64"),
        (lambda x: x.numpy(), "ndarray"),
        (lambda x: x.tolist(), "list"),
        (lambda x: None, "NoneType"),
        (lambda x: x.to("meta"), "meta device"),
        (lambda x: x.to_sparse(), "torch.sparse_coo"),
    ],
)
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_images(kind: str, entry: str, convert: Callable[[Tensor], Any], found: str):
    with pytest.raises(SoundnessError, match=f"images: expected .*found .*{found}"):
        ENTRIES[entry](made(kind), convert(IMAGES))


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (LABELS + 1, "the label 3"),
        (LABELS - 1, "the label -1"),
        (torch.tensor([0, 0, 0, 2**62]), "the label 4611686018427387904"),
        (LABELS.float(), "torch.float32"),
        (LABELS.int(), "torch.int32"),
        (LABELS > 0, "torch.bool"),
        (nn.functional.one_hot(LABELS), r"\(4, 3\)"),
        (LABELS[:, None], r"\(4, 1\)"),
        (LABELS[:3], r"\(3,\)"),
        (LABELS.tolist(), "list"),
        (np.array([0, 1, 2, 1]), "ndarray"),
        ("cat", "str"),
        (LABELS.to("meta"), "meta device"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_labels(kind: str, labels: Any, found: str):
    defense = made(kind)
    for entry in (defense.certify, defense.examine):  # also once the number of classes is known
        with pytest.raises(SoundnessError, match=f"labels: expected .*found .*{found}"):
            entry(IMAGES, labels)


@pytest.mark.parametrize("type", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"compile": True}, {"precision": "bf16-mixed"}, {"shared_prefix": True}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_models(kind: str, type: torch.dtype, options: dict[str, Any]):
    if kind == "detector" and "shared_prefix" in options:
        pytest.skip("a detector has no shared prefix")
    with pytest.raises(SoundnessError, match=f"expected .*{type}|expected .*found {type}"):
        made(kind, Colours().to(type), **options).predict(IMAGES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_double_model_takes_double_images(kind: str):
    expected = [verdict.certified for verdict in made(kind).certify(IMAGES, LABELS)]
    found = made(kind, Colours().double()).certify(IMAGES.double(), LABELS)
    assert [verdict.certified for verdict in found] == expected


class Demanding(Colours):
    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[2] % 16 == 0, "a side must be divisible by 16"
        return super().forward(images)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Demanding(), r"\(\d+, 3, 12, 12\).*divisible by 16"),
        (nn.Sequential(nn.Conv2d(1, 3, 3), Colours()), "channels"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 3)), "shape"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"compile": True}, {"precision": "bf16-mixed"}])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_has_against_images_is_one_line(
    kind: str, options: dict[str, Any], model: nn.Module, words: str
):
    with pytest.raises(SoundnessError, match=words) as refusal:
        made(kind, model, **options).predict(IMAGES)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("mean", "words"),
    [
        ((123.7, 116.3, 103.5), r"Normalize .*0, 1.* mean 123\.7, 116\.3, 103\.5.*divide .*255"),
        ((-0.1, 0.5, 0.5), "Normalize"),
        ((0.1, 0.2, 0.3, 0.4), "Normalize .* 3 channels, found one for 4"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_normalize_layer_for_other_images_is_blamed(kind: str, mean: tuple[float, ...], words: str):
    model = nn.Sequential(Normalize(mean, (58.0,) * len(mean)), Colours())
    with pytest.raises(ConfigError, match=words):
        made(kind, model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fill": "grey"}, "fill: .*'grey'"),
        ({"fill": (1, None, 2)}, "fill"),
        ({"fill": float("nan")}, "fill"),
        ({"batch_size": "many"}, "batch size 'many'"),
        ({"batch_size": 2.5}, r"batch size 2\.5"),
        ({"precision": None}, "precision None"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_options(kind: str, options: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        made(kind, **options)


@pytest.mark.parametrize("threshold", ["high", None, [0.5]])
def test_thresholds(threshold: Any):
    with pytest.raises(ConfigError, match="threshold"):
        MinorityReports(Colours().eval(), MASKS, threshold=threshold)


@pytest.mark.parametrize(("model", "masks"), [(lambda images: images, MASKS), (Colours().eval(), [1, 2])])
def test_what_is_no_model_or_no_masks(model: Any, masks: Any):
    for make in (PatchCleanser, lambda *each: MinorityReports(*each, threshold=0.5)):
        with pytest.raises(ConfigError, match="expected a M"):
            make(model, masks)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("convert", "found"),
    [
        (lambda logits: logits.to(torch.complex64), "complex64"),
        (lambda logits: logits.to_sparse(), "sparse"),
    ],
)
def test_logits_that_are_no_real_numbers_in_a_dense_tensor_are_refused(
    kind: str, convert: Callable[[Tensor], Tensor], found: str
):
    class Converted(Colours):
        def forward(self, images: Tensor) -> Tensor:
            return convert(super().forward(images))

    with pytest.raises(SoundnessError, match=f"model output: expected real numbers in a dense .*{found}"):
        made(kind, Converted())
