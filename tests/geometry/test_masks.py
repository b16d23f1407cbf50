"""Mask sets: every patch lies within a mask, and the geometry is the papers'."""

import ast
import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from certipatch.errors import ConfigError
from certipatch.geometry.coverage import hidden_places
from certipatch.geometry.masks import MaskSet, axis_starts
from certipatch.geometry.patch import Threat, Window, parse_patch, parse_patches

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
    assert set(imported(oracle.__file__)) == {"itertools", "numpy", "torch"}


# Golden values: DESIGN.md, section 1


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
        return [
            MaskSet.covering(image_size=(224, 224), patch_size=(patch, patch), masks_per_axis=k)
            for k in (6, 3)
        ]

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


# Errors a user can act on


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


# Every set: equal to the oracle's, and covering


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
    """Each coarse mask is exactly the union of its children; every fine mask has a parent; so the coarse set
    covers too."""
    coarse, children = fine.coarsen()
    assert [list(block) for block in children] == oracle.coarse_blocks(*fine.grid)
    for mask, block in zip(keeps(coarse), children, strict=True):
        assert np.array_equal(mask, np.logical_and.reduce([keeps(fine)[i] for i in block]))
    assert {i for block in children for i in block} == set(range(len(fine)))
    assert oracle.uncovered(fine.image_size, fine.patch_size, keeps(coarse)) == []
    assert coarse.grid == tuple(-(-n // 2) for n in fine.grid)
    assert (coarse.image_size, coarse.patch_size) == (fine.image_size, fine.patch_size)


# uncovered_patch: a counterexample or a proof


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
def free_sets(draw, side=6):
    """Masks of one to three rectangles anywhere, which may reach beyond the bottom and the right, or be
    empty."""
    image = draw(st.tuples(st.integers(1, side), st.integers(1, side)))
    window = st.builds(
        Window, st.integers(0, image[0]), st.integers(0, image[1]), st.integers(0, 8), st.integers(0, 8)
    )
    windows = draw(st.lists(st.lists(window, min_size=1, max_size=3).map(tuple), min_size=1, max_size=5))
    return MaskSet(image, tuple(draw(st.integers(1, n)) for n in image), 0, tuple(windows))


@settings(quick, max_examples=300)
@given(free_sets())
def test_masks_of_several_windows(masks):
    check_uncovered(masks, masks.patch_size)
    assert np.array_equal(masks.keep.numpy(), keeps(masks))


@quick
@given(free_sets())
def test_hidden_places_are_those_where_no_pixel_of_the_patch_shows(masks):
    h, w = masks.patch_size
    found = list(hidden_places(masks.windows, masks.image_size, masks.patch_size))
    assert len(found) == len(masks)
    for where, keep in zip(found, keeps(masks), strict=True):
        assert where.shape == (masks.image_size[0] - h + 1, masks.image_size[1] - w + 1)
        for top, left in np.ndindex(where.shape):
            assert where[top, left] == (not keep[top : top + h, left : left + w].any())


def test_two_windows_cover_together():
    """A patch astride two windows of *one* mask is covered; of two masks it is not: neither hides all of
    it."""
    upper, lower = Window(0, 0, 2, 4), Window(2, 0, 2, 4)
    together = MaskSet((4, 4), (2, 2), 0, ((upper, lower),))
    assert together.uncovered_patch((2, 2)) is None
    apart = dataclasses.replace(together, windows=((upper,), (lower,)))
    assert apart.uncovered_patch((2, 2)) == Window(1, 0, 2, 2)


def test_windows_beyond_the_top_and_the_left():
    """A window at row -3 hides nothing of the image; numpy would read it as one at the far end.

    Here rows 1 and 2 of 4 are visible under every mask, so the set must be refused, or reported as not
    covering.
    """
    with contextlib.suppress(ConfigError, ValueError):
        masks = MaskSet(
            (4, 4), (1, 1), 0, ((Window(0, 0, 1, 4),), (Window(3, 0, 1, 4),), (Window(-3, 0, 2, 4),))
        )
        assert check_uncovered(masks, (1, 1)) == Window(1, 0, 1, 1)
        assert np.array_equal(masks.keep.numpy(), keeps(masks))


# Several shapes, two patches


def test_what_a_manifest_says_of_one_patch_is_what_it_always_said():
    """Earlier runs are continued and compared by these very entries; what is against more has more of
    them."""
    sizes = {"image_size": (8, 8), "masks_per_axis": 2}
    plain = MaskSet.covering(**sizes, patch_size=(3, 2)).to_json()
    assert list(plain) == ["patch_size", "image_size", "masks_per_axis", "windows"]
    assert (
        MaskSet.covering(**sizes, patch_size=(3, 2), other_patch_sizes=[(3, 2)], patches=1).to_json() == plain
    )
    more = MaskSet.covering(**sizes, patch_size=(2, 3), other_patch_sizes=[(3, 2)], patches=2)
    assert set(more.to_json()) - set(plain) == {"other_patch_sizes", "patches"}
    stated = json.loads(json.dumps(more.to_json()))
    assert Threat.of(stated) == more.threat
    assert MaskSet.covering(**sizes, **Threat.of(stated)) == more
    assert Threat.of(json.loads(json.dumps(plain))).keywords == {"patch_size": (3, 2)}
    assert (more.patch_size, more.patch_sizes) == ((3, 2), ((3, 2), (2, 3))), (
        "the order in which they are named does not matter"
    )


def test_golden_counts():
    """Of 9 masks every two are 36, of 36 they are 630; PatchCleanser's code has 81 and 1296: both orders, and
    each with itself."""

    def count(*shapes, k, patches=1):
        return len(
            MaskSet.covering(
                image_size=(224, 224),
                patch_size=shapes[0],
                other_patch_sizes=shapes[1:],
                masks_per_axis=k,
                patches=patches,
            )
        )

    assert [count((20, 20), k=k, patches=2) for k in (3, 6)] == [36, 630]
    assert [count((39, 20), (20, 39), k=k) for k in (3, 6)] == [18, 72]
    assert count((39, 20), (20, 39), k=3, patches=2) == 18 * 17 // 2
    assert count((224, 224), k=1, patches=2) == 1


@pytest.mark.parametrize(
    ("text", "sizes", "shown"),
    [
        ("39x20+20x39", ((39, 20), (20, 39)), "39x20+20x39"),
        ("1%", ((23, 23),), "23x23"),
        ("1%+5x224", ((23, 23), (5, 224)), "23x23+5x224"),
    ],
)
def test_several_shapes_as_they_are_typed(text, sizes, shown):
    assert parse_patches(text, (224, 224)) == sizes
    assert Threat(sizes[0], sizes[1:]).text == Threat(sizes[0], sizes[1:], 2).shapes == shown
    assert Threat(sizes[0], sizes[1:], 2).text == f"2 x {f'({shown})' if sizes[1:] else shown}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"other_patch_sizes": [(3, 3)]}, "fits into"),
        ({"other_patch_sizes": [(7, 7)]}, "fits into"),
        ({"other_patch_sizes": [(2, 33)]}, "do not fit"),
        ({"other_patch_sizes": [(0, 7)]}, "at least 1 pixel"),
        ({"other_patch_sizes": [(1, 32)], "masks_per_axis": 33}, "masks per axis 33"),
        ({"patches": 0}, "expected 1 or 2"),
        ({"patches": 3}, "expected 1 or 2"),
    ],
)
def test_impossible_threats_are_refused_in_one_line(options, words):
    with pytest.raises(ConfigError, match=words) as error:
        MaskSet.covering(**{"image_size": (32, 32), "patch_size": (5, 5), "masks_per_axis": 3} | options)
    assert "\n" not in str(error.value)


