"""Several patch shapes and two patches, through the defense and the command line. Geometry: test_masks.py;
theorem: test_theorem.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import oracle
from certipatch import MaskSet, PatchCleanser, SoundnessError
from certipatch.errors import ConfigError
from certipatch.models.small import Normalize
from inputs import write_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (16, 16)
THREATS: dict[str, dict[str, Any]] = {
    "shapes": {"patch_size": (6, 2), "other_patch_sizes": [(2, 6)], "masks_per_axis": 3},
    "two": {"patch_size": (2, 2), "masks_per_axis": 3, "patches": 2},
    "two of two shapes": {
        "patch_size": (4, 1),
        "other_patch_sizes": [(1, 4)],
        "masks_per_axis": 2,
        "patches": 2,
    },
}


def masks_of(name: str) -> MaskSet:
    return MaskSet.covering(image_size=SIZE, **THREATS[name])


def cnn() -> nn.Sequential:
    """A local layer, then a global one, in double precision."""
    torch.manual_seed(1)
    layers = [
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(6 * 16, 4),
    ]
    nn.init.normal_(layers[-1].weight, std=0.5)
    nn.init.constant_(layers[-1].bias[2:3], 0.5)  # an image that is all masked is of some class too
    return nn.Sequential(Normalize((0.5,) * 3, (0.25,) * 3), *layers).double().eval()


def pictures(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Of many images in [0, 1] the eight that the model is surest of and the two that it is least sure of,
    with its answers as labels."""
    generator = torch.Generator().manual_seed(3)
    colours = torch.rand(400, 3, 1, 1, generator=generator, dtype=torch.float64)
    images = (colours + 0.3 * torch.rand(400, 3, *SIZE, generator=generator, dtype=torch.float64)).clamp(0, 1)
    with torch.no_grad():
        best = model(images).topk(2, dim=1)
    order = (best.values[:, 0] - best.values[:, 1]).argsort(descending=True)
    chosen = torch.cat([order[:8], order[-2:]])
    return images[chosen], best.indices[chosen, 0]


@pytest.mark.parametrize("name", THREATS)
def test_certificates_equal_one_view_at_a_time(name):
    """Also with the shared prefix, where the activations under two windows are pasted into those under two
    others."""
    model, masks = cnn(), masks_of(name)
    images, labels = pictures(model)
    rectangles = oracle.covering_several(SIZE, masks.patch_sizes, masks.masks_per_axis, masks.patches)
    keeps = [torch.from_numpy(oracle.keep_of(SIZE, mask)) for mask in rectangles]
    plain = PatchCleanser(model, masks, batch_size=64)
    layer = PatchCleanser(
        model, MaskSet.covering(image_size=SIZE, patch_size=(1, 1), masks_per_axis=8), shared_prefix=True
    ).network.prefix
    if name == "two of two shapes":  # each mask meets each other: there is nothing to paste
        with pytest.raises(ConfigError, match="shared prefix"):
            PatchCleanser(model, masks, batch_size=64, shared_prefix=layer.layer)
        pasted = plain
    else:
        pasted = PatchCleanser(model, masks, batch_size=64, shared_prefix=layer.layer)
        assert pasted.network.apart.any(), "no pair of masks is apart: nothing would be pasted"
    verdicts, others = plain.certify(images, labels), pasted.certify(images, labels)
    above = [(i, j) for i in range(len(keeps)) for j in range(i, len(keeps))]
    for image, label, verdict, other in zip(images, labels.tolist(), verdicts, others, strict=True):
        with torch.no_grad():
            answers = (
                model(torch.stack([torch.where(keeps[i] & keeps[j], image, 0.5) for i, j in above]))
                .argmax(1)
                .tolist()
            )
        known = dict(zip(above, answers, strict=True))
        table = [[known[min(i, j), max(i, j)] for j in range(len(keeps))] for i in range(len(keeps))]
        for found in (verdict, other):
            assert found.certified == oracle.certified(table, label)
            assert (found.defended_label, found.case) == oracle.double_masking(table)
            assert not found.certified or found.passes == 1 + len(keeps) * (len(keeps) + 1) // 2
        assert not verdict.certified or other.margin == pytest.approx(verdict.margin, rel=1e-6)
    assert {verdict.certified for verdict in verdicts} == {True, False}


@pytest.mark.parametrize("name", THREATS)
def test_masks_that_do_not_cover_all_of_it_are_refused(name):
    """Each mask of a threat less, and the masks for less than what they are said to be against."""
    masks = masks_of(name)
    smaller = [
        MaskSet.covering(image_size=SIZE, patch_size=masks.patch_size, masks_per_axis=masks.masks_per_axis)
    ]
    smaller += [dataclasses.replace(masks, windows=masks.windows[1:])]
    for few in smaller:
        with pytest.raises(SoundnessError, match="that no mask covers") as refused:
            PatchCleanser(cnn(), dataclasses.replace(masks, windows=few.windows))
        assert str(refused.value).count("Window") == masks.patches


