"""Peak memory depends on the batch, not on the number of masks or images. Sizes are counted, not timed."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from certipatch import MaskSet
from certipatch.bench.case import Settings, build_defense
from certipatch.bench.processes import in_a_process
from certipatch.bench.published import published_loop

SIZE = (32, 32)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation makes; a view counts with all that it keeps
    alive."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def network() -> nn.Sequential:
    """No convolution, so that the views are the largest tensors."""
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()


def largest(k: int, images: int, batch_size: int) -> int:
    masks = MaskSet.covering(image_size=SIZE, patch_size=(5, 5), masks_per_axis=k)
    settings = Settings(batch_size=batch_size, exhaustive=True, compile=False, shared_prefix=False)
    defense = build_defense(network(), masks, settings)
    pixels = torch.rand(images, 3, *SIZE)
    with Largest() as seen:
        verdicts = defense.certify(pixels, torch.zeros(images, dtype=torch.int64))
    assert {verdict.passes for verdict in verdicts} == {1 + len(masks) * (len(masks) + 1) // 2}
    return seen.bytes


@pytest.mark.usefixtures("one_thread")
def test_no_tensor_grows_with_the_number_of_masks_or_images():
    views = 16 * 3 * 32 * 32 * 4
    few = largest(k=3, images=1, batch_size=16)
    assert few == views
    assert largest(k=8, images=1, batch_size=16) == few
    assert largest(k=3, images=12, batch_size=16) == few
    assert largest(k=3, images=12, batch_size=32) == 2 * few, "or nothing is counted here"


def test_what_is_counted_sees_full_size_masks():
    """The twin: the masks of the published loop do grow."""
    found = []
    for k in (2, 8):
        masks = MaskSet.covering(image_size=SIZE, patch_size=(5, 5), masks_per_axis=k)
        with Largest() as seen:
            published_loop(
                network(), torch.rand(1, 3, *SIZE), list(masks.keep[:, None, None].clone()), [(0, 0)]
            )
        found.append(seen.bytes)
    assert found[1] > found[0]


SCRIPT = """
import timm, torch
from certipatch import MaskSet
from certipatch.bench.case import Settings, build_defense
from certipatch.models.small import Normalize

torch.manual_seed(0)
network = timm.create_model("tf_efficientnet_lite0")
network = network.to(memory_format=torch.channels_last)
model = torch.nn.Sequential(Normalize((0.5,) * 3, (0.5,) * 3), network).eval()
masks = MaskSet.covering(image_size=(224, 224), patch_size=(39, 39), masks_per_axis=10)
assert len(masks) == 100
defense = build_defense(model, masks, Settings())
images = torch.rand(3, 3, 224, 224)
labels = defense.predict(images)
# Wrong, so that two images are decided by their one-mask views; one needs all pairs, if it is certified.
labels[1:] += 1
verdicts = defense.certify(images, labels % 1000)
assert all(verdict.passes > 100 for verdict in verdicts), verdicts
"""


@pytest.mark.slow
def test_224_pixels_with_100_masks_in_4_gib():
    _, peak = in_a_process([sys.executable, "-c", SCRIPT])
    assert 0.3 < peak < 4
