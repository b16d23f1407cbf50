"""What a user may choose besides the paper's recipe: optimizer, schedule, augmentation, average, epoch."""

from __future__ import annotations

import copy
import json
import math
from itertools import combinations_with_replacement
from pathlib import Path

import pytest
import torch
from PIL import Image

from certipatch.data.load import load_source
from certipatch.data.source import Images, Source, as_float
from certipatch.errors import ConfigError, DataError
from certipatch.geometry.masks import MaskSet
from certipatch.models.build import build, describe
from certipatch.models.small import SMALL_CNN, Normalize
from certipatch.models.weights import weights_sha256
from certipatch.records.manifest import read_manifest
from certipatch.records.read import read_lines
from certipatch.reproduce.plan import plan
from certipatch.reproduce.recipe import Recipe
from certipatch.runtime.devices import derived_seed, make_fabric
from certipatch.training.augment import Augmented
from certipatch.training.config import TrainConfig, train_config
from certipatch.training.held_out import certified, hold_out
from certipatch.training.kept import Kept
from certipatch.training.optimization import make_optimizer, make_schedule
from certipatch.training.train import train
from inputs import refused, typed, write_photos

pytestmark = pytest.mark.usefixtures("one_thread")
EVERYTHING = {"optimizer": "adamw", "lr": 0.003, "schedule": "cosine", "weight_decay": 0.01}
EVERYTHING |= {"augment": "flip,crop", "ema": 0.9, "keep": "best"}


def config(**options: object) -> TrainConfig:
    return train_config(**{"strategy": "vanilla", "patch_size": (5, 5), "masks_per_axis": 6, **options})


def trained(folder: Path, source: Source, **options: object) -> str:
    """The hash of the weights of a run of a small network."""
    spec = describe(SMALL_CNN, classes=source.classes, num_classes=len(source.classes))
    model, asked = build(spec, seed=1), config(batch_size=8, lr=0.05, **options)
    train(model, spec, source, source, asked, folder, fabric=make_fabric(device="cpu"))
    assert read_manifest(folder).finished["weights_sha256"] == weights_sha256(model), "changed in place"
    return weights_sha256(model)


def test_the_defaults_are_a_plain_loop(photos: Path, tmp_path: Path):
    """SGD with momentum 0.9 and no decay, a tenth of the learning rate after half of the epochs: the bits of
    the weights are those of ten lines of torch."""
    source = load_source(str(photos))
    spec = describe(SMALL_CNN, classes=source.classes, num_classes=3)
    model, images = build(spec, seed=1).train(), Images(source, spec)
    pixels = as_float(torch.stack([images[i].readable() for i in range(24)]))
    labels, velocity = torch.tensor(source.labels), {}
    for epoch in range(3):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(derived_seed(0, epoch)))
        for batch in order.split(8):
            model.zero_grad()
            x = pixels[batch].contiguous(memory_format=torch.channels_last)
            torch.nn.functional.cross_entropy(model(x), labels[batch]).backward()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    moving = velocity[name] * 0.9 + weight.grad if name in velocity else weight.grad.clone()
                    velocity[name] = moving
                    weight.add_(moving, alpha=-0.05 * (1 if epoch < 1 else 0.1))
    assert trained(tmp_path / "run", source, epochs=3) == weights_sha256(model)


def test_a_default_is_stated_as_before_there_was_a_choice():
    asked = config(optimizer="momentum", schedule="step", augment="none", keep="last")
    assert asked == config()
    stated = asked.model_dump(mode="json")
    assert [stated[name] for name in ("optimizer", "schedule", "augment", "ema", "keep")] == [None] * 5


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("step", lambda epoch, _: 0.4 * (0.1 if epoch >= 2 else 1)),
        ("constant", lambda *_: 0.4),
        ("cosine", lambda epoch, step: 0.2 * (1 + math.cos(math.pi * (4 * epoch + step) / 20))),
        ("linear", lambda epoch, step: 0.4 * (1 - (4 * epoch + step) / 20)),
    ],
)
def test_schedules(schedule: str, expected):
    """Five epochs of four steps, asked for in any order."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    set_lr = make_schedule(optimizer, config(schedule=schedule, epochs=5, lr=0.4), 4)
    for epoch, step in [(0, 0), (4, 3), (1, 3), (2, 0), (3, 1)]:
        assert set_lr(epoch, step) == pytest.approx(expected(epoch, step), rel=1e-12)
        assert optimizer.param_groups[0]["lr"] == set_lr(epoch, step)


def test_decay_leaves_biases_and_normalisations_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    for name in ("momentum", "adamw"):
        groups = make_optimizer(model, config(optimizer=name, weight_decay=0.1)).param_groups
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert [decays[id(p)] for p in model.parameters()] == [0.1, 0, 0, 0]


def test_an_average_of_the_weights():
    """Less of what was before counts in the first steps: 1 - t^(-2/3), at most what was asked for."""
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(1, 1))
    kept, average = Kept(model, config(ema=0.6)), None
    for t in range(1, 9):
        torch.nn.init.normal_(model[1].weight)
        kept.update(t)
        decay = min(0.6, 1 - t ** (-2 / 3))
        average = decay * (0 if average is None else average) + (1 - decay) * model[1].weight.item()
        assert kept.now[1].weight.item() == pytest.approx(average, rel=1e-5)
    kept.finish()
    assert model[1].weight.item() == pytest.approx(average, rel=1e-5)


def test_the_best_epoch_is_kept(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of equals the last: the weights are those of a run that ends there."""
    source = load_source(str(photos))

    def as_if(*counts: int) -> None:
        found = iter(counts)
        monkeypatch.setattr(
            "certipatch.training.loop.certified", lambda *_: ({"correct": next(found), "images": 9}, 7)
        )

    as_if(3, 5, 5, 2)
    best = trained(tmp_path / "best", source, epochs=4, schedule="constant", keep="best")
    as_if(3, 5, 5)
    assert best == trained(tmp_path / "three", source, epochs=3, schedule="constant", keep="best")
    assert read_manifest(tmp_path / "best").finished["kept_epoch"] == 3
    lines = read_lines(tmp_path / "best" / "epochs.jsonl")
    assert [line["held_out_certified"]["correct"] for line in lines] == [3, 5, 5, 2]
    # 24 images, 2 of them held out: two batches of 8, three passes' worth each, and the cost of looking
    assert {line["forward_equivalents"] for line in lines} == {16 * 3 + 7}


