"""What the papers say (DESIGN.md, section 1), restated as naively as possible.

Nothing here is fast and nothing comes from certipatch: the tests compare the library with this page, so an
error must be made twice, independently, to go unnoticed. The words:

* a *rectangle* is (top, left, height, width); a *mask* is a list of rectangles;
* *keep* is a (height, width) array of bool, True where a pixel stays visible;
* a *table* is a list of rows, ``table[i][j]`` the label of the image under masks i and j.
"""

import itertools

import numpy as np
import torch


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


def covering_several(image_size, patch_sizes, k, patches):
    """The masks against one patch of any of some shapes (what two shapes share once), or every two of those
    against two patches."""
    masks = []
    for patch_size in patch_sizes:
        for mask in covering_set(image_size, patch_size, k)[0]:
            if mask not in masks:
                masks.append(mask)
    if patches == 1 or len(masks) == 1:
        return masks
    return [masks[i] + masks[j] for i in range(len(masks)) for j in range(i + 1, len(masks))]


def placements(image_size, patch_sizes):
    """Every rectangle that a patch of one of the shapes may be."""
    return [
        (top, left, height, width)
        for height, width in patch_sizes
        for top in range(image_size[0] - height + 1)
        for left in range(image_size[1] - width + 1)
    ]


def uncovered_together(image_size, patch_sizes, keeps, patches):
    """Brute force: all that an attacker with so many patches may place and no single mask hides
    completely."""
    holes = []
    for placed in itertools.combinations_with_replacement(placements(image_size, patch_sizes), patches):
        visible = keep_of(image_size, placed)
        if all((keep & ~visible).any() for keep in keeps):
            holes.append(placed)
    return holes


def coarse_blocks(rows, columns):
    """For each coarse mask the fine masks in its 2x2 block; an odd row or column shares its last block with a
    neighbour."""

    def pairs(n):
        if n == 1:
            return [[0]]
        found = [[i, i + 1] for i in range(0, n - 1, 2)]
        return found if n % 2 == 0 else [*found, [n - 2, n - 1]]

    return [
        [r * columns + c for r in block_r for c in block_c]
        for block_r in pairs(rows)
        for block_c in pairs(columns)
    ]


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


def challenger_masking(table):
    """Challenger masking: the defended label, the case that decided, and the games (pairs of masks) that were
    played."""
    first = [table[i][i] for i in range(len(table))]
    if len(set(first)) == 1:
        return first[0], "agreed", []
    games = []
    champion = 0
    beaten = [False] * len(table)
    while True:
        challenger = None
        for j in range(len(table)):
            if not beaten[j] and first[j] != first[champion]:
                challenger = j
                break
        if challenger is None:
            return first[champion], "champion", games
        games.append((champion, challenger))
        if table[champion][challenger] == first[challenger]:
            beaten[champion] = True
            champion = challenger
        else:
            beaten[challenger] = True


def certified(table, label):
    """Algorithm 2: F(x.m_i.m_j) = label for all i <= j."""
    return all(table[i][j] == label for i in range(len(table)) for j in range(i, len(table)))


def alarm(vanilla, views, threshold):
    """Some one-mask view, (label, confidence), disagrees with F(x) and is more confident than the
    threshold."""
    return any(label != vanilla and confidence > threshold for label, confidence in views)


def detection_certified(true_label, views, threshold):
    """Every one-mask view answers the true label and is more confident than the threshold."""
    return all(label == true_label and confidence > threshold for label, confidence in views)


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


def grad_cam(cut, image, label):
    """The heat (height, width) of an image (3, height, width).

    ``cut(images)`` gives the feature maps (1, C, h, w) and a function from there to the logits (1, classes).
    Each channel counts by the mean gradient of the label's logit; what speaks against the label is cut off.
    """
    maps, head = cut(image[None])
    maps = maps.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(head(maps)[0, label], maps)
    heat = np.zeros(maps.shape[2:])
    for channel in range(maps.shape[1]):
        heat += float(gradient[0, channel].mean()) * maps[0, channel].detach().numpy()
    return bilinear(np.maximum(heat, 0), image.shape[1:])


def bilinear(heat, size):
    """Enlarged, pixel centres on pixel centres; outside the outermost centres the border goes on."""

    def places(n, small):
        for pixel in range(n):
            at = min(max((pixel + 0.5) * small / n - 0.5, 0), small - 1)
            low = min(int(at), small - 1)
            yield low, min(low + 1, small - 1), at - low

    rows, columns = list(places(size[0], heat.shape[0])), list(places(size[1], heat.shape[1]))
    out = np.zeros(size)
    for y, (top, bottom, down) in enumerate(rows):
        for x, (left, right, along) in enumerate(columns):
            upper = (1 - along) * heat[top, left] + along * heat[top, right]
            lower = (1 - along) * heat[bottom, left] + along * heat[bottom, right]
            out[y, x] = (1 - down) * upper + down * lower
    return out


def gutout(heat_of, keeps):
    """Round 1: m1 hides the most heat of x. Round 2: m2 != m1 hides the most heat of x.m1. ``heat_of(keep)``:
    Grad-CAM of x.keep."""

    def hottest(heat, candidates):
        # Nine digits, so that sums of equal heat are equal in whatever order they were taken.
        return candidates[
            worst([float(f"{heat[~keeps[i]].sum() / max(heat.max(), 1e-300):.9g}") for i in candidates])
        ]

    everything = list(range(len(keeps)))
    m1 = hottest(heat_of(np.ones_like(keeps[0])), everything)
    m2 = hottest(heat_of(keeps[m1]), [i for i in everything if i != m1])
    return keeps[m1] & keeps[m2]
