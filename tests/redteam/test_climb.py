"""The attack looks at what is judged, at many places, and finds what simple attacks find."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from simple_attacks import SIMPLE, Counted, OutOfQueriesError, Victim

from breakable import MASKS, PATCH, world
from certipatch.data.source import as_float
from certipatch.defenses.patchcleanser.defense import PatchCleanser
from certipatch.redteam.climb import PLACES_LIKE_THE_BEST, AttackConfig, Result, attack_images
from certipatch.redteam.goals import Goal, clean_tables, goals
from certipatch.redteam.harness import Harness

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = AttackConfig(steps=8, restarts=14)
BUDGET = 4000  # Queries for each simple attack on an image.


@cache
def attacked() -> tuple[Counted, PatchCleanser, torch.Tensor, torch.Tensor, list[list[Goal]]]:
    """The counted network of the world, its defense, those images that are right and not certified, their
    labels and their goals."""
    network, pixels, labels = world()
    model = Counted(network).eval()
    defense = PatchCleanser(model, MASKS)
    verdicts = defense.certify(as_float(pixels), labels)
    open_ = torch.tensor(
        [v.defended_label == label and not v.certified for v, label in zip(verdicts, labels, strict=True)]
    )
    pixels, labels = pixels[open_], labels[open_]
    tables = clean_tables(defense, as_float(pixels))
    ways = [goals(MASKS, table, int(label)) for table, label in zip(tables, labels, strict=True)]
    return model, defense, pixels, labels, ways


def ours(image: int, seed: int = 0) -> list[Result]:
    model, defense, pixels, labels, ways = attacked()
    model.asked, model.budget = 0, float("inf")
    one = slice(image, image + 1)
    (results,) = attack_images(
        model, Harness(defense, pixels[one]), labels[one], ways[one], CONFIG, [1000 * seed + image]
    )
    return results


@cache
def broken_by_us(seed: int) -> set[int]:
    """The images that ours breaks, none of them with more than ``BUDGET`` queries."""
    model, _, pixels, _, _ = attacked()
    broken = set()
    for image in range(len(pixels)):
        broken |= {image} if any(result.broken for result in ours(image, seed)) else set()
        assert model.asked <= BUDGET
    return broken


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SIMPLE)
def test_no_simple_attack_of_as_many_queries_breaks_an_image_that_ours_does_not(name: str, seed: int):
    model, defense, pixels, labels, _ = attacked()
    broken = broken_by_us(seed)
    found = set()
    for image, (clean, label) in enumerate(zip(as_float(pixels), labels.tolist(), strict=True)):
        model.asked, model.budget = 0, BUDGET
        victim = Victim(model, defense.predict, clean, label, PATCH, MASKS.keep, torch.full((3, 1, 1), 0.5))
        try:
            patched = SIMPLE[name](victim, torch.Generator().manual_seed(1000 * seed + image))
        except OutOfQueriesError:
            continue
        finally:
            model.budget = float("inf")
        assert int(defense.predict(patched[None])) != label
        found.add(image)
    assert len(found) >= 2, "an attack that breaks nothing says nothing about ours"
    assert found <= broken


def test_the_shortfall_is_that_of_the_very_pixels_that_are_judged():
    """Restated naively, view by view, on the patched image of 8 bits."""
    model, _, _, labels, _ = attacked()
    keep = MASKS.keep
    compared = 0
    for image in range(len(labels)):
        for result in ours(image):
            attempt, label = result.attempt, int(labels[image])
            h, w = PATCH
            box = (slice(attempt.top, attempt.top + h), slice(attempt.left, attempt.left + w))
            assert torch.equal((attempt.content * 255).round() / 255, attempt.content)
            missing = []
            for mask in keep:
                seen = mask if attempt.row is None else mask & keep[attempt.row]
                if not seen[box].any():
                    continue
                view = torch.where(seen, as_float(result.patched[None]), torch.tensor(0.5))
                logits = model(view)[0].tolist()
                wanted = label if attempt.row is None else attempt.target
                other = max(each for index, each in enumerate(logits) if index != wanted)
                ahead = logits[wanted] - other if attempt.row is None else other - logits[wanted]
                missing.append(max(0.0, ahead + 1))
            share = sum(each > 1 for each in missing) / len(missing)
            assert attempt.shortfall == pytest.approx((share, sum(missing) / len(missing)), abs=1e-4)
            compared += 1
    assert compared >= 8


def test_places_beside_the_most_visible_are_tried():
    *_, ways = attacked()
    among, beside = 0, 0
    for image in range(len(ways)):
        for attempt in (result.attempt for result in ours(image)):
            (way,) = (w for w in ways[image] if (w.row, w.target) == (attempt.row, attempt.target))
            at = np.flatnonzero((way.places == (attempt.top, attempt.left)).all(axis=1))
            assert len(at) == 1, "the goal is open at every place that is tried"
            visible = way.visibility[at[0]] >= PLACES_LIKE_THE_BEST * way.visibility.max()
            among, beside = among + visible, beside + (not visible)
    assert among > 0
    assert beside > 0