def test_held_out_images_are_certified_as_algorithm_2_says(photos: Path):
    torch.manual_seed(5)
    source = load_source(str(photos))
    spec = describe(SMALL_CNN, classes=source.classes, num_classes=3)
    masks = MaskSet.covering(image_size=(32, 32), patch_size=(3, 3), masks_per_axis=6)
    images, model = Images(source, spec), torch.nn.Sequential(Normalize((0.5,) * 3, (0.25,) * 3), Colour())
    seen: list[int] = []
    model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    found, passes = certified(model.train(), images, masks, make_fabric(device="cpu"))
    assert passes == sum(seen)
    assert model.training

    def right(i: int, *hidden: tuple[object, ...]) -> bool:
        x = as_float(images[i].readable()).clone()
        for mask in hidden:
            for w in mask:
                x[:, w.top : w.top + w.height, w.left : w.left + w.width] = 0.5
        return int(model(x[None]).argmax()) == images[i].label

    pairs = list(combinations_with_replacement(masks.coarsen()[0].windows, 2))
    expected = sum(all(right(i, *pair) for pair in pairs) for i in range(24))
    assert 0 < expected < 24
    assert found == {"correct": expected, "images": 24}


class Colour(torch.nn.Module):
    """Blue, green or red, whichever three pixels have most of; two masks leave one, which may be wrong."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, [3, 16, 28], [3, 16, 28]].sum(dim=2).flip(1)


def test_what_is_held_out(photos: Path, tmp_path: Path):
    source = load_source(str(photos))
    rest, held = hold_out(source)
    assert (len(rest), len(held)) == (22, 2)
    assert sorted([*rest.names, *held.names]) == sorted(source.names)
    few = load_source(str(write_photos(tmp_path / "few", each=1)))
    with pytest.raises(DataError, match="keep best holds out"):
        hold_out(few)


class TestAugment:
    def images(self, photos: Path, **options: object) -> Augmented:
        source = load_source(str(photos))
        spec = describe(SMALL_CNN, classes=source.classes, num_classes=3)
        return Augmented(source, spec, config(**options))

    def test_flips_half(self, photos: Path):
        images = self.images(photos, augment="flip")
        flipped = []
        for epoch in range(6):
            for i in range(24):
                pixels, plain = images[i, epoch].readable(), images[i].readable()
                flipped.append(bool((pixels == plain.flip(2)).all()))
                assert flipped[-1] or (pixels == plain).all()
        assert 50 < sum(flipped) < 94

    def test_crops(self, photos: Path, tmp_path: Path):
        """A picture whose red is its x and whose green is its y says where each crop lies."""
        ramp = torch.arange(200, dtype=torch.uint8)
        pixels = torch.stack(
            [ramp.expand(200, 200), ramp[:, None].expand(200, 200), 0 * ramp.expand(200, 200)]
        )
        for name in "ab":
            (tmp_path / name).mkdir()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / name / "ramp.png")
        images = self.images(tmp_path, augment="crop")
        shares = []
        for epoch in range(40):
            x, y, _ = images[0, epoch].readable().float()
            assert x.shape == (32, 32)
            shares.append(float((x.max() - x.min()) / 199 * (y.max() - y.min()) / 199))
            assert bool((x[:, 1:] > x[:, :-1]).all()), "not flipped"
        assert 0.55 < min(shares) < 0.75
        assert 0.85 < max(shares) <= 1
        assert len(set(shares)) > 30

    def test_depends_on_image_epoch_and_seed_alone(self, photos: Path):
        images = self.images(photos, augment="flip,crop")
        before = torch.get_rng_state()
        first = [images[i, 0].readable() for i in range(8)]
        assert torch.equal(torch.get_rng_state(), before)
        again = {i: copy.deepcopy(images)[i, 0].readable() for i in reversed(range(8))}
        assert all(torch.equal(first[i], again[i]) for i in range(8))
        assert not any(torch.equal(first[i], images[i, 1].readable()) for i in range(8))
        other = self.images(photos, augment="flip,crop", seed=1)
        assert not any(torch.equal(first[i], other[i, 0].readable()) for i in range(8))

    def test_masks_that_are_used_again_lie_on_the_same_pixels(self, photos: Path):
        images = self.images(photos, strategy="greedy-coarse", augment="flip,crop", search_every=2)
        assert torch.equal(images[3, 2].readable(), images[3, 3].readable())
        assert not torch.equal(images[3, 1].readable(), images[3, 2].readable())


def test_resume_and_like_with_everything(cli, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run that dies in the middle of its second epoch, and one that dies between the line of an epoch and
    its checkpoint, end with the weights of the whole; --like trains them again; the table says what was
    chosen."""
    options = typed("train", model="small-cnn", data=photos, val_data=photos, strategy="random-cutout")
    options += typed(patch=5, epochs=3, batch_size=4, seed=3, **EVERYTHING)
    assert cli(*options, "--out", tmp_path / "whole").code == 0
    whole = read_manifest(tmp_path / "whole")
    asked = {name: whole.stated["train"][name] for name in EVERYTHING}
    assert asked == EVERYTHING

    class PowerCut(BaseException):
        pass

    from certipatch.training.checkpoint import Checkpoint

    save = Checkpoint.save
    for name, at in (("step", (1, 3)), ("line", (2, 0))):

        def dies(self, epoch: int, step: int, *rest: object, at: tuple[int, int] = at) -> None:
            if (epoch, step) == at:
                raise PowerCut
            save(self, epoch, step, *rest)

        monkeypatch.setattr(Checkpoint, "save", dies)
        monkeypatch.setattr("certipatch.training.checkpoint.CHECKPOINT_SECONDS", 0)
        with pytest.raises(PowerCut):
            cli(*options, "--out", tmp_path / name)
        monkeypatch.setattr(Checkpoint, "save", save)
        assert cli(*options, "--out", tmp_path / name, "--resume").code == 0
        found = read_manifest(tmp_path / name).finished
        assert found["weights_sha256"] == whole.finished["weights_sha256"]
        assert found["kept_epoch"] == whole.finished["kept_epoch"]

    (tmp_path / "again.toml").write_text(cli("train", like=tmp_path / "whole").out, encoding="utf-8")
    assert cli("train", config=tmp_path / "again.toml", out=tmp_path / "again").code == 0
    again = read_manifest(tmp_path / "again").finished
    assert again["weights_sha256"] == whole.finished["weights_sha256"]
    out = tmp_path / "c"
    assert cli("certify", model=tmp_path / "whole", data=photos, patch=5, masks_per_axis=2, out=out).code == 0
    (shown,) = json.loads(cli("report", out, json=True).out)
    assert shown["strategy"] == "random-cutout, 3 epochs (adamw, cosine, flip,crop, ema 0.9, best epoch)"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "adamw"}, ["adamw", "--lr"]),
        ({"optimizer": "adamv", "lr": 0.1}, ["'adamv'", "adamw"]),
        ({"optimizer": "adamw", "lr": 0.1, "momentum": 0.5}, ["momentum 0.5", "adamw"]),
        ({"optimizer": "adahessian", "lr": 0.1}, ["adahessian"]),
        ({"schedule": "plateau"}, ["schedule", "'step'", "plateau"]),
        ({"augment": "rotate"}, ["augment", "'none'", "rotate"]),
        ({"ema": 1}, ["ema", "1.0"]),
        ({"momentum": 1}, ["momentum", "1.0"]),
        ({"keep": "first"}, ["keep", "'last'", "first"]),
    ],
)
def test_what_is_refused(cli, photos: Path, tmp_path: Path, options: dict[str, object], words: list[str]):
    asked = {"model": "small-cnn", "data": photos, "val_data": photos, "strategy": "vanilla", "patch": 5}
    refused(cli("train", **asked, **options, out=tmp_path / "run"), *words)
    assert not (tmp_path / "run").exists()


def test_a_setup_may_set_them():
    asked = {"data": "d", "location": "digits", "train_split": "train", "test_split": "test"}
    asked |= {"train_images": 9, "test_images": 9, "models": ["small-cnn"], "train_patch": "3%"}
    asked |= {"patches": ["3%"], "masks_per_axis": [3], "strategies": ["vanilla"]}

    def made(**options: object) -> TrainConfig:
        recipe = Recipe.model_validate({"title": "t", "claim": "c", "setup": [{**asked, **options}]})
        (run,) = plan(recipe)
        return run.config

    assert {name: getattr(made(**EVERYTHING), name) for name in EVERYTHING} == EVERYTHING
    assert made().optimizer is None
    with pytest.raises(ConfigError, match="schedule"):
        made(schedule="plateau")
