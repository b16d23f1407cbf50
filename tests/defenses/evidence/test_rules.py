"""The rules on evidence by exhaustion: no patch, of any content and at any place, changes a certified answer.

A world is every image of a few pixels and values. A *window classifier* is, for each window, a random look-up
table from what it shows to a row of integers. An attacked image is an image of the world, so an attack is a
look-up. In the second half the attacker writes evidence instead, which is how exactness is tried: where
there is no certificate, an attack exists. The twins, each with a part of the proof taken away, must break.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

from certipatch.defenses.evidence.integers import Weakest, weakest
from certipatch.defenses.evidence.robust_masking import masked_label, masked_slack
from certipatch.defenses.evidence.sums import sum_label, sum_slack, sum_slack_published
from certipatch.defenses.evidence.two_masks import two_mask_table
from certipatch.defenses.patchcleanser.algorithms import INFERENCES, answer, two_mask_correct
from certipatch.errors import SoundnessError
from certipatch.geometry.patch import Threat
from certipatch.geometry.reach import touched
from certipatch.geometry.sights import blocks, cells, columns

LABELS = 3
SEEDS = 6


@dataclass(frozen=True)
class Rule:
    """How evidence is drawn, and what is answered and certified for it, given what a patch reaches."""

    values: tuple[int, ...]  # what a window may have for a class
    label: object  # (evidence, touch) -> class
    certified: object  # (evidence, label, touch) -> bool
    one_hot: bool = False

    def rows(self, rng, size):
        """(size, LABELS) int64 with a bias to class 1 (a smaller one wins ties, a larger one loses them)."""
        shares = np.array([0.1, 0.8, 0.1])
        if self.one_hot:
            return np.eye(LABELS, dtype=np.int64)[rng.choice(LABELS, p=shares, size=size)]
        rows = rng.choice(self.values, size=(size, LABELS)).astype(np.int64)
        sure = rng.random(size) < rng.choice([0.6, 0.9])
        rows[sure] = [self.values[0], self.values[-1], self.values[0]]
        return rows

    def writes(self, windows):
        """Everything that an attacker may write into some windows: (ways, windows, LABELS)."""
        single = np.eye(LABELS, dtype=int) if self.one_hot else list(product(self.values, repeat=LABELS))
        return np.array(list(product(single, repeat=windows)), dtype=np.int64)


def add(evidence, touch):
    return sum_label(evidence)


def rule_a(spread):
    return lambda evidence, label, touch: sum_slack(evidence, label, touch, spread).slack >= 0


def rule_b(evidence, label, touch):
    return masked_slack(evidence, label, touch, touch).slack >= 0


def rule_c(evidence, label, touch):
    return two_mask_correct(two_mask_table(evidence, touch, touch), label)


def answer_c(inference):
    return lambda evidence, touch: answer(two_mask_table(evidence, touch, touch), inference)[0]


VOTES = Rule((0, 1), add, rule_a(1))
ONE_HOT = Rule((0, 1), add, rule_a(1), one_hot=True)
TANH = Rule((-1, 0, 1), add, rule_a(2))
MASKING = Rule((0, 1, 3, 50), masked_label, rule_b)
TWO_MASKS = [Rule((-3, 0, 1, 50), answer_c(inference), rule_c) for inference in INFERENCES]
RULES = {"votes": VOTES, "one-hot": ONE_HOT, "tanh": TANH, "masking": MASKING}
RULES |= {f"two-masks-{name}": rule for name, rule in zip(INFERENCES, TWO_MASKS, strict=True)}


@dataclass(frozen=True)
class Sights:
    """All images of ``image`` pixels with values 0 .. values-1, the windows on them, and the patch."""

    image: tuple[int, int]
    values: int
    sights: tuple
    patch: tuple[int, int]

    def __str__(self):
        return f"{self.image}-{len(self.sights)}-windows-patch-{self.patch}"

    @property
    def touch(self):
        return touched(self.sights, self.image, Threat(self.patch)).touch

    @property
    def images(self):
        return np.array(list(product(range(self.values), repeat=self.image[0] * self.image[1])))

    def seen(self):
        """For each window the numbers of the pixels that it shows."""
        numbers = np.arange(self.image[0] * self.image[1]).reshape(self.image)
        for sight in self.sights:
            parts = [numbers[r.top : r.top + r.height, r.left : r.left + r.width].ravel() for r in sight]
            yield np.unique(np.concatenate(parts))

    def evidence(self, rule, seed):
        """(images, windows, LABELS) of a random window classifier."""
        rng, rows = np.random.default_rng(seed), []
        for pixels in self.seen():
            table = rule.rows(rng, self.values ** len(pixels))
            rows.append(table[self.images[:, pixels] @ self.values ** np.arange(len(pixels))])
        return np.stack(rows, axis=1)

    def attacks(self):
        numbers = np.arange(self.image[0] * self.image[1]).reshape(self.image)
        h, w = self.patch
        for top, left in product(range(self.image[0] - h + 1), range(self.image[1] - w + 1)):
            pixels = numbers[top : top + h, left : left + w].ravel()
            for content in product(range(self.values), repeat=len(pixels)):
                yield pixels, content


WORLDS = [
    Sights((1, 5), 3, columns((1, 5), 2), (1, 1)),
    Sights((1, 5), 3, columns((1, 5), 2, 2), (1, 1)),  # the stride does not divide
    Sights((1, 6), 2, columns((1, 6), 1), (1, 2)),
    Sights((3, 3), 2, blocks((3, 3), 2, 2), (1, 1)),
    Sights((3, 3), 2, cells((3, 3), 1, 1), (1, 2)),
    Sights((2, 4), 2, columns((2, 4), 1), (2, 1)),
]


def exhaust(world, rule, seed, touch=None):
    """Attack every image in every way; ``touch``: what the rule believes that a patch can reach."""
    touch = world.touch if touch is None else touch
    evidence, images = world.evidence(rule, seed), world.images
    answers = np.array([rule.label(one, touch) for one in evidence])
    certified = np.array(
        [rule.certified(one, int(label), touch) for one, label in zip(evidence, answers, strict=True)]
    )
    counts = Counter(certified=int(certified.sum()))
    powers = world.values ** np.arange(images.shape[1])[::-1]
    for pixels, content in world.attacks():
        attacked = images.copy()
        attacked[:, pixels] = content
        changed = answers[attacked @ powers] != answers
        counts["broken"] += int((changed & certified).sum())
        counts["others broken"] += int((changed & ~certified).sum())
    return counts


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_attack_on_a_certified_image_succeeds(rule):
    counts = Counter()
    for world, seed in product(WORLDS, range(SEEDS)):
        counts.update(exhaust(world, rule, seed))
    assert counts["broken"] == 0
    assert counts["certified"] >= 300
    assert counts["others broken"] >= 100


@pytest.mark.parametrize("name", RULES)
def test_only_the_true_label_is_certified(name):
    """A certificate for a label that is not the answer would be false without any attack."""
    rule, wrong = RULES[name], 0
    for world, seed in product(WORLDS, range(2)):
        touch = world.touch
        for evidence in world.evidence(rule, seed)[::5]:
            found = [c for c in range(LABELS) if rule.certified(evidence, c, touch)]
            assert found in ([], [rule.label(evidence, touch)])
            wrong += not found
    assert wrong > 0


def broken(rule, touch=None, worlds=WORLDS, seeds=40):
    """Is any certified image broken, in any world, for any of many classifiers?"""
    for world, seed in product(worlds, range(seeds)):
        believed = None if touch is None else touch(world)
        if exhaust(world, rule, seed, believed)["broken"]:
            return True
    return False


def one_less(world):
    """What a patch reaches, with one window left out of each set."""
    touch = world.touch.copy()
    touch[np.arange(len(touch)), touch.argmax(axis=1)] = False
    return touch


def with_ties_for_the_label(rule):
    """A certificate that lets the label win every tie: one vote more is enough by the slack of a tie."""

    def certified(evidence, label, touch):
        others = [c for c in range(LABELS) if c < label]
        shifted = evidence.copy()
        order = [label, *others, *[c for c in range(LABELS) if c > label]]
        shifted = shifted[:, order]  # the label is the smallest class now, so no tie is reckoned with
        return rule.certified(shifted, 0, touch)

    return Rule(rule.values, rule.label, certified, rule.one_hot)


@pytest.mark.parametrize("name", ["votes", "one-hot", "tanh", "masking"])
def test_twin_with_ties_for_the_label(name):
    assert broken(with_ties_for_the_label(RULES[name]))


@pytest.mark.parametrize("name", RULES)
def test_twin_that_reckons_with_one_window_less(name):
    """For masks these are smaller than what a patch reaches."""
    assert broken(RULES[name], one_less)


@pytest.mark.parametrize("name", ["votes", "one-hot"])
def test_twin_with_the_published_number_of_windows(name):
    """5 pixels, bands of 2, stride 2, patch of 1: the formula says one window, a patch on pixel 0 reaches
    two."""
    touch = np.eye(3, dtype=bool)
    assert WORLDS[1].touch.tolist() != touch.tolist()
    assert broken(RULES[name], lambda _: touch, [WORLDS[1]])


def test_twin_with_half_the_spread():
    twin = Rule(TANH.values, add, lambda e, y, touch: _unchecked_slack(e, y, touch, 1) >= 0)
    assert broken(twin)


def _unchecked_slack(evidence, label, touch, spread):
    """Rule A restated, with nobody who looks at the spread."""
    outside = np.array([evidence[~row].sum(axis=0) for row in touch])
    slack = outside[:, [label]] - outside - spread * touch.sum(axis=1)[:, None]
    return weakest(slack - (np.arange(LABELS) < label), label).slack


def test_twin_against_the_clean_runner_up_only():
    """Published code of Clipped BagNet certifies against the class that is second on the clean image. Here
    that is class 2, three windows of 1 behind class 1; class 0, four behind, wins from window 0."""
    evidence = np.array([[-1, 1, 0], [-1, 1, 0], [1, 1, 0]], dtype=np.int64)
    touch = np.eye(3, dtype=bool)
    assert evidence.sum(axis=0).argsort().tolist() == [0, 2, 1]
    assert sum_slack(evidence[:, 1:], 0, touch, 2).slack == 0  # certified, if class 0 is not looked at
    assert sum_slack(evidence, 1, touch, 2) == Weakest(slack=-1, place=0, rival=0)
    attacked = evidence.copy()
    attacked[0] = [1, -1, -1]
    assert sum_label(attacked) == 0


def test_twin_with_negative_evidence():
    """Robust masking needs the clip at 0: below it, zeros are not the worst that can be written."""
    values = (-50, 0, 1, 3)

    def unclipped(evidence, masks):
        return int(np.array([evidence[~row].sum(axis=0) for row in masks]).min(axis=0).argmax())

    def certified(evidence, label, touch):
        return rule_b(np.maximum(evidence, 0), label, touch)

    assert broken(Rule(values, unclipped, certified))


def test_twin_that_certifies_the_last_of_equals():
    """Published code of PatchCURE answers the first of equal classes and certifies the last of them: with no
    evidence at all it certifies the last class and answers the first."""
    nothing = np.zeros((4, LABELS), dtype=np.int64)
    touch = np.eye(4, dtype=bool)
    flipped = masked_slack(nothing[:, ::-1], 0, touch, touch).slack  # the last class as if it won ties
    assert flipped >= 0
    assert masked_label(nothing, touch) == 0
    assert masked_slack(nothing, LABELS - 1, touch, touch).slack < 0


def test_twin_of_two_masks_with_a_mask_left_out(monkeypatch):
    monkeypatch.setattr("certipatch.defenses.evidence.two_masks.check_masks", lambda *_: None)
    for rule in TWO_MASKS:
        assert broken(rule, lambda world: world.touch[1:])


def test_twin_with_differences_in_float32():
    """Evidence outside the patch is lost to rounding when a total in float32 has the attacker's 3e8."""
    honest = np.array([[0, 3.2], [0, 3.2], [0, 0]], dtype=np.float32)
    attacked = honest.copy()
    attacked[2, 1] = 3e8
    last = np.array([[False, False, True]])
    by_difference = attacked.sum(axis=0) - attacked[2]
    assert by_difference[1] == 0
    exact = (attacked.astype(np.float64) * 2**10).astype(np.int64)
    clean = (honest.astype(np.float64) * 2**10).astype(np.int64)
    assert masked_label(exact, last) == masked_label(clean, last) == 1


