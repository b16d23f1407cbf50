"""Mask sets: every patch lies within a mask, and the geometry is the papers'."""

import ast
import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from certipatch.errors import ConfigError
from certipatch.masks import MaskSet, Window, axis_starts, parse_patch

quick = settings(deadline=None)  # the first example may import torch


def rectangles(masks):
    """A MaskSet in the oracle's words."""
    return [[dataclasses.astuple(window) for window in mask] for mask in masks.windows]


def keeps(masks):
    return [oracle.keep_of(masks.image_size, mask) for mask in rectangles(masks)]


def imported(path):
    """The top-level names of all packages that a file imports."""
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else node.module.split(".")[0]
        elif isinstance(node, ast.Name) and node.id in ("__import__", "importlib", "exec", "eval"):
            yield node.id


def test_the_oracle_is_independent():
    """An oracle that called the library would agree with any error in it."""
    assert set(imported(oracle.__file__)) == {"numpy", "torch"}


# --- Golden values: DESIGN.md, section 1 -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "p", "k", "side", "starts"),
    [
        (224, 39, 3, 100, [0, 62, 124]),
        (224, 39, 6, 69, [0, 31, 62, 93, 124, 155]),
        (224, 32, 6, 64, [0, 33, 66, 99, 132, 160]),
        (5, 5, 1, 5, [0]),  # a patch as large as the image
        (5, 1, 5, 1, [0, 1, 2, 3, 4]),  # a mask for each pixel
    ],
)
def test_golden_starts(n, p, k, side, starts):
    assert axis_starts(n, p, k) == (side, starts)
    assert oracle.axis_starts(n, p, k)[1:] == (side, starts)


def test_golden_coarse_set():
    """At 39 of 224 pixels the 2x2 union of the k=6 set is exactly the k=3 set; at 32 pixels it is not."""

    def sets(patch):
        return [MaskSet.covering(image_size=(224, 224), patch_size=(patch, patch), masks_per_axis=k) for k in (6, 3)]

    fine, three = sets(39)
    coarse, children = fine.coarsen()
    assert (len(fine), len(coarse)) == (36, 9)
    assert coarse.windows == three.windows
    assert children[0] == (0, 1, 6, 7)
    assert children[8] == (28, 29, 34, 35)

    fine, three = sets(32)
    assert fine.coarsen()[0].windows != three.windows


@pytest.mark.parametrize(
    ("text", "side", "patch"),
    [
        ("1%", 224, (23, 23)),
        ("2%", 224, (32, 32)),
        ("3%", 224, (39, 39)),
        ("2.4%", 32, (5, 5)),
        ("25%", 32, (16, 16)),  # exactly a square: no pixel more
        ("100%", 32, (32, 32)),
        ("39", 224, (39, 39)),
        ("39x20", 224, (39, 20)),
        (" 3 % ", 224, (39, 39)),
    ],
)
def test_golden_patch_sizes(text, side, patch):
    """A share of the image is rounded up to whole pixels."""
    assert parse_patch(text, (side, side)) == patch


@quick
@given(st.integers(1, 1000), st.integers(1, 60), st.integers(1, 60))
def test_percent_is_rounded_up(permille, height, width):
    """The smallest square whose area is at least the share: one pixel less a side would be too little."""
    try:
        side, other = parse_patch(f"{permille / 10}%", (height, width))
    except ConfigError:  # the square does not fit a long image
        assert 1000 * min(height, width) ** 2 < permille * height * width
        return
    assert side == other
    assert 1000 * side**2 >= permille * height * width > 1000 * (side - 1) ** 2


# --- Errors a user can act on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "300%",
        "0",
        "-1",
        "0%",
        "-3%",
        "abc",
        "3x3x3",
        "",
        "%",
        "3x",
        "x3",
        "2.5",
        "nan%",
        "inf%",
        "1/0%",
        "1e9000%",
        "33",
        "8x33",
        "33x8",
        "0x5",
    ],
)
def test_impossible_patches_are_refused_in_one_line(text):
    with pytest.raises(ConfigError) as error:
        parse_patch(text, (32, 32))
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("image", "patch", "k"),
    [
        ((32, 32), (5, 5), 0),
        ((32, 32), (5, 5), -1),
        ((32, 32), (5, 5), 29),  # 28 positions on an axis
        ((32, 32), (33, 5), 3),
        ((32, 32), (5, 33), 3),
        ((32, 32), (0, 5), 3),
        ((32, 32), (5, -5), 3),
        ((0, 32), (1, 1), 1),
        ((32, 0), (1, 1), 1),
    ],
)
def test_impossible_sets_are_refused_in_one_line(image, patch, k):
    with pytest.raises(ConfigError) as error:
        MaskSet.covering(image_size=image, patch_size=patch, masks_per_axis=k)
    assert "\n" not in str(error.value)


def test_only_a_grid_is_coarsened():
    with pytest.raises(ConfigError, match="grid"):
        MaskSet((4, 4), (1, 1), 0, ((Window(0, 0, 4, 4),),)).coarsen()


# --- Every set: equal to the oracle's, and covering ------------------------------------------------------------------


@quick
@given(st.data())
def test_axis_equals_oracle(data):
    """Also at the sizes of real images, where brute force on two axes would take too long."""
    n = data.draw(st.integers(1, 300))
    p = data.draw(st.integers(1, n))
    k = data.draw(st.integers(1, n - p + 1))
    side, starts = axis_starts(n, p, k)
    assert (side, starts) == oracle.axis_starts(n, p, k)[1:]
    assert len(starts) <= k, "k is an upper bound"
    assert all(any(start <= at and at + p <= start + side for start in starts) for at in range(n - p + 1))
    assert starts[0] == 0
    assert starts[-1] + side == n


