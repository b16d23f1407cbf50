"""Windows of limited sight and what a patch reaches of them, against sets of pixels."""

from itertools import product

import numpy as np
import pytest

from certipatch.errors import ConfigError
from certipatch.geometry.patch import Threat, Window
from certipatch.geometry.reach import touched
from certipatch.geometry.sights import blocks, cells, columns


def pixels(rectangles):
    """The pixels of some rectangles, one by one."""
    return {
        (y, x)
        for r in rectangles
        for y in range(r.top, r.top + r.height)
        for x in range(r.left, r.left + r.width)
    }


def largest(sets):
    return {one for one in sets if not any(one < other for other in sets)}


def by_pixels(sights, image, shapes, patches=1):
    """The sets of windows that show a pixel of a patch, without those within another."""
    seen = [pixels(sight) for sight in sights]
    single = set()
    for h, w in shapes:
        for top, left in product(range(image[0] - h + 1), range(image[1] - w + 1)):
            patch = pixels([Window(top, left, h, w)])
            single.add(frozenset(i for i, one in enumerate(seen) if one & patch))
    return largest(single if patches == 1 else {a | b for a in single for b in single})


def circular(kind, image, side, stride):
    """The pixels of bands or blocks by counting modulo the image."""
    tops = range(0, image[0], stride) if kind is blocks else [0]
    height = side if kind is blocks else image[0]
    return [
        {((top + y) % image[0], (left + x) % image[1]) for y in range(height) for x in range(side)}
        for top in tops
        for left in range(0, image[1], stride)
    ]


def any_case(rng):
    """A kind of windows, an image, a side and a stride, which often does not divide the image."""
    kind = (columns, blocks, cells)[rng.integers(3)]
    image = tuple(int(n) for n in rng.integers(1, 9, size=2))
    side = int(rng.integers(1, (image[1] if kind is columns else min(image)) + 1))
    return kind, image, side, int(rng.integers(1, side + 1))


def test_what_a_patch_reaches_is_what_sets_of_pixels_say():
    rng, strange = np.random.default_rng(0), 0
    for _ in range(1000):
        kind, image, side, stride = any_case(rng)
        sights = kind(image, side, stride)
        shapes = [tuple(int(rng.integers(1, n + 1)) for n in image) for _ in range(rng.integers(1, 3))]
        patches = int(rng.integers(1, 3)) if len(sights) < 20 else 1
        threat = Threat(shapes[0], tuple(shapes[1:]), patches)
        found = touched(sights, image, threat)
        sets = [frozenset(np.flatnonzero(row).tolist()) for row in found.touch]
        assert len(set(sets)) == len(sets)
        assert largest(set(sets)) == by_pixels(sights, image, shapes, patches)
        if patches == 1:
            assert largest(set(sets)) == set(sets)
        for reached, patch in zip(sets, found.places, strict=True):
            assert reached == {i for i, sight in enumerate(sights) if pixels(sight) & pixels(patch)}
            assert all((one.height, one.width) in shapes for one in patch)
            assert len(patch) == patches
        strange += image[1] % stride > 0
    assert strange > 150  # strides that do not divide


def test_bands_and_blocks_go_on_at_the_opposite_border():
    rng, wraps = np.random.default_rng(1), 0
    for _ in range(300):
        kind, image, side, stride = any_case(rng)
        if kind is not cells:
            sights = kind(image, side, stride)
            assert [pixels(sight) for sight in sights] == circular(kind, image, side, stride)
            wraps += any(len(sight) > 1 for sight in sights)
    assert wraps > 50


def test_cells_lie_within_the_image():
    assert cells((5, 7), 3, 2) == tuple(
        (Window(top, left, 3, 3),) for top, left in product((0, 2), (0, 2, 4))
    )
    assert len(cells((224, 224), 17, 8)) == 26**2


@pytest.mark.parametrize(
    ("n", "band", "stride", "patch", "formula"),
    [(5, 2, 2, 1, 1), (224, 19, 10, 32, 5), (224, 19, 5, 32, 10), (224, 37, 10, 39, 8)],
)
def test_a_published_formula_counts_one_window_too_few(n, band, stride, patch, formula):
    """ceil((m+b-1)/s), where the stride does not divide the image."""
    assert -(-(patch + band - 1) // stride) == formula
    reach = touched(columns((1, n), band, stride), (1, n), Threat((1, patch)))
    assert reach.touch.sum(axis=1).max() == formula + 1


def test_the_sets_of_usual_sizes():
    bands = touched(columns((224, 224), 19), (224, 224), Threat((32, 32)))
    assert bands.touch.shape == (193, 224)
    assert set(bands.touch.sum(axis=1)) == {50}
    bagnet = touched(cells((224, 224), 17, 8), (224, 224), Threat((32, 32)))
    assert bagnet.touch.shape == (441, 676)
    assert set(bagnet.touch.sum(axis=1)) == {36}


@pytest.mark.parametrize("kind", [columns, blocks, cells])
@pytest.mark.parametrize(("side", "stride"), [(0, 1), (9, 1), (-1, 1), (3, 0), (3, 4), (3, -1)])
def test_windows_that_are_none_are_refused(kind, side, stride):
    with pytest.raises(ConfigError, match=rf"windows {kind.__name__}:{side}.*expected .*; choose"):
        kind((8, 8), side, stride)


def test_a_patch_larger_than_the_image_is_refused():
    with pytest.raises(ConfigError, match=r"patch '9x1': .* do not fit"):
        touched(columns((8, 8), 3), (8, 8), Threat((9, 1)))


@pytest.mark.parametrize("patches", [0, 3, 7])
def test_a_number_of_patches_that_is_not_reckoned_with_is_refused(patches: int):
    """Its twin: three patches would be certified as if they were one."""
    with pytest.raises(ConfigError, match=f"patches {patches}: expected 1 or 2 at once"):
        Threat((1, 1), patches=patches)
    threat = Threat((1, 1))
    object.__setattr__(threat, "patches", 3)
    bands = columns((1, 8), 1)
    assert touched(bands, (1, 8), threat).touch.sum(axis=1).max() == 1
