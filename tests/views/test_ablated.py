"""Views of one window: what is hidden, pixel by pixel, and tokens that are dropped, against a forward pass by
hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from certipatch.defenses.evidence.shown import ShownWindows
from certipatch.errors import ConfigError, SoundnessError
from certipatch.geometry.sights import hidden_by, sights_of
from certipatch.models.small import Normalize
from certipatch.views.ablated import Ablated, Tokens, has_tokens
from certipatch.views.masked import visible, window_tensor

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (64, 64)
TINY = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}


def vit(**options) -> nn.Sequential:
    torch.manual_seed(0)
    network = timm.models.vision_transformer.VisionTransformer(**{**TINY, **options})
    return nn.Sequential(Normalize((0.5,) * 3, (0.25,) * 3), network).eval()


def shown_by_hand(windows: str, size: tuple[int, int]) -> np.ndarray:
    """(windows, H, W) bool by remainders: a pixel is shown if it is less than a side behind the start."""
    kind, _, rest = windows.partition(":")
    side, stride = (int(part) for part in rest.split("/"))
    (height, width), (y, x) = size, np.indices(size)
    starts = product(range(0, height, stride) if kind == "blocks" else [None], range(0, width, stride))
    return np.array(
        [
            ((x - left) % width < side) & (np.full(size, True) if top is None else (y - top) % height < side)
            for top, left in starts
        ]
    )


@pytest.mark.parametrize("size", [(5, 5), (4, 7), (6, 6)])
def test_what_is_hidden_is_all_that_is_not_shown(size):
    """Of every band and block with every stride that leaves no gap; borders that it crosses among them."""
    tried = 0
    for kind, side in product(("columns", "blocks"), range(1, min(size) + 1)):
        for stride in range(1, side + 1):
            hiding = Ablated.but(sights_of(f"{kind}:{side}/{stride}", size), size)
            found = visible(window_tensor(hiding, torch.device("cpu")), size).numpy()
            assert np.array_equal(found, shown_by_hand(f"{kind}:{side}/{stride}", size))
            tried += len(hiding)
    assert tried > 100


def test_as_few_rectangles_as_the_shape_needs():
    sights = sights_of("columns:4/1", (32, 32))
    assert {len(hidden_by(sight, (32, 32))) for sight in sights} == {1, 2}
    of_blocks = [len(hidden_by(sight, (32, 32))) for sight in sights_of("blocks:8/4", (32, 32))]
    assert (min(of_blocks), max(of_blocks)) == (2, 5)  # in a corner; across one border


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        ("columns:40", "expected 1 to 32 pixels"),
        ("columns:0", "expected 1 to 32 pixels"),
        ("columns:4/5", "leave pixels that no window shows"),
        ("blocks:8/0", "expected a stride of 1 to 8"),
        ("rows:4", "expected columns:4"),
        ("columns:4/", "expected columns:4"),
        ("columns:-4", "expected columns:4"),
        ("columns:4/2/1", "expected columns:4"),
    ],
)
def test_windows_that_cannot_be_are_refused(windows, words):
    with pytest.raises(ConfigError, match=words):
        sights_of(windows, (32, 32))


def by_hand(model: nn.Sequential, view: Tensor, kept: list[int]) -> Tensor:
    """The logits of a view with only some tokens: timm's own steps, one after the other."""
    network = model[1]
    tokens = network._pos_embed(network.patch_embed(model[0](view[None])))
    own = network.num_prefix_tokens
    tokens = torch.cat([tokens[:, :own], tokens[:, [own + number for number in kept]]], dim=1)
    return network.forward_head(network.norm(network.blocks(network.norm_pre(tokens))))[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 2},
        {"no_embed_class": True, "pre_norm": True},
    ],
)
@pytest.mark.parametrize("windows", ["columns:19/5", "blocks:20/10"])
def test_dropped_tokens_are_those_that_show_nothing(options, windows):
    model, fill = vit(**options), 0.5
    images = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    source = ShownWindows(model, SIZE, windows, tokens="dropped", batch_size=3)
    with torch.inference_mode():
        found, vanilla = source.look(images)
        assert torch.equal(vanilla, model(images).argmax(1))
        for w, shown in enumerate(torch.from_numpy(shown_by_hand(windows, SIZE))):
            kept = [
                row * 4 + column
                for row, column in product(range(4), range(4))
                if shown[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].any()
            ]
            assert len(kept) < 16
            for n, image in enumerate(images):
                expected = by_hand(model, torch.where(shown, image, fill), kept)
                assert torch.allclose(found[n, w], expected, atol=1e-5)
    filled = ShownWindows(model, SIZE, windows).look(images)[0]
    assert not torch.allclose(found, filled, atol=1e-3)
    assert len(source._groups) > 1


