"""The attack breaks what can be broken and nothing that is certified; the harness believes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from breakable import MASKS, PATCH, SIZE, certify, world
from certipatch.data.source import as_float, pixels_sha256
from certipatch.defenses.patchcleanser.defense import PatchCleanser
from certipatch.errors import ConfigError, RecordsError, SoundnessError
from certipatch.geometry.masks import MaskSet
from certipatch.records.manifest import read_manifest
from certipatch.records.read import read_folder, read_records
from certipatch.records.schema import ATTACKS
from certipatch.redteam.attack import attack as attack_certified
from certipatch.redteam.climb import AttackConfig, attack_images
from certipatch.redteam.goals import clean_tables, goals
from certipatch.redteam.harness import Harness, Proposal
from certipatch.report.attack import attack_text, summarize_attack
from certipatch.runtime.devices import make_fabric
from inputs import typed, write_manifest, write_photos

pytestmark = pytest.mark.usefixtures("one_thread")


def breakable(defense: PatchCleanser, pixels: torch.Tensor, label: int) -> bool:
    """By exhaustion: is there a patch of black and white pixels, anywhere, that changes the answer?"""
    (height, width), (h, w) = SIZE, PATCH
    patched = []
    for top, left in product(range(height - h + 1), range(width - w + 1)):
        for content in product((0, 255), repeat=h * w):
            image = pixels.clone()
            image[:, top : top + h, left : left + w] = torch.tensor(content, dtype=torch.uint8).view(h, w)
            patched.append(image)
    return bool((defense.predict(as_float(torch.stack(patched))) != label).any())


def test_what_can_be_broken_is_and_what_is_certified_is_not():
    model, pixels, labels = world()
    defense = PatchCleanser(model, MASKS)
    verdicts = defense.certify(as_float(pixels), labels)
    right = [a for a, verdict in enumerate(verdicts) if verdict.defended_label == labels[a]]
    certified = [a for a in right if verdicts[a].certified]
    uncertified = [a for a in right if a not in certified]  # the others are in test_theorem.py
    truth = {a for a in uncertified if breakable(defense, pixels[a], int(labels[a]))}

    pixels, labels = pixels[right], labels[right]
    ways = [
        goals(MASKS, table, int(label))
        for table, label in zip(clean_tables(defense, as_float(pixels)), labels, strict=True)
    ]
    results = attack_images(
        model,
        Harness(defense, pixels),
        labels,
        ways,
        AttackConfig(steps=8, restarts=14),
        list(range(len(right))),
    )
    broken = {a for a, judged in zip(right, results, strict=True) if any(result.broken for result in judged)}
    assert not broken & set(certified)
    assert [a for a, way in zip(right, ways, strict=True) if not way] == certified, (
        "a goal is exactly what a certificate rules out, on a grid"
    )
    assert len(certified) >= 8
    assert len(truth) >= 8
    assert len(broken & truth) >= 0.9 * len(truth), (len(broken), len(truth))


# The harness.


@pytest.mark.parametrize(
    ("top", "left", "content", "words"),
    [
        (0, 0, torch.zeros(3, 2, 3), "expected a patch of 2x2"),
        (0, 0, torch.zeros(3, 6, 6), "expected a patch of 2x2"),
        (0, 0, torch.zeros(1, 2, 2), "expected a patch of 2x2"),
        (5, 0, torch.zeros(3, 2, 2), "expected a patch of 2x2"),
        (0, -1, torch.zeros(3, 2, 2), "expected a patch of 2x2"),
        (0, 0, torch.full((3, 2, 2), 1.01), "[0, 1]"),
        (0, 0, torch.full((3, 2, 2), -0.01), "[0, 1]"),
        (0, 0, torch.full((3, 2, 2), float("nan")), "[0, 1]"),
        (0, 0, torch.full((3, 2, 2), float("inf")), "[0, 1]"),
        (0, 0, torch.zeros(3, 2, 2, dtype=torch.int64), "[0, 1]"),
    ],
)
def test_the_harness_refuses_what_is_no_patch(top: int, left: int, content: torch.Tensor, words: str):
    model, pixels, _ = world(1)
    with pytest.raises(ConfigError) as refused:
        Harness(PatchCleanser(model, MASKS), pixels).judge([Proposal(0, top, left, content)])
    assert words in str(refused.value)


def test_the_harness_pastes_rounds_and_asks():
    model, pixels, _ = world(1)
    defense = PatchCleanser(model, MASKS)
    content = torch.rand(3, 2, 2)
    ((patched, verdict),) = Harness(defense, pixels).judge([Proposal(0, 1, 4, content)])
    expected = pixels[0].clone()
    expected[:, 1:3, 4:6] = (content * 255).round().to(torch.uint8)
    assert torch.equal(patched, expected)
    assert verdict.defended_label == defense.predict(as_float(expected[None])).item()


# Several shapes, two patches.


def test_several_shapes_are_attacked_each():
    """Both shapes are tried and break images; the harness takes either of them, and neither a third nor both
    at once."""
    model, pixels, labels = world()
    masks = MaskSet.covering(image_size=SIZE, patch_size=(4, 1), other_patch_sizes=[(1, 4)], masks_per_axis=3)
    defense = PatchCleanser(model, masks)
    verdicts = defense.certify(as_float(pixels), labels)
    tables = clean_tables(defense, as_float(pixels))
    ways = [goals(masks, table, int(label)) for table, label in zip(tables, labels, strict=True)]
    assert not any(way for way, verdict in zip(ways, verdicts, strict=True) if verdict.certified)
    harness = Harness(defense, pixels)
    results = attack_images(
        model, harness, labels, ways, AttackConfig(steps=8, restarts=14), list(range(len(pixels)))
    )
    certified = [judged for judged, verdict in zip(results, verdicts, strict=True) if verdict.certified]
    assert {result.attempt.patch_size for judged in certified for result in judged} == {(4, 1), (1, 4)}
    # An image is broken by the shape that is tried first, so each shape is asked for alone.
    for shape in ((4, 1), (1, 4)):
        right = [
            image
            for image, (verdict, label) in enumerate(zip(verdicts, labels, strict=True))
            if verdict.defended_label == label and any(way.patch_size == shape for way in ways[image])
        ]
        alone = attack_images(
            model,
            Harness(defense, pixels[right]),
            labels[right],
            [[way for way in ways[image] if way.patch_size == shape] for image in right],
            AttackConfig(steps=8, restarts=14),
            right,
        )
        tried = [result for judged in alone for result in judged]
        assert {result.attempt.patch_size for result in tried} == {shape}
        assert any(result.broken for result in tried)
        results += [
            [replace(each, attempt=replace(each.attempt, image=right[each.attempt.image]))] for each in tried
        ]
    assert len(certified) >= 3
    assert not any(result.broken for judged in certified for result in judged)
    for result in (result for judged in results for result in judged):
        rows, columns = (result.patched != pixels[result.attempt.image]).any(0).nonzero().T
        height, width = (int(side.max() - side.min()) + 1 if len(side) else 0 for side in (rows, columns))
        assert (height <= 4 and width <= 1) or (height <= 1 and width <= 4)
    for content in (torch.zeros(3, 4, 4), torch.zeros(3, 2, 2), torch.zeros(3, 1, 1), torch.zeros(4)):
        with pytest.raises(ConfigError, match="expected a patch of 4x1 or 1x4"):
            harness.judge([Proposal(0, 0, 0, content)])


def test_two_patches_are_not_attacked(tmp_path: Path):
    """There is no attack with two; one that tried a single patch would look like an upper bound on what two
    can do."""
    masks = MaskSet.covering(image_size=SIZE, patch_size=PATCH, masks_per_axis=2, patches=2)
    with pytest.raises(ConfigError, match="against one patch") as refused:
        attack(tmp_path / "c", tmp_path / "a", masks, n=6)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ConfigError, match="against one patch"):
        Harness(PatchCleanser(world()[0], masks), world()[1])


# A certification, attacked.


def attack(
    certified: Path, out: Path, masks: MaskSet = MASKS, *, resume: bool = False, n: int = 32, **options: int
) -> None:
    """Certify the images of the world, and attack them."""
    opened, source = certify(certified, masks, n)
    config = AttackConfig(**{"steps": 8, "restarts": 6} | options)
    folder, fabric = read_folder(certified), make_fabric(device="cpu")
    defense = PatchCleanser(opened.network, masks)
    attack_certified(opened, source, defense, folder, out, fabric=fabric, config=config, resume=resume)


def test_records_of_an_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They have bounds and patched images that can be judged again, and are the same again with the same
    seed, also when the attack is resumed."""
    monkeypatch.setattr("certipatch.redteam.attack.BLOCK", 12)
    attack(tmp_path / "c", tmp_path / "a")
    found = summarize_attack(read_folder(tmp_path / "a"))
    assert found["certified_broken"] == 0
    certified = sum(record.certified for record in read_records(tmp_path / "c"))
    assert found["certified_robust_accuracy"]["count"] == certified
    assert certified <= found["attacked_accuracy"]["count"] < found["clean_accuracy"]["count"] == 32
    assert "upper bound" in attack_text(found)

    network, pixels, labels = world()
    defense = PatchCleanser(network, MASKS)
    records = read_records(tmp_path / "a")
    for record in records:
        patched = torch.from_numpy(np.array(Image.open(tmp_path / "a" / str(record.image)))).permute(2, 0, 1)
        assert pixels_sha256(patched) == record.pixels
        assert (defense.predict(as_float(patched[None])).item() != labels[record.index]) == record.broken
        rows, columns = (patched != pixels[record.index]).any(0).nonzero().T
        assert record.top <= rows.min() <= rows.max() < record.top + 2
        assert record.left <= columns.min() <= columns.max() < record.left + 2
        assert (record.height, record.width) == PATCH

    attack(tmp_path / "c2", tmp_path / "again")
    lines = (tmp_path / "a" / ATTACKS).read_bytes()
    assert (tmp_path / "again" / ATTACKS).read_bytes() == lines
    # Killed in the middle of its second block:
    manifest = json.loads((tmp_path / "again" / "manifest.json").read_text())
    write_manifest(tmp_path / "again" / "manifest.json", manifest | {"finished": None})
    begun = b"".join(lines.splitlines(keepends=True)[:20])
    (tmp_path / "again" / ATTACKS).write_bytes(begun + b'{"index": 4')
    attack(tmp_path / "c3", tmp_path / "again", resume=True)
    assert (tmp_path / "again" / ATTACKS).read_bytes() == lines
    with pytest.raises(RecordsError, match="another experiment"):
        attack(tmp_path / "c4", tmp_path / "again", resume=True, seed=1)