@st.composite
def threats(draw, side=5):
    """A covering set of a tiny image against one or two patches of up to three shapes, none of which fits
    into another."""
    image = draw(st.tuples(st.integers(1, side), st.integers(1, side)))
    shapes = []
    for shape in draw(
        st.lists(st.tuples(st.integers(1, image[0]), st.integers(1, image[1])), min_size=1, max_size=3)
    ):
        if not any((a <= h and b <= w) or (a >= h and b >= w) for a, b in [shape] for h, w in shapes):
            shapes.append(shape)
    most = min(max(n - p + 1 for n, p in zip(image, shape, strict=True)) for shape in shapes)
    k, patches = draw(st.integers(1, min(3, most))), draw(st.integers(1, 2))
    return MaskSet.covering(
        image_size=image,
        patch_size=shapes[0],
        other_patch_sizes=shapes[1:],
        masks_per_axis=k,
        patches=patches,
    )


def check_uncovered_together(masks):
    """The answer agrees with brute force over everything that can be placed; a counterexample is one."""
    holes = oracle.uncovered_together(masks.image_size, masks.patch_sizes, keeps(masks), masks.patches)
    found = masks.uncovered_patches()
    assert (found is None) == (holes == [])
    assert found is None or tuple(sorted(map(dataclasses.astuple, found))) in [
        tuple(sorted(hole)) for hole in holes
    ]
    return found


@quick
@given(threats(), st.data())
def test_every_threat_is_covered_and_what_is_missing_is_noticed(masks, data):
    image, shapes = masks.image_size, masks.patch_sizes
    within = max(
        1,
        min(
            masks.masks_per_axis, *(n - p + 1 for shape in shapes for n, p in zip(image, shape, strict=True))
        ),
    )
    if within == masks.masks_per_axis:  # the oracle has one k for both axes
        assert rectangles(masks) == oracle.covering_several(image, shapes, within, masks.patches)
    assert check_uncovered_together(masks) is None
    removed = data.draw(st.sets(st.integers(0, len(masks) - 1), min_size=1, max_size=3))
    left = tuple(mask for i, mask in enumerate(masks.windows) if i not in removed)
    check_uncovered_together(dataclasses.replace(masks, windows=left))


