"""The losses of training against restatements in loops, and a training with each from the command line."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from certipatch.errors import ConfigError, SoundnessError
from certipatch.models.bagnet import SmallBagNet
from certipatch.models.small import Normalize, small_ibp
from certipatch.training.config import TrainConfig, train_config
from certipatch.training.losses import PLACES, Interval, Objective, check_loss
from certipatch.views.intervals import bounds
from inputs import typed

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE, PATCH = (12, 11), (3, 2)
HALF = (0.5, 0.5, 0.5)


def config(loss):
    return TrainConfig(strategy="vanilla", patch_size=PATCH, masks_per_axis=2, loss=loss)


def bagnet():
    torch.manual_seed(0)
    return nn.Sequential(Normalize(HALF, HALF), SmallBagNet(4, width=4)).eval()


def ibp():
    torch.manual_seed(0)
    return nn.Sequential(Normalize(HALF, HALF), small_ibp(4, SIZE)).eval()


def batch(n=5):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(n, 3, *SIZE, generator=generator), torch.tensor([0, 3, 1, 2, 3])[:n]


def cells_reached():
    """For each place of the patch the cells (numbers) whose 5x5 pixels meet it, in loops."""
    cells = list(product(range(SIZE[0] - 4), range(SIZE[1] - 4)))
    for y, x in product(range(SIZE[0] - PATCH[0] + 1), range(SIZE[1] - PATCH[1] + 1)):
        yield [
            n
            for n, (top, left) in enumerate(cells)
            if top < y + PATCH[0] and y < top + 5 and left < x + PATCH[1] and x < left + 5
        ]


def cross_entropy(logits, label):
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])


@torch.no_grad()
def test_best_window_removed_takes_the_best_window_of_the_true_class_alone():
    model, (views, targets) = bagnet(), batch()
    logits, loss = Objective(model, config("best-window-removed"), SIZE)(views, targets, 0.5)
    expected, whole = [], []
    for z, y in zip(model[1].cells(model[0](views)).numpy(), targets.tolist(), strict=True):
        evidence = np.maximum(z, 0)
        mean = evidence.mean(axis=0)
        whole.append(mean.copy())
        mean[y] -= max(evidence[cells, y].sum() for cells in cells_reached()) / len(evidence)
        expected.append(cross_entropy(mean, y))
    assert np.allclose(logits.numpy(), whole, atol=1e-5)
    assert float(loss) == pytest.approx(np.mean(expected), abs=1e-5)


@torch.no_grad()
def test_region_margin_asks_for_twice_the_cells_of_a_patch_and_a_little_more():
    model, (views, targets) = bagnet(), batch()
    objective = Objective(model, config("region-margin"), SIZE)
    votes, loss = objective(views, targets, 0.5)
    cells = model[1].cells(model[0](views)).numpy()
    most = max(map(len, cells_reached()))
    margin = min(1.0, 2 * most / cells.shape[1] + 0.1)
    expected = []
    for z, y in zip(cells, targets.tolist(), strict=True):
        shares = (z > 0).mean(axis=0)
        expected.append(max(max(0.0, margin - (shares[y] - shares[c])) for c in range(4) if c != y))
    assert np.allclose(votes.numpy(), (cells > 0).mean(axis=1), atol=1e-6)
    assert float(loss) == pytest.approx(np.mean(expected), abs=1e-5)
    logits, first = objective(views, targets, 0.1)
    assert np.allclose(logits.numpy(), cells.mean(axis=1), atol=1e-5)
    assert float(first) == pytest.approx(float(nn.functional.cross_entropy(logits, targets)))


def test_votes_have_the_gradient_of_a_sigmoid():
    model, (views, targets) = bagnet(), batch()
    _, loss = Objective(model, config("region-margin"), SIZE)(views, targets, 1.0)
    loss.backward()
    assert float(model[1].fc.weight.grad.abs().sum()) > 0


@torch.no_grad()
def test_interval_is_the_worst_of_random_places():
    model, (views, targets) = ibp(), batch()
    objective = Objective(model, config("interval"), SIZE)
    torch.manual_seed(7)
    logits, loss = objective(views, targets, 1.0)
    torch.manual_seed(7)
    places = Interval(model, PATCH, SIZE)._places(len(views) * PLACES)
    assert places.flatten(1).sum(dim=1).unique().tolist() == [6]
    assert len(places.flatten(1).unique(dim=0)) > 50
    expected = []
    for i, (view, y) in enumerate(zip(views, targets, strict=True)):
        found = []
        for place in places[i * PLACES : (i + 1) * PLACES]:
            lower, upper = (torch.where(place, end, view)[None] for end in (0.0, 1.0))
            found.append(bounds(model, lower, upper, y[None])[0])
        expected.append(cross_entropy(-torch.stack(found).amin(dim=0).numpy(), int(y)))
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-4)
    assert torch.equal(logits, model(views))


@torch.no_grad()
def test_interval_begins_with_whole_images_and_contents_grow():
    model, (views, targets) = ibp(), batch()
    objective = Objective(model, config("interval"), SIZE)
    found = []
    for done in (0.0, 0.04, 0.0501, 0.2, 0.5, 0.65, 1.0):
        torch.manual_seed(0)
        found.append(float(objective(views, targets, done)[1]))
    plain = float(nn.functional.cross_entropy(model(views), targets))
    assert found[0] == found[1] == pytest.approx(plain)
    assert found[2] == pytest.approx(plain, rel=0.05)
    assert found[2:6] == sorted(found[2:6])
    assert found[2] < found[5]
    assert found[5] == pytest.approx(found[6])


def test_a_loss_for_another_network_is_refused():
    for loss in ("best-window-removed", "region-margin"):
        with pytest.raises(ConfigError, match=f"loss {loss}: model: expected a network with cells"):
            check_loss(ibp(), config(loss), SIZE)
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(80, 4)).eval()
    with pytest.raises(SoundnessError, match="loss interval: bounds: expected layers of Normalize"):
        check_loss(convolutions, config("interval"), SIZE)
    with pytest.raises(ConfigError, match="loss"):
        train_config(strategy="vanilla", patch_size=PATCH, masks_per_axis=2, loss="hinge")


def test_cross_entropy_has_one_name_in_manifests():
    assert config("cross-entropy").loss is None
    assert config("cross-entropy") == config(None)


@pytest.mark.parametrize(
    ("loss", "model"),
    [("best-window-removed", "small-bagnet"), ("region-margin", "small-bagnet"), ("interval", "ibp-small")],
)
def test_a_training_that_is_interrupted_ends_with_the_same_weights(
    cli, photos, tmp_path, monkeypatch, loss, model
):
    how = typed("train", model=model, data=photos, val_data=photos, strategy="vanilla", patch=5, epochs=2)
    how += typed(loss=loss, batch_size=8, lr=0.02, device="cpu")
    whole = cli(*how, out=tmp_path / "whole")
    assert whole.code == 0, whole.err
    from certipatch.training.counts import Unseen

    steps = []
    count = Unseen.add

    def killed(*args, **kwargs):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return count(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Unseen, "add", killed)
        assert cli(*how, out=tmp_path / "killed").code == 130
    assert cli(*how, "--resume", out=tmp_path / "killed").code == 0
    ended = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "killed")]
    assert ended[0]["finished"]["weights_sha256"] == ended[1]["finished"]["weights_sha256"]
    assert {one["experiment"]["train"]["loss"] for one in ended} == {loss}


def test_the_command_line_names_the_losses(cli, photos, tmp_path):
    how = typed("train", model="small-cnn", data=photos, val_data=photos, strategy="vanilla", patch=5)
    wrong = cli(*how, loss="hinge", out=tmp_path / "out")
    assert wrong.code == 2
    assert "loss" in wrong.err
    assert "hinge" in wrong.err
    odd = cli(*how, loss="region-margin", out=tmp_path / "out")
    assert odd.code == 2
    assert odd.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert "--loss" in cli("train", "--help").out