def test_a_certificate_that_is_none_is_broken_and_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The twin: there is a mask less, and the check of the premise is switched off. The attack finds the hole
    and stops."""
    hole = MaskSet(SIZE, PATCH, MASKS.masks_per_axis, MASKS.windows[:4] + MASKS.windows[5:])
    assert hole.uncovered_patch(PATCH) is not None
    monkeypatch.setattr(MaskSet, "uncovered_patches", lambda _: None)
    with pytest.raises(SoundnessError, match="expected the certified answer") as stopped:
        attack(tmp_path / "c", tmp_path / "a", hole, certified_restarts=30)
    (folder,) = (tmp_path / "a").glob("broken-certificate-*")
    assert str(folder) in str(stopped.value)

    case = json.loads((folder / "case.json").read_text())
    record = case["record"]
    assert record["certified"]
    assert record in [of_all.model_dump(mode="json") for of_all in read_records(tmp_path / "c")]
    assert case["certification"] == read_manifest(tmp_path / "c").written
    patched, clean, patch = (
        np.array(Image.open(folder / f"{name}.png")) for name in ("patched", "clean", "patch")
    )
    top, left = case["patch"]["top"], case["patch"]["left"]
    clean[top : top + 2, left : left + 2] = patch
    assert np.array_equal(clean, patched)
    images = as_float(torch.from_numpy(patched).permute(2, 0, 1)[None])
    answer = PatchCleanser(world()[0], hole).predict(images).item()
    assert answer == case["answer"] != record["label"]


def _one_pixel(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putpixel((5, 0), tuple(value ^ 1 for value in image.getpixel((5, 0))))
    return image


def _unreadable(_: Image.Image) -> Image.Image:
    raise OSError("truncated")


@pytest.mark.parametrize("index", [0, 13, 31])
@pytest.mark.parametrize("change", [_one_pixel, _unreadable, None], ids=["pixel", "unreadable", "label"])
def test_an_image_that_is_not_the_certified_one_stops_the_attack(
    index: int,
    change: Callable[[Image.Image], Image.Image] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Names, number and masks are the same, and the difference is one bit, of one image anywhere in the set.

    The images of the blocks before it have their records; no image of its own block has.
    """
    opened, source = certify(tmp_path / "c")
    labels = list(source.labels)
    labels[index] += change is None

    def other(i: int) -> Image.Image:
        return change(source.open(i)) if change and i == index else source.open(i)

    monkeypatch.setattr("certipatch.redteam.attack.BLOCK", 8)
    with pytest.raises(SoundnessError, match=rf"^image {index} \('{index}'\): is not the one") as refused:
        attack_certified(
            opened,
            replace(source, open=other, labels=labels),
            PatchCleanser(opened.network, MASKS),
            read_folder(tmp_path / "c"),
            tmp_path / "a",
            fabric=make_fabric(device="cpu"),
            config=AttackConfig(steps=1, restarts=1, certified_restarts=1),
        )
    assert "\n" not in str(refused.value)
    assert [record.index for record in read_folder(tmp_path / "a").records] == list(range(index // 8 * 8))


def test_an_image_that_was_unreadable_when_certified_and_is_not_now_stops_the_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened, source = certify(tmp_path / "c")
    folder = read_folder(tmp_path / "c")
    was = folder.records[3].model_copy(update={"pixels": None, "certified": False})
    folder = replace(folder, records=[*folder.records[:3], was, *folder.records[4:]])
    monkeypatch.setattr("certipatch.redteam.work.attack_images", None)
    with pytest.raises(SoundnessError, match=r"^image 3 .* is not the one that was certified"):
        attack_certified(
            opened,
            source,
            PatchCleanser(opened.network, MASKS),
            folder,
            tmp_path / "a",
            fabric=make_fabric(device="cpu"),
            config=AttackConfig(),
        )


def test_only_what_was_certified_is_attacked(cli, trained: Path, photos: Path, tmp_path: Path):
    options = typed(model=trained, data=photos)
    cli("certify", *options, patch=5, masks_per_axis=2, out=tmp_path / "c")
    quick = typed(records=tmp_path / "c", steps=2, restarts=2, certified_restarts=1)
    done = cli("attack", *options, *quick, "--limit", 6, "--out", tmp_path / "a", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["attacked_accuracy"]["images"] == 6
    assert found["certified_broken"] == 0

    other = write_photos(tmp_path / "other", size=40)
    refused = cli("attack", "--model", trained, "--data", other, *quick, "--out", tmp_path / "b")
    assert (refused.code, "data.sample" in refused.err or "sample" in refused.err) == (2, True), refused.err
    weights = _other_weights(trained, tmp_path)
    refused = cli("attack", *quick, model="small-cnn", weights=weights, data=photos, out=tmp_path / "b")
    assert (refused.code, "another model" in refused.err) == (2, True), refused.err
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    experiment = {**manifest["experiment"], "data": {"images": 10**15}}
    write_manifest(tmp_path / "c" / "manifest.json", {**manifest, "kind": "x", "experiment": experiment})
    refused = cli("attack", *options, *quick, "--out", tmp_path / "b")
    assert (refused.code, "expected records of certify, found those of x" in refused.err) == (2, True), (
        refused.err
    )
    manifest["experiment"]["masks"]["windows"][0] = [[0, 0, 20, 20]]
    write_manifest(tmp_path / "c" / "manifest.json", manifest)
    refused = cli("attack", *options, *quick, "--out", tmp_path / "b")
    assert (refused.code, "masks.windows" in refused.err) == (2, True), refused.err
    assert not (tmp_path / "b").exists()


def _other_weights(trained: Path, tmp_path: Path) -> Path:
    state = safetensors.torch.load_file(trained / "model.safetensors")
    safetensors.torch.save_file(state | {"13.bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"