@settings(quick, max_examples=200)
@given(free_sets(side=4), st.data())
def test_two_patches_under_masks_of_any_kind(masks, data):
    """Also where masks reach beyond the image, are empty, or cover a patch with several windows."""
    shapes = data.draw(
        st.lists(st.tuples(*(st.integers(1, n) for n in masks.image_size)), min_size=1, max_size=2)
    )
    check_uncovered_together(
        dataclasses.replace(masks, patch_size=shapes[0], other_patch_sizes=tuple(shapes[1:]), patches=2)
    )


def test_masks_for_less_do_not_cover_more():
    """A set for one patch against two, or for one shape against another, has holes; the larger threat
    includes the smaller."""
    options = {"image_size": (12, 12), "masks_per_axis": 2}
    one = MaskSet.covering(**options, patch_size=(4, 2))
    two = MaskSet.covering(**options, patch_size=(4, 2), patches=2)
    both = MaskSet.covering(**options, patch_size=(4, 2), other_patch_sizes=[(2, 4)])
    assert len(dataclasses.replace(one, patches=2).uncovered_patches()) == 2
    assert dataclasses.replace(one, other_patch_sizes=((2, 4),)).uncovered_patches() == (
        one.uncovered_patch((2, 4)),
    )
    for larger in (two, both):
        assert dataclasses.replace(larger, patches=1, other_patch_sizes=()).uncovered_patches() is None


def test_masks_command(cli):
    done = cli("masks", "--image-size", 224, "--patch", 20, "--patches", 2, "--masks-per-axis", 3)
    assert done.code == 0, done.err
    for words in ("2 x 20x20 of 224x224", "36: every two", "covered   yes", "certify at most 666 an image"):
        assert words in done.out
    found = json.loads(cli("masks", "--image-size", 224, "--patch", "20x39+39x20", "--json").out)
    assert (found["patch_size"], found["other_patch_sizes"], found["masks"]) == ([39, 20], [[20, 39]], 72)
    assert found["patch_positions"] == 2 * (224 - 39 + 1) * (224 - 20 + 1)
    refused = cli("masks", "--image-size", 224, "--patch", "39+20")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "20x20: fits into 39x39" in refused.err


INTEGERS = [np.int8, np.uint8, np.int16, np.int64, np.uint64]


@pytest.mark.parametrize("kind", INTEGERS)
def test_numbers_of_any_type_are_taken_as_int(kind):
    """numpy's numbers of 8 bits wrap: 100 + 50 would be -106, and a mask would hide nothing."""
    expected = MaskSet.covering(image_size=(120, 100), patch_size=(20, 17), masks_per_axis=3)
    found = MaskSet.covering(
        image_size=(kind(120), kind(100)), patch_size=(kind(20), kind(17)), masks_per_axis=kind(3)
    )
    assert found == expected
    assert json.dumps(found.to_json()) == json.dumps(expected.to_json())
    own = dataclasses.replace(
        expected, windows=tuple((Window(*map(kind, dataclasses.astuple(w))),) for (w,) in expected.windows)
    )
    assert own == expected
    assert {type(number) for (w,) in own.windows for number in dataclasses.astuple(w)} == {int}
    assert own.uncovered_patches() is None
    assert own.uncovered_patch((kind(20), kind(17))) is None
    assert axis_starts(kind(120), kind(20), kind(3)) == axis_starts(120, 20, 3)
    assert Threat((kind(20), kind(17)), ((kind(17), kind(20)),), kind(2)).text == "2 x (20x17+17x20)"


def test_proof_and_pixels_are_of_the_same_numbers():
    from certipatch.views.masked import visible, window_tensor

    window = Window(np.int8(100), np.int8(90), np.int8(50), np.int8(60))
    masks = MaskSet((200, 200), (20, 20), 0, ((window,),))
    hidden = ~visible(window_tensor(masks, "cpu"), (200, 200))[0].numpy()
    assert hidden.sum() == 50 * 60
    assert np.array_equal(hidden, ~masks.keep[0].numpy())
    assert masks.uncovered_patch((20, 20)) == Window(0, 0, 20, 20)


@pytest.mark.parametrize("wrong", [2.0, np.float32(2), "2", None, (2,)])
def test_numbers_that_are_not_whole_are_refused(wrong):
    for attempt in (
        lambda: Window(wrong, 0, 1, 1),
        lambda: Window(0, 0, 1, wrong),
        lambda: Threat((2, wrong)),
        lambda: Threat((2, 2), patches=wrong),
        lambda: MaskSet.covering(image_size=(8, wrong), patch_size=(2, 2), masks_per_axis=2),
        lambda: MaskSet.covering(image_size=(8, 8), patch_size=(2, 2), masks_per_axis=wrong),
        lambda: MaskSet.covering(image_size=8, patch_size=(2, 2), masks_per_axis=2),
    ):
        with pytest.raises(ConfigError, match="expected"):
            attempt()
