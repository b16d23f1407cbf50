"""The masking strategies: the papers' masks, at the papers' cost, without a trace on the model."""

from itertools import combinations_with_replacement, product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import oracle
from certipatch.masks import MaskSet
from certipatch.search import STRATEGIES

SIZE, PATCH, K = (18, 18), (3, 3), 6  # 36 fine masks, 9 coarse
MASKS = MaskSet.covering(image_size=SIZE, patch_size=PATCH, masks_per_axis=K)
FILL = 0.5

PASSES = {  # the papers' table: extra forward passes for each image
    "vanilla": 0,
    "random-cutout": 0,
    "random-coarse": 0,
    "random-fine": 0,
    "random-both": 0,
    "greedy-coarse": 17,
    "greedy-fine": 71,
    "greedy-multisize": 26,
    "grid-coarse": 45,
    "grid-fine": 666,
}
COPIES = {"random-both": 2, "greedy-multisize": 2}  # 1 for all others
SEARCHES = [name for name, passes in PASSES.items() if passes]

# The same masks from the oracle.
_windows, _grid = oracle.covering_set(SIZE, PATCH, K)
FINE = [oracle.keep_of(SIZE, mask) for mask in _windows]
BLOCKS = oracle.coarse_blocks(*_grid)
COARSE = [np.logical_and.reduce([FINE[i] for i in block]) for block in BLOCKS]


pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed):
    """A tiny random classifier in double precision: the losses do not depend on how views are batched."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 8 * 8, 4)]
    return nn.Sequential(*layers).double().eval()


class Constant(nn.Module):
    """Every view ties."""

    def forward(self, images):
        return torch.ones(len(images), 4)


def batch(seed, n=4):
    """Random images; the last is of the fill colour, so that all of its views are the same and tie."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, 3, *SIZE, generator=generator, dtype=torch.float64)
    images[-1] = FILL
    return images, torch.randint(4, (n,), generator=generator)


def masked_copies(name, model, images, labels, seed=0, masks=MASKS):
    return STRATEGIES[name](model, images, labels, masks, fill=FILL, generator=torch.Generator().manual_seed(seed))


def loss_of(model, image, label):
    """The loss of one image as a function of the pixels kept, one forward pass each."""

    @torch.no_grad()
    def loss(keep):
        view = torch.where(torch.from_numpy(keep), image, FILL)
        return float(F.cross_entropy(model(view[None]).float(), label[None]))

    return loss


def expected(name, loss):
    """What the oracle would choose for one image."""
    if name == "greedy-multisize":
        return oracle.multisize(loss, FINE, BLOCKS)
    search = {"greedy": oracle.greedy, "grid": oracle.grid}[name.split("-")[0]]
    return [search(loss, COARSE if name.endswith("coarse") else FINE)]


# --- Cost and shape --------------------------------------------------------------------------------------------------


def test_the_sets_are_of_the_papers_size():
    assert (len(FINE), len(COARSE)) == (36, 9)
    assert set(PASSES) <= set(STRATEGIES)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", PASSES)
def test_pass_counts_and_results(name, n):
    """Passes counted on the model; each copy is (images, height, width) of bool, with something hidden and something kept."""
    model = network(0)
    seen = []
    model.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    copies = masked_copies(name, model, *batch(0, n))
    assert sum(seen) == n * PASSES[name]
    assert len(copies) == COPIES.get(name, 1)
    for keep in copies:
        assert (keep.dtype, keep.shape) == (torch.bool, (n, *SIZE))
        assert keep.any()
        assert keep.all() == (name == "vanilla")


# --- The masks chosen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SEARCHES)
def test_search_equals_oracle(name, seed):
    """Image by image the masks of a search with one forward pass a view."""
    model, (images, labels) = network(seed), batch(seed)
    copies = masked_copies(name, model, images, labels)
    for a, (image, label) in enumerate(zip(images, labels, strict=True)):
        for copy, keep in zip(copies, expected(name, loss_of(model, image, label)), strict=True):
            assert np.array_equal(copy[a].numpy(), keep), f"image {a}"