def with_hidden_pixels_changed(images: Tensor, shown: Tensor) -> Tensor:
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(2))
    return torch.where(shown, images, noise)


class TestHiddenPixels:
    """What a window does not show changes none of its bits."""

    images = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(3))
    windows = "columns:19/5"

    def test_they_change_nothing(self):
        source = ShownWindows(vit(), SIZE, self.windows, tokens="dropped")
        before = source.look(self.images)[0]
        for w, shown in enumerate(torch.from_numpy(shown_by_hand(self.windows, SIZE))):
            after = source.look(with_hidden_pixels_changed(self.images, shown))[0]
            assert torch.equal(before[0, w], after[0, w])
            assert not torch.equal(before, after), "other windows show them"

    def test_their_twin_that_only_drops_tokens_differs(self):
        """Tokens that are shown in part hold hidden pixels: these must be filled."""
        model = vit()
        tokens, sights = Tokens.of(model, SIZE), sights_of(self.windows, SIZE)
        differing = 0
        for sight, shown in zip(sights, torch.from_numpy(shown_by_hand(self.windows, SIZE)), strict=True):
            with torch.inference_mode(), tokens.keep(tokens.kept(sight), torch.device("cpu")):
                one, other = model(self.images), model(with_hidden_pixels_changed(self.images, shown))
            differing += not torch.equal(one, other)
        assert differing > len(sights) / 2


def test_the_model_is_left_as_it_was():
    model = vit()
    images = torch.rand(1, 3, *SIZE)
    before, hooks = model(images), [len(each._forward_hooks) for each in model.modules()]
    ShownWindows(model, SIZE, "columns:19/5", tokens="dropped").look(images)
    assert torch.equal(model(images), before)
    assert [len(each._forward_hooks) for each in model.modules()] == hooks


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),  # looks at tokens in windows
        ("eva02_tiny_patch14_224", "Eva"),  # turns them by their place
        ("resnet10t", "a network without tokens"),
    ],
)
def test_networks_whose_tokens_cannot_be_dropped_are_refused(arch, kind):
    model = timm.create_model(arch, num_classes=3).eval()
    assert any(map(has_tokens, model.modules())) == (arch != "resnet10t")
    with pytest.raises(SoundnessError, match=f"found {kind}") as refused:
        ShownWindows(model, (224, 224), "columns:19/5", tokens="dropped")
    assert "\n" not in str(refused.value)
    assert "--tokens filled" in str(refused.value)


def test_gradients_reach_the_shown_pixels_only():
    """What an attack follows is the function that is certified."""
    for tokens in ("dropped", "filled"):
        source = ShownWindows(vit(), SIZE, "columns:19/5", tokens=tokens)
        images = torch.rand(2, 3, *SIZE, requires_grad=True)
        which, windows = torch.tensor([0, 1, 1]), torch.tensor([3, 0, 7])
        logits = source.trace(images, which, windows)
        expected = source.look(images.detach())[0][which, windows]
        assert torch.allclose(logits, expected, atol=1e-5)
        (gradient,) = torch.autograd.grad(logits[0].sum() + 2 * logits[0, 1], images)
        shown = torch.from_numpy(shown_by_hand("columns:19/5", SIZE)[3])
        assert gradient[0][:, ~shown].abs().max() == 0
        assert gradient[0][:, shown].abs().max() > 0
        assert gradient[1].abs().max() == 0
