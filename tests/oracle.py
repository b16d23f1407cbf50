"""What the papers say (DESIGN.md, section 1), restated as naively as possible.

Nothing here is fast and nothing comes from certipatch: the tests compare the library with this page, so an error
must be made twice, independently, to go unnoticed. The words:

* a *rectangle* is (top, left, height, width); a *mask* is a list of rectangles;
* *keep* is a (height, width) array of bool, True where a pixel stays visible;
* a *table* is a list of rows, ``table[i][j]`` the label of the image under masks i and j.
"""

import numpy as np

# --- Masks -----------------------------------------------------------------------------------------------------------


def axis_starts(n, p, k):
    """Stride, mask side and mask starts on one axis: n pixels, patch side p, at most k masks."""
    stride = 1
    while stride * k < n - p + 1:  # the smallest s with s*k >= n-p+1 is ceil((n-p+1)/k)
        stride += 1
    side = p + stride - 1
    if side > n:
        side = n
    starts = []
    start = 0
    while start <= n - side:
        starts.append(start)
        start += stride
    if starts[-1] != n - side:
        starts.append(n - side)
    return stride, side, starts


def covering_set(image_size, patch_size, k):
    """The masks of the R-covering set, row by row, and the number of its rows and columns."""
    _, height, tops = axis_starts(image_size[0], patch_size[0], k)
    _, width, lefts = axis_starts(image_size[1], patch_size[1], k)
    return [[(top, left, height, width)] for top in tops for left in lefts], (len(tops), len(lefts))


def keep_of(image_size, mask):
    """Which pixels a mask leaves visible. Rectangles may reach beyond the image."""
    keep = np.ones(image_size, dtype=bool)
    for y in range(image_size[0]):
        for x in range(image_size[1]):
            for top, left, height, width in mask:
                if top <= y < top + height and left <= x < left + width:
                    keep[y, x] = False
    return keep


def uncovered(image_size, patch_size, keeps):
    """Brute force: every position (top, left) of the patch that no single mask hides completely."""
    holes = []
    for top in range(image_size[0] - patch_size[0] + 1):
        for left in range(image_size[1] - patch_size[1] + 1):
            if all(keep[top : top + patch_size[0], left : left + patch_size[1]].any() for keep in keeps):
                holes.append((top, left))
    return holes


def coarse_blocks(rows, columns):
    """For each coarse mask the fine masks in its 2x2 block; an odd row or column shares its last block with a neighbour."""

    def pairs(n):
        if n == 1:
            return [[0]]
        found = [[i, i + 1] for i in range(0, n - 1, 2)]
        return found if n % 2 == 0 else [*found, [n - 2, n - 1]]

    return [[r * columns + c for r in block_r for c in block_c] for block_r in pairs(rows) for block_c in pairs(columns)]


# --- PatchCleanser ---------------------------------------------------------------------------------------------------


def double_masking(table):
    """Algorithm 1: the defended label and the case that decided."""
    n = len(table)
    first = [table[i][i] for i in range(n)]
    majority = min(first, key=lambda label: (-first.count(label), label))  # ties: the smallest label
    if first.count(majority) == n:
        return majority, "agreed"
    for i in range(n):
        if first[i] != majority and all(table[i][j] == first[i] for j in range(n)):
            return first[i], "disagreer"
    return majority, "majority"


def certified(table, label):
    """Algorithm 2: F(x.m_i.m_j) = label for all i <= j."""
    return all(table[i][j] == label for i in range(len(table)) for j in range(i, len(table)))


# --- Greedy Cutout: masks chosen for one image, given loss(keep) -----------------------------------------------------


def worst(candidates):
    """The index of the highest loss; ties: the lowest index."""
    best = 0
    for i in range(1, len(candidates)):
        if candidates[i] > candidates[best]:
            best = i
    return best


def greedy(loss, keeps):
    """Round 1: the worst m1. Round 2: the worst m2 != m1 on x.m1. The masked copy is x.m1.m2."""
    m1 = worst([loss(keep) for keep in keeps])
    others = [i for i in range(len(keeps)) if i != m1]
    m2 = others[worst([loss(keeps[m1] & keeps[i]) for i in others])]
    return keeps[m1] & keeps[m2]


def multisize(loss, fine, blocks):
    """Multi-size Greedy Cutout: the two masked copies x.M1.m3 and x.M11.m6."""
    coarse = [np.logical_and.reduce([fine[i] for i in block]) for block in blocks]
    M1 = worst([loss(keep) for keep in coarse])
    M11 = blocks[M1][worst([loss(fine[i]) for i in blocks[M1]])]  # on the clean image
    m3 = worst([loss(fine[M11] & keep) for keep in coarse])  # on x.M11
    m6 = blocks[m3][worst([loss(fine[M11] & fine[i]) for i in blocks[m3]])]
    return [coarse[M1] & coarse[m3], fine[M11] & fine[m6]]


def grid(loss, keeps):
    """The worst of all pairs i <= j."""
    pairs = [(i, j) for i in range(len(keeps)) for j in range(i, len(keeps))]
    i, j = pairs[worst([loss(keeps[i] & keeps[j]) for i, j in pairs])]
    return keeps[i] & keeps[j]
