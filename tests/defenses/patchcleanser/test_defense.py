"""PatchCleanser around a network: the same answers as one view at a time, and a refusal where a premise
fails."""

import dataclasses
import math
from collections import Counter

import pytest
import torch
import torchvision
from torch import nn

import oracle
from certipatch import CertiPatchError, MaskSet, PatchCleanser, SoundnessError, Window
from certipatch.errors import ConfigError
from certipatch.models.small import Normalize
from networks import FILL, SIZE, Views, keeps_of, mask_set, naive, network, pictures, true_labels

SEEDS = (3, 4, 5)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("exhaustive", [False, True], ids=["", "exhaustive"])
@pytest.mark.parametrize(
    ("seed", "k", "batch_size"), [*((s, 3, b) for s in SEEDS for b in (1, 7, 64)), (3, 6, 64), (4, 6, 7)]
)
def test_certify_equals_one_view_at_a_time(seed, k, batch_size, exhaustive):
    model, images, labels = network(seed), pictures(seed, k), true_labels(seed, k)
    views = Views(model)
    defense = PatchCleanser(model, mask_set(k), batch_size=batch_size, exhaustive=exhaustive)
    views.forget()
    verdicts = defense.certify(images, labels)

    assert views.seen == sum(verdict.passes for verdict in verdicts), (
        "passes are what the model was asked for"
    )
    assert max(views.batches) <= batch_size
    for verdict, label, (vanilla, table, smallest) in zip(
        verdicts, labels.tolist(), naive(seed, k), strict=True
    ):
        assert verdict.label == label
        assert verdict.vanilla_label == vanilla
        assert (verdict.defended_label, verdict.case) == oracle.double_masking(table)
        assert verdict.certified is oracle.certified(table, label)
        if verdict.certified:
            assert verdict.failing_pair is verdict.failing_label is None
        else:
            i, j = verdict.failing_pair
            assert i <= j
            assert verdict.failing_label == table[i][j] != label
            if any(table[a][a] != label for a in range(len(table))):
                assert i == j, "a wrong one-mask view is named before others"
        pairs = len(table) * (len(table) + 1) // 2
        assert verdict.passes == 1 + pairs if exhaustive or verdict.certified else verdict.passes <= 1 + pairs
        if exhaustive or verdict.certified:
            assert verdict.margin == pytest.approx(smallest, abs=1e-6)
        else:
            assert verdict.margin >= smallest - 1e-6
    assert defense.predict(images).tolist() == [verdict.defended_label for verdict in verdicts]


def test_every_outcome_occurs():
    """The comparison above would mean little if all images were of one kind."""
    tables = [table for seed in SEEDS for _, table, _ in naive(seed, 3)]
    cases = Counter(oracle.double_masking(table)[1] for table in tables)
    assert min(cases[case] for case in ("agreed", "disagreer", "majority")) >= 1
    labels = [oracle.double_masking(table)[0] for table in tables]
    assert {oracle.certified(table, label) for table, label in zip(tables, labels, strict=True)} == {
        True,
        False,
    }
    assert len(set(labels)) >= 3


def test_the_schedule_changes_only_the_cost():
    """Any batch size, exhaustive or not, names the same first wrong pair; the shorter way is shorter."""
    model, images, labels = network(4), pictures(4), true_labels(4, 3)
    runs = [
        PatchCleanser(model, mask_set(3), batch_size=batch_size, exhaustive=exhaustive).certify(
            images, labels
        )
        for batch_size in (1, 7, 64)
        for exhaustive in (False, True)
    ]
    for run in runs:
        assert [verdict.failing_pair for verdict in run] == [verdict.failing_pair for verdict in runs[0]]
    assert sum(verdict.passes for verdict in runs[0]) < 0.8 * sum(verdict.passes for verdict in runs[1])