# The command line


def test_several_shapes_on_the_command_line(cli, trained: Path, photos: Path, tmp_path: Path):
    out, photo = tmp_path / "c", photos / "blue" / "0.png"
    options = ["--model", trained, "--data", photos]
    geometry = ["--patch", "3x12+12x3", "--masks-per-axis", 2]
    done = cli("certify", *options, *geometry, "--limit", 9, "--out", out, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["patch_size"], found["other_patch_sizes"]) == ([12, 3], [[3, 12]])
    assert "patches" not in found
    assert "12x3+" in cli("report", out).out
    answers = [
        cli("predict", "--model", trained, *which, photo) for which in (["--certified", out], geometry)
    ]
    assert [answer.code for answer in answers] == [0, 0], answers
    assert answers[0].out == answers[1].out
    assert json.loads(answers[0].out)["other_patch_sizes"] == [[3, 12]]
    assert cli("verify", out, *options, "--sample", 2).code == 0
    attacked = cli(
        "attack", *options, "--records", out, "--steps", 2, "--restarts", 2, "--out", tmp_path / "a", "--json"
    )
    assert attacked.code == 0, attacked.err
    assert json.loads(attacked.out)["other_patch_sizes"] == [[3, 12]]
    assert json.loads(attacked.out)["certified_broken"] == 0

    again = cli(
        "certify", *options, "--patch", "12x3", "--masks-per-axis", 2, "--limit", 9, "--out", out, "--resume"
    )
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "masks.other_patch_sizes" in again.err
    reworded = ["--patch", "12x3+3x12", "--masks-per-axis", 2, "--limit", 9]
    assert cli("certify", *options, *reworded, "--out", out, "--resume").code == 0, (
        "the same threat in other words"
    )
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["experiment"]["masks"].pop("other_patch_sizes")
    write_manifest(out / "manifest.json", manifest)
    refused = cli("predict", "--model", trained, "--certified", out, photo)
    assert (refused.code, "another model (masks.windows" in refused.err) == (2, True), refused.err
    refused = cli(
        "train", *options, val_data=photos, strategy="vanilla", patch="12x3+3x12", out=tmp_path / "t"
    )
    assert (refused.code, "expected one shape to train with" in refused.err) == (2, True), refused.err


def test_two_patches_on_the_command_line(cli, trained: Path, photos: Path, tmp_path: Path):
    out, photo = tmp_path / "c", photos / "blue" / "0.png"
    options, geometry = ["--model", trained, "--data", photos], ["--masks-per-axis", 2, "--patches", 2]
    done = cli("certify", *options, "--patch", "3,4x2", *geometry, "--limit", 6, "--out", out, "--json")
    assert done.code == 0, done.err
    assert [(found["patch_size"], found["patches"]) for found in json.loads(done.out)] == [
        ([3, 3], 2),
        ([4, 2], 2),
    ]
    assert sorted(path.name for path in out.iterdir()) == ["2-patches-3x3-k2", "2-patches-4x2-k2"]
    assert "2 x 3x3" in cli("report", out).out
    one = out / "2-patches-3x3-k2"
    answers = [
        cli("predict", "--model", trained, *which, photo)
        for which in (["--certified", one], ["--patch", 3, *geometry])
    ]
    assert [answer.code for answer in answers] == [0, 0], answers
    assert answers[0].out == answers[1].out
    assert json.loads(answers[0].out)["patches"] == 2
    assert cli("verify", out, *options, "--sample", 1).code == 0
    benched = cli(
        "bench", *options, certified=one, limit=1, repeats=1, no_compile=True, what="certify", json=True
    )
    assert benched.code == 0, benched.err
    for refused, words in [
        (cli("attack", *options, "--records", one, "--out", tmp_path / "a"), "no attack with more"),
        (
            cli("predict", "--model", trained, "--certified", one, "--patches", 2, photo),
            "drop --patch, --patches",
        ),
        (
            cli("certify", *options, patch=3, masks_per_axis=2, limit=6, out=one, resume=True),
            "masks.patches: 2 there",
        ),
        (
            cli("bench", *options, "--patch", 3, "--patches", 2, "--what", "train"),
            "expected one patch of one shape",
        ),
    ]:
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
        assert words in refused.err
    assert not (tmp_path / "a").exists()
    for patches in (3, 0, "2.5", "x", True, None, [2]):
        manifest = json.loads((one / "manifest.json").read_text())
        manifest["experiment"]["masks"]["patches"] = patches
        write_manifest(one / "manifest.json", manifest)
        damaged = cli("report", one)
        assert (damaged.code, "masks.patches" in damaged.err) == (2, True), damaged.err