def added(evidence, touch):
    """Rule A's answers to many: (ways, windows, LABELS) -> (ways,)."""
    return evidence.sum(axis=1).argmax(axis=1)


def masked(evidence, touch):
    """Rule B's answers to many, mask by mask."""
    return np.min([evidence[:, ~row].sum(axis=1) for row in touch], axis=0).argmax(axis=1)


def attackable(evidence, label, touch, rule):
    """Does any evidence that an attacker may write in what one patch reaches change the answer?"""
    answers = masked if rule.label is masked_label else added
    for row in touch:
        written = rule.writes(int(row.sum()))
        attacked = np.repeat(evidence[None], len(written), axis=0)
        attacked[:, row] = written
        changed = answers(attacked, touch)
        some = np.linspace(0, len(attacked) - 1, 3).astype(int)
        assert changed[some].tolist() == [rule.label(one, touch) for one in attacked[some]]
        if (changed != label).any():
            return True
    return False


EVIDENCE_WORLDS = [
    touched(columns((1, 4), 1), (1, 4), Threat((1, 1))).touch,
    touched(columns((1, 6), 1), (1, 6), Threat((1, 1))).touch,
    touched(columns((1, 5), 2, 2), (1, 5), Threat((1, 1))).touch,
    touched(columns((1, 6), 2), (1, 6), Threat((1, 1))).touch,
    touched(columns((1, 9), 2), (1, 9), Threat((1, 1))).touch,
]