@pytest.mark.parametrize(("k", "masked_views"), [(3, 45), (6, 666)])
def test_pass_counts(k, masked_views):
    """45 and 666 predictions an image, counted on the model; plus one of the image itself."""
    model = network(0)
    views = Views(model)
    defense = PatchCleanser(model, mask_set(k), exhaustive=True)
    views.forget()
    verdicts = defense.certify(pictures(0)[:2], torch.zeros(2, dtype=torch.int64))
    assert views.seen == 2 * (masked_views + 1)
    assert [verdict.passes for verdict in verdicts] == [masked_views + 1] * 2


def test_prediction_stops_when_all_agree():
    """Without labels only Algorithm 1 is run: one-mask views that agree need no second round."""
    model, images = network(4), pictures(4)
    agreed = [oracle.double_masking(table)[1] == "agreed" for _, table, _ in naive(4, 3)]
    views = Views(model)
    defense = PatchCleanser(model, mask_set(3))
    views.forget()
    defense.predict(images[agreed])
    assert views.seen == sum(agreed) * (9 + 1)


def test_no_images():
    defense = PatchCleanser(network(0), mask_set(3))
    assert defense.predict(torch.empty(0, 3, *SIZE)).tolist() == []
    assert defense.certify(torch.empty(0, 3, *SIZE), torch.empty(0, dtype=torch.int64)) == []


def test_certified_answers_hold_under_attack():
    """The theorem on a network: ``predict`` answers the certified label under patches at every place."""
    model, images, labels = network(4), pictures(4), true_labels(4, 3)
    defense = PatchCleanser(model, mask_set(3))
    certified = [a for a, verdict in enumerate(defense.certify(images, labels)) if verdict.certified]
    assert certified
    generator = torch.Generator().manual_seed(0)
    attacked, truth = [], []
    for a in certified[:2]:
        for top in range(SIZE[0] - 2):
            for left in range(SIZE[1] - 2):
                image = images[a].clone()
                image[:, top : top + 3, left : left + 3] = torch.randint(2, (3, 3, 3), generator=generator)
                attacked.append(image)
                truth.append(int(labels[a]))
    assert defense.predict(torch.stack(attacked)).tolist() == truth


def test_views_are_the_masked_images():
    """Exactly x, x.m_i and x.m_i.m_j, once each, with every hidden pixel filled and every other as it was."""
    colour = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    model, image, keeps = network(0), pictures(0)[0], keeps_of(3)
    views = Views(model, keep=True)
    defense = PatchCleanser(model, mask_set(3), fill=colour, exhaustive=True)
    views.forget()
    defense.certify(image[None], torch.tensor([0]))
    expected = [image]
    for i, a in enumerate(keeps):
        expected += [torch.where(a & b, image, colour.float().double().view(3, 1, 1)) for b in keeps[i:]]
    assert Counter(view.numpy().tobytes() for view in views.images) == Counter(
        view.numpy().tobytes() for view in expected
    )


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("normalize", "options", "colour"),
    [
        ([], {}, (0.5, 0.5, 0.5)),
        ([Normalize(MEAN, STD)], {}, MEAN),
        ([torchvision.transforms.Normalize(MEAN, STD)], {}, MEAN),
        ([Normalize(MEAN, STD)], {"fill": 0.25}, (0.25, 0.25, 0.25)),
        ([Normalize(MEAN, STD)], {"fill": 0}, (0, 0, 0)),
        ([Normalize(MEAN, STD)], {"fill": (0.1, 0.2, 0.3)}, (0.1, 0.2, 0.3)),
        ([Normalize(MEAN, STD)], {"fill": torch.tensor([1.0, 0.0, 0.5])}, (1, 0, 0.5)),
    ],
    ids=["default", "ours", "torchvision", "number", "zero", "colour", "tensor"],
)
def test_fill(normalize, options, colour):
    """Masked pixels have the colour asked for, else the model's mean (0 after normalisation), else grey."""
    model = nn.Sequential(*normalize, *network(0).float()).eval()
    views = Views(model, keep=True)
    defense = PatchCleanser(model, mask_set(3), **options)
    views.forget()
    defense.predict(torch.ones(1, 3, *SIZE))
    views = torch.stack(views.images)
    assert (views[0] == 1).all(), "the first view is the image itself"
    one_mask = views[1:10]
    expected = torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1).expand_as(one_mask)
    hidden = ~torch.stack(keeps_of(3))[:, None].expand_as(one_mask)
    assert torch.equal(one_mask[hidden], expected[hidden])
    assert (one_mask[~hidden] == 1).all()