@pytest.mark.parametrize("name", SEARCHES)
def test_ties_go_to_the_lowest_index(name):
    """Where all losses are equal: masks 0 and 1 for greedy (m2 is another mask), 0 and 0 for the rest."""
    copies = masked_copies(name, Constant(), *batch(0))
    first = {
        "greedy-coarse": [COARSE[0] & COARSE[1]],
        "greedy-fine": [FINE[0] & FINE[1]],
        "greedy-multisize": [COARSE[0], FINE[0]],
        "grid-coarse": [COARSE[0]],
        "grid-fine": [FINE[0]],
    }[name]
    for copy, keep in zip(copies, first, strict=True):
        assert all(np.array_equal(image, keep) for image in copy.numpy())


@pytest.mark.parametrize("which", ["coarse", "fine"])
def test_grid_finds_no_less_than_greedy(which):
    """The grid tries every pair, greedy's among them; for some image it finds a worse one."""
    better = 0
    for seed in range(4):
        model, (images, labels) = network(seed), batch(seed)
        greedy, grid = (masked_copies(f"{search}-{which}", model, images, labels)[0].numpy() for search in ("greedy", "grid"))
        for a, (image, label) in enumerate(zip(images, labels, strict=True)):
            loss = loss_of(model, image, label)
            assert loss(grid[a]) >= loss(greedy[a])
            better += loss(grid[a]) > loss(greedy[a])
    assert better


def test_multisize_step_by_step():
    """The definition once more, written out for one image: M11 is searched on the clean image, m3 and m6 on x.M11."""
    different = 0
    for seed in range(6):
        model, (images, labels) = network(seed), batch(seed, 2)
        loss = loss_of(model, images[0], labels[0])
        M1 = max(range(9), key=lambda i: loss(COARSE[i]))
        M11 = max(BLOCKS[M1], key=lambda i: loss(FINE[i]))
        m3 = max(range(9), key=lambda i: loss(FINE[M11] & COARSE[i]))
        m6 = max(BLOCKS[m3], key=lambda i: loss(FINE[M11] & FINE[i]))
        large, small = (copy[0].numpy() for copy in masked_copies("greedy-multisize", model, images, labels))
        assert np.array_equal(large, COARSE[M1] & COARSE[m3])
        assert np.array_equal(small, FINE[M11] & FINE[m6])
        assert not (large & ~small).any(), "the large masks contain the small ones"
        different += BLOCKS[M1].index(M11) > 0
    assert different, "M11 is not always the first of its block, as it would be on x.M1"


def test_small_sets():
    """With one mask there is no other to add, with few the blocks are smaller."""
    for image, patch, k in [((6, 6), (6, 6), 1), ((6, 8), (6, 2), 3), ((5, 5), (1, 1), 5)]:
        masks = MaskSet.covering(image_size=image, patch_size=patch, masks_per_axis=k)
        windows, grid = oracle.covering_set(image, patch, k)
        fine, blocks = [oracle.keep_of(image, mask) for mask in windows], oracle.coarse_blocks(*grid)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * image[0] * image[1], 4)).double().eval()
        images, labels = torch.rand(3, 3, *image, dtype=torch.float64), torch.tensor([0, 1, 2])
        copies = masked_copies("greedy-multisize", model, images, labels, masks=masks)
        greedy = masked_copies("greedy-fine", model, images, labels, masks=masks)[0]
        for a in range(3):
            loss = loss_of(model, images[a], labels[a])
            for copy, keep in zip(copies, oracle.multisize(loss, fine, blocks), strict=True):
                assert np.array_equal(copy[a].numpy(), keep)
            assert np.array_equal(greedy[a].numpy(), oracle.greedy(loss, fine) if len(fine) > 1 else fine[0])


# --- No trace --------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws from the global random state in every mode, and notes whether it was called in training or for a gradient."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward(self, images):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return images + 0.01 * torch.rand(())


def mixed_model(noise=True):
    """In training mode, but for a frozen BatchNorm and a Dropout in evaluation mode, as in fine-tuning."""
    torch.manual_seed(0)
    front = [Noisy()] if noise else []
    layers = [nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.Dropout(0.1)]
    model = nn.Sequential(*front, *layers, nn.Flatten(), nn.Linear(4 * 8 * 8, 4)).train()
    for module in list(model)[-4:-2]:
        module.eval()
    return model