def drawn(rule, touches=EVIDENCE_WORLDS, seeds=60):
    """Random evidence, what a patch reaches of it, and the answer."""
    for touch, seed in product(touches, range(seeds)):
        evidence = rule.rows(np.random.default_rng(seed), touch.shape[1])
        yield evidence, int(rule.label(evidence, touch)), touch


# The attacker of robust masking may write more than all honest windows together have.
EXACT = {
    **{name: RULES[name] for name in ("votes", "one-hot", "tanh")},
    "masking": Rule(
        (0, 1, 60),
        *(
            masked_label,
            rule_b,
        ),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_certificate_is_exact(name):
    """Certified if and only if no evidence written in what a patch reaches changes the answer."""
    rule, found = EXACT[name], Counter()
    for evidence, label, touch in drawn(rule):
        if name == "masking":
            evidence = np.minimum(evidence, 3)  # honest: of 9 windows together less than 60
            label = int(rule.label(evidence, touch))
        certified = bool(rule.certified(evidence, label, touch))
        assert certified != attackable(evidence, label, touch, rule)
        found[certified] += 1
    assert min(found[True], found[False]) >= 30


@pytest.mark.parametrize("name", ["votes", "one-hot", "tanh"])
def test_the_published_slack_is_never_above_the_exact_one(name):
    spread, gained = {"tanh": 2}.get(name, 1), 0
    for evidence, label, touch in drawn(RULES[name], seeds=200):
        exact = sum_slack(evidence, label, touch, spread).slack
        published = sum_slack_published(evidence, label, touch, spread)
        assert published <= exact
        gained += published < exact
    assert gained > 0


def test_the_exact_slack_certifies_more():
    """Every other one of six windows votes: a patch that reaches two neighbours takes one vote, not two."""
    evidence = np.array([[1, 0], [0, 0]] * 3, dtype=np.int64)
    touch = touched(columns((1, 6), 2), (1, 6), Threat((1, 1))).touch
    assert set(touch.sum(axis=1)) == {2}
    assert sum_slack(evidence, 0, touch, 1).slack == 0
    assert sum_slack_published(evidence, 0, touch, 1) == -1


def test_the_weakest_place_and_the_rival_are_named():
    """Windows 0 and 1 speak for the rival 0 and the label 2, and a patch reaches one at a time."""
    evidence = np.array([[0, 0, 1], [0, 0, 1], [0, 0, 1], [1, 0, 0]], dtype=np.int64)
    found = sum_slack(evidence, 2, np.eye(4, dtype=bool), 1)
    assert found == Weakest(slack=-1, place=0, rival=0)
    assert masked_slack(evidence, 2, np.eye(4, dtype=bool), np.eye(4, dtype=bool)).rival == 0


GOOD = np.zeros((4, 3), dtype=np.int64)
TOUCH = np.eye(4, dtype=bool)


@pytest.mark.parametrize(
    ("evidence", "label", "said"),
    [
        (GOOD.astype(float), 0, "int64"),
        (np.full((4, 3), np.nan), 0, "int64"),
        (GOOD[:0], 0, "int64"),
        (GOOD[:, :1], 0, "int64"),
        (GOOD[0], 0, "int64"),
        (GOOD + 2**60, 0, "sums"),
        (GOOD + np.iinfo(np.int64).min, 0, "sums"),
        (GOOD, 3, "label 3"),
        (GOOD, -1, "label -1"),
    ],
)
def test_evidence_that_is_none_is_refused(evidence, label, said):
    for slack in (
        lambda: sum_slack(evidence, label, TOUCH, 1),
        lambda: masked_slack(evidence, label, TOUCH, TOUCH),
    ):
        with pytest.raises(SoundnessError, match=said):
            slack()


def test_premises_that_fail_are_refused():
    wide = GOOD.copy()
    wide[0, 0] = 2
    with pytest.raises(SoundnessError, match="spread of at most 1, found 2"):
        sum_slack(wide, 0, TOUCH, 1)
    with pytest.raises(SoundnessError, match="spread of at most 1, found 2"):
        sum_slack_published(wide, 0, TOUCH, 1)
    for ask in (lambda: masked_label(-wide, TOUCH), lambda: masked_slack(-wide, 0, TOUCH, TOUCH)):
        with pytest.raises(SoundnessError, match="nothing negative, found -2"):
            ask()
    for fewer in (TOUCH[1:], TOUCH[:0]):
        for ask in (lambda: masked_slack(GOOD, 0, TOUCH, fewer), lambda: two_mask_table(GOOD, TOUCH, fewer)):  # noqa: B023
            with pytest.raises(SoundnessError, match=r"hides the windows \[0\]"):
                ask()