@st.composite
def covering_sets(draw, side=9):
    """A covering set of a small rectangular image and patch."""
    image = draw(st.tuples(st.integers(1, side), st.integers(1, side)))
    patch = tuple(draw(st.integers(1, n)) for n in image)
    k = draw(st.integers(1, max(n - p + 1 for n, p in zip(image, patch, strict=True))))
    return MaskSet.covering(image_size=image, patch_size=patch, masks_per_axis=k)


@quick
@given(covering_sets())
def test_set_equals_oracle_and_covers(masks):
    windows, grid = oracle.covering_set(masks.image_size, masks.patch_size, masks.masks_per_axis)
    assert rectangles(masks) == windows
    assert (len(masks), masks.grid) == (len(windows), grid)
    assert oracle.uncovered(masks.image_size, masks.patch_size, keeps(masks)) == []
    assert masks.uncovered_patch(masks.patch_size) is None
    assert np.array_equal(masks.keep.numpy(), keeps(masks))


@quick
@given(covering_sets())
def test_coarse_set(fine):
    """Each coarse mask is exactly the union of its children; every fine mask has a parent; so the coarse set covers too."""
    coarse, children = fine.coarsen()
    assert [list(block) for block in children] == oracle.coarse_blocks(*fine.grid)
    for mask, block in zip(keeps(coarse), children, strict=True):
        assert np.array_equal(mask, np.logical_and.reduce([keeps(fine)[i] for i in block]))
    assert {i for block in children for i in block} == set(range(len(fine)))
    assert oracle.uncovered(fine.image_size, fine.patch_size, keeps(coarse)) == []
    assert coarse.grid == tuple(-(-n // 2) for n in fine.grid)
    assert (coarse.image_size, coarse.patch_size) == (fine.image_size, fine.patch_size)


# --- uncovered_patch: a counterexample or a proof --------------------------------------------------------------------


def check_uncovered(masks, patch):
    """The answer agrees with brute force; a counterexample is one that truly no mask covers."""
    holes = oracle.uncovered(masks.image_size, patch, keeps(masks))
    found = masks.uncovered_patch(patch)
    if found is None:
        assert holes == []
    else:
        assert (found.top, found.left) in holes
        assert (found.height, found.width) == patch
    return found


@quick
@given(covering_sets(), st.data())
def test_removed_masks_are_noticed(masks, data):
    removed = data.draw(st.sets(st.integers(0, len(masks) - 1), min_size=1))
    left = tuple(mask for i, mask in enumerate(masks.windows) if i not in removed)
    check_uncovered(dataclasses.replace(masks, windows=left, grid=None), masks.patch_size)


def test_every_mask_of_a_tight_set_is_needed():
    """A 12x12 image, patch 3x3, k=5: strides of 2, ten positions on an axis, so no mask can be spared."""
    masks = MaskSet.covering(image_size=(12, 12), patch_size=(3, 3), masks_per_axis=5)
    assert len(masks) == 25
    for i in range(25):
        left = dataclasses.replace(masks, windows=masks.windows[:i] + masks.windows[i + 1 :], grid=None)
        assert check_uncovered(left, (3, 3)) is not None


@quick
@given(covering_sets(), st.data())
def test_a_larger_patch_is_noticed(masks, data):
    """A set made for one patch, asked about another."""
    check_uncovered(masks, tuple(data.draw(st.integers(1, n)) for n in masks.image_size))


@st.composite
def free_sets(draw):
    """Masks of one to three rectangles anywhere, which may reach beyond the bottom and the right, or be empty."""
    image = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    window = st.builds(Window, st.integers(0, image[0]), st.integers(0, image[1]), st.integers(0, 8), st.integers(0, 8))
    windows = draw(st.lists(st.lists(window, min_size=1, max_size=3).map(tuple), min_size=1, max_size=5))
    return MaskSet(image, tuple(draw(st.integers(1, n)) for n in image), 0, tuple(windows))


@settings(quick, max_examples=300)
@given(free_sets())
def test_masks_of_several_windows(masks):
    check_uncovered(masks, masks.patch_size)
    assert np.array_equal(masks.keep.numpy(), keeps(masks))


def test_two_windows_cover_together():
    """A patch astride two windows of *one* mask is covered; of two masks it is not: neither hides all of it."""
    upper, lower = Window(0, 0, 2, 4), Window(2, 0, 2, 4)
    together = MaskSet((4, 4), (2, 2), 0, ((upper, lower),))
    assert together.uncovered_patch((2, 2)) is None
    apart = dataclasses.replace(together, windows=((upper,), (lower,)))
    assert apart.uncovered_patch((2, 2)) == Window(1, 0, 2, 2)


def test_windows_beyond_the_top_and_the_left():
    """A window at row -3 hides nothing of the image; numpy would read it as one at the far end.

    Here rows 1 and 2 of 4 are visible under every mask, so the set must be refused, or reported as not covering.
    """
    with contextlib.suppress(ConfigError, ValueError):
        masks = MaskSet((4, 4), (1, 1), 0, ((Window(0, 0, 1, 4),), (Window(3, 0, 1, 4),), (Window(-3, 0, 2, 4),)))
        assert check_uncovered(masks, (1, 1)) == Window(1, 0, 1, 1)
        assert np.array_equal(masks.keep.numpy(), keeps(masks))