def refused(defense, images, labels=None, *, match):
    """Both entrances refuse."""
    labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
    for call in (lambda: defense.predict(images), lambda: defense.certify(images, labels)):
        with pytest.raises(SoundnessError, match=match) as error:
            call()
        assert "\n" not in str(error.value)


GOOD = torch.full((2, 3, *SIZE), 0.5)


def test_training_mode_is_refused():
    """Also of a single layer: one Dropout or BatchNorm left in training mode makes the predictions random."""
    model = nn.Sequential(network(0).float(), nn.Dropout(0.5))
    defense = PatchCleanser(model, mask_set(3))
    refused(defense, GOOD, match="training mode")
    model.eval()
    model[1].train()
    refused(defense, GOOD, match="training mode")
    model.eval()
    defense.predict(GOOD)


@pytest.mark.parametrize(
    "shape", [(2, 3, 12, 13), (2, 3, 24, 24), (2, 1, 12, 12), (3, 12, 12), (2, 12, 12, 3)]
)
def test_another_image_size_is_refused(shape):
    refused(PatchCleanser(network(0).float(), mask_set(3)), torch.full(shape, 0.5), match="expected")


@pytest.mark.parametrize("value", [-1e-6, 1 + 1e-6, 255.0, math.nan, math.inf, -math.inf])
def test_values_outside_the_unit_interval_are_refused(value):
    images = GOOD.clone()
    images[1, 2, 11, 11] = value
    refused(PatchCleanser(network(0).float(), mask_set(3)), images, match="values")


def test_integer_images_are_refused():
    """0 and 1 would pass for a unit interval, but bytes are not floats."""
    refused(
        PatchCleanser(network(0).float(), mask_set(3)),
        torch.ones(2, 3, *SIZE, dtype=torch.uint8),
        match="float",
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value):
    model = network(0).float()
    model[4].bias.data[2] = value
    refused(PatchCleanser(model, mask_set(3)), GOOD, match="finite")


def test_logits_beyond_float32_are_refused():
    """Rounded to infinity, they would all be the first class."""
    model = network(0)
    model[4].bias.data[2:] = torch.tensor([1e300, 2e300], dtype=torch.float64)
    refused(PatchCleanser(model, mask_set(3)), GOOD.double(), match="finite")
    model[4].bias.data[2:] = torch.tensor(
        [3e38, -3e38], dtype=torch.float64
    )  # whose margin would be infinite, and no JSON
    refused(PatchCleanser(model, mask_set(3)), GOOD.double(), match="finite")


class Rarely(nn.Module):
    """Logits that fail only where two masks hide about half of a white image."""

    def forward(self, images):
        visible = (images == 1).float().mean((1, 2, 3))
        return torch.stack([visible, torch.where(visible < 0.52, math.nan, -1.0)], dim=1)


def test_a_nan_in_a_single_view_is_refused():
    """A NaN must surface wherever it is, not only in the first view."""
    defense = PatchCleanser(Rarely().eval(), mask_set(3))
    white = torch.ones(1, 3, *SIZE)
    assert defense.predict(white).tolist() == [0]
    with pytest.raises(SoundnessError, match="finite"):
        defense.certify(white, torch.tensor([0]))


@pytest.mark.parametrize(
    "output",
    [
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.mean((2, 3))[:, :1],
        lambda x: x,
        lambda x: x.mean((2, 3))[:1],
        lambda x: x.mean((2, 3)).repeat(2, 1),
        lambda x: x.mean(),
        lambda x: (x.mean((2, 3)),),
        lambda x: {"logits": x.mean((2, 3))},
        lambda x: None,
    ],
)
def test_outputs_that_are_no_logits_are_refused(output):
    class Model(nn.Module):
        def forward(self, images):
            return output(images)

    for fast in (False, True):
        with pytest.raises(SoundnessError, match="model output"):
            PatchCleanser(Model().eval(), mask_set(3), compile=fast, shared_prefix=fast)