@pytest.mark.parametrize("name", PASSES)
def test_search_leaves_no_trace(name):
    """Weights, buffers, gradients, random state and each module's own mode are as they were found."""
    model = mixed_model()
    model[1].weight.grad = torch.ones_like(model[1].weight)
    model[1].bias.requires_grad_(False)
    images, labels = (tensor.float() if tensor.is_floating_point() else tensor for tensor in batch(0))

    def state():
        return (
            {key: value.clone() for key, value in model.state_dict().items()},
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            torch.get_rng_state(),
        )

    torch.manual_seed(1234)
    before, pixels = state(), images.clone()
    copies = masked_copies(name, model, images, labels)
    after = state()

    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert sorted({*before[1]}) == [False, True], "the model is in a mixture of modes"
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])
    assert torch.equal(model[1].weight.grad, torch.ones_like(model[1].weight))
    assert all(parameter.grad is None for parameter in list(model.parameters())[1:])
    assert torch.equal(images, pixels)
    assert not any(copy.requires_grad for copy in copies)
    assert {*model[0].modes} <= {(False, False)}, "a search runs in evaluation mode, without gradient"
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", SEARCHES)
def test_search_in_any_mode_finds_the_same(name):
    """BatchNorm and Dropout in training mode would make the loss of one image depend on others and on chance."""
    images, labels = batch(0, 3)
    training, evaluation = mixed_model(noise=False).double(), mixed_model(noise=False).double().eval()
    found = masked_copies(name, training, images, labels)
    for copy, other in zip(found, masked_copies(name, evaluation, images, labels), strict=True):
        assert torch.equal(copy, other)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_failed_search_leaves_no_trace(name):
    """A model that raises in the middle is put back into its mode as well."""

    class Failing(nn.Module):
        def forward(self, images):
            torch.rand(())
            raise KeyError

    model = nn.Sequential(Failing(), nn.Dropout()).train()
    model[1].eval()
    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        masked_copies(name, model, *batch(0))
    assert [module.training for module in model.modules()] == [True, True, False]
    assert torch.equal(torch.get_rng_state(), before)


# --- Random masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PASSES if name.startswith("random")])
def test_random_masks_come_from_the_generator(name):
    """The same generator, the same masks; another, others. The global random state plays no part."""
    images, labels = batch(0)
    first, again, other = (masked_copies(name, Constant(), images, labels, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0][0], first[0][1]), "each image has masks of its own"


@pytest.mark.parametrize(("name", "sets"), [("random-coarse", [COARSE]), ("random-fine", [FINE]), ("random-both", [COARSE, FINE])])
def test_random_masks_are_pairs_of_the_set(name, sets):
    """Every copy hides two masks of the set; over many images all pairs of the coarse set occur, and many of the fine."""
    images = torch.zeros(3000, 1, *SIZE)
    copies = masked_copies(name, Constant(), images, torch.zeros(3000))
    for copy, keeps in zip(copies, sets, strict=True):
        pairs = {(a & b).tobytes() for a, b in combinations_with_replacement(keeps, 2)}
        drawn = {keep.tobytes() for keep in copy.numpy()}
        assert drawn <= pairs
        assert len(drawn) == len(pairs) if keeps is COARSE else len(drawn) > 0.9 * len(pairs)


@pytest.mark.parametrize(("size", "square"), [((12, 12), (7, 7)), ((8, 14), (5, 8))])
def test_cutout_squares(size, square):
    """Two squares of 128/224 of the side, centres uniform over the pixels, cut off where they leave the image."""
    n = 4000
    keep = masked_copies("random-cutout", Constant(), torch.zeros(n, 3, *size), torch.zeros(n))[0].numpy()

    squares = [
        oracle.keep_of(size, [(y - square[0] // 2, x - square[1] // 2, *square)]) for y, x in product(range(size[0]), range(size[1]))
    ]
    pairs = {(a & b).tobytes() for a, b in combinations_with_replacement(squares, 2)}
    assert {view.tobytes() for view in keep} <= pairs

    # A pixel stays visible if both squares miss it, which they do independently and equally often.
    chance = np.mean(squares, axis=0) ** 2
    assert np.abs(keep.mean(axis=0) - chance).max() < 0.05
    assert keep.mean() == pytest.approx(chance.mean(), abs=0.01)

    hidden = (~keep).sum(axis=(1, 2))
    assert hidden.min() < square[0] * square[1], "squares may leave the image"
    assert hidden.max() > square[0] * square[1], "there are two"


def test_cutout_of_the_paper():
    """128x128 of 224x224: a square that stays inside hides exactly so many pixels of a row."""
    keep = masked_copies("random-cutout", Constant(), torch.zeros(40, 3, 224, 224), torch.zeros(40))[0]
    rows = (~keep).sum(dim=2)
    assert (rows == 128).any()