@pytest.mark.parametrize(
    "labels", [torch.tensor([0]), torch.tensor([[0, 0]]), torch.tensor([0, -1]), torch.tensor(0)]
)
def test_labels_that_are_no_classes_are_refused(labels):
    """-1 above all: it is how the tables write "not known"."""
    with pytest.raises(SoundnessError, match="labels"):
        PatchCleanser(network(0).float(), mask_set(3)).certify(GOOD, labels)


def test_masks_that_do_not_cover_are_refused():
    masks = mask_set(3)
    for i in range(9):
        fewer = dataclasses.replace(masks, windows=masks.windows[:i] + masks.windows[i + 1 :], grid=None)
        with pytest.raises(SoundnessError, match="cover"):
            PatchCleanser(network(0), fewer)
    with pytest.raises(SoundnessError, match="cover"):
        PatchCleanser(network(0), dataclasses.replace(masks, patch_size=(5, 5)))


@pytest.mark.parametrize("patch", [(5, 5), (5, 1), (1, 5), (6, 6)])
def test_a_patch_larger_than_the_image_is_refused(patch):
    """It has no position, so "every position is covered" would hold of any masks, and certify them for
    smaller patches too."""
    with pytest.raises(CertiPatchError):
        PatchCleanser(network(0), MaskSet((4, 4), patch, 0, ((Window(0, 0, 1, 1),),)))


@pytest.mark.parametrize("fill", [-0.1, 1.1, math.nan, (0.5, 0.5, 2.0), (0.5, 0.5), (0.5, 0.5, 0.5, 0.5), ()])
def test_a_fill_that_is_no_colour_is_refused(fill):
    with pytest.raises(ConfigError, match="fill"):
        PatchCleanser(network(0), mask_set(3), fill=fill)


@pytest.mark.parametrize("batch_size", [-1, -5])
def test_a_negative_batch_size_is_refused(batch_size):
    """No view would be computed, and the verdicts read from memory never written."""
    with pytest.raises(ConfigError, match="batch"):
        PatchCleanser(network(0), mask_set(3), batch_size=batch_size)


def test_a_model_that_mixes_the_images_of_a_batch_is_refused():
    """Without running statistics BatchNorm normalises by its batch: what was certified in one batch is not
    what answers alone."""
    layers = [
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4, track_running_stats=False),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(3),
    ]
    model = torch.nn.Sequential(*layers).eval()
    images = torch.rand(2, 3, *mask_set(3).image_size)
    model(images)
    with pytest.raises(SoundnessError, match="BatchNorm"):
        PatchCleanser(model, mask_set(3)).predict(images)


def test_labels_that_are_no_integers_are_refused():
    """0.9 is not class 0."""
    images = torch.rand(1, 3, *mask_set(3).image_size)
    for labels in (torch.tensor([0.9]), [0], torch.tensor([-1]), torch.tensor([0, 1])):
        with pytest.raises(SoundnessError, match="labels"):
            PatchCleanser(network(0), mask_set(3)).certify(images, labels)


@pytest.mark.parametrize("room", [1, 3])
def test_images_make_room_for_each_other(monkeypatch, room):
    """Few at a time give the same as all at once, with and without labels."""
    model, images, labels = network(3), pictures(3, 3), true_labels(3, 3)
    whole = PatchCleanser(model, mask_set(3), fill=FILL)
    expected, answers = whole.certify(images, labels), whole.predict(images)
    monkeypatch.setattr(whole.network, "images_at_once", room)

    def settled(verdicts):
        return [(v.vanilla_label, v.defended_label, v.case, v.certified) for v in verdicts]

    assert settled(whole.certify(images, labels)) == settled(expected)
    assert whole.predict(images).tolist() == answers.tolist()
