"""Minority Reports: the decisions, the theorem by exhaustion with twins that must fail, a network, and the
command line."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
from certipatch import MaskSet, MinorityReports, SoundnessError, Window
from certipatch.certification.certify import certify
from certipatch.data.load import load_source
from certipatch.data.source import Images, as_float
from certipatch.defenses.minority_reports.algorithm import above, agreement, dissent
from certipatch.errors import ConfigError
from certipatch.models.runs import load_run, open_run
from certipatch.records.manifest import read_manifest
from certipatch.records.read import read_records
from certipatch.records.schema import DetectionRecord
from certipatch.report.detection import at_threshold
from certipatch.runtime.devices import make_fabric
from certipatch.verify.check import verify
from certipatch.verify.findings import Given
from inputs import typed, write_manifest
from networks import SIZE, Views, keeps_of, mask_set, network, pictures
from tampering import findings, forge, lines_of
from worlds import LABELS, SHAPES, TWICE, WORLDS, World, wary_classifier

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIDENCES = (0.3, 0.5, 0.7, 0.9)
THRESHOLDS = (0.0, 0.3, 0.5, 0.9, 1.0)  # on and between confidences


def test_decisions_equal_the_oracle():
    rng, seen = np.random.default_rng(0), Counter()
    for _ in range(3000):
        n, vanilla, true = int(rng.integers(1, 6)), int(rng.integers(2)), int(rng.integers(2))
        labels = np.where(rng.random(n) < rng.choice([0.5, 1.0]), true, rng.integers(0, 3, n)).tolist()
        confidences = rng.choice(CONFIDENCES, n).tolist()
        views = list(zip(labels, confidences, strict=True))
        for threshold in THRESHOLDS:
            alarm = above(dissent(vanilla, labels, confidences), threshold)
            certified = above(agreement(true, labels, confidences), threshold)
            assert alarm is oracle.alarm(vanilla, views, threshold)
            assert certified is oracle.detection_certified(true, views, threshold)
            seen[alarm, certified] += 1
    assert min(seen[alarm, certified] for alarm in (False, True) for certified in (False, True)) >= 500


def random_detector(world: World, seed: int):
    """As random_classifier there, with a random confidence for each answer: (labels, confidences) of
    views."""
    rng = np.random.default_rng(seed)
    pixels = world.image[0] * world.image[1]
    looked_at = rng.choice(pixels, size=(pixels, 1, 1, 2)[seed % 4], replace=False)
    right, values = rng.choice([0.6, 0.8, 0.95]), (world.values + 1) ** len(looked_at)
    labels = rng.choice(LABELS, p=[right, *[(1 - right) / 2] * 2], size=values)
    confidences = rng.choice(CONFIDENCES, size=values, p=rng.dirichlet(np.ones(len(CONFIDENCES))))

    def look(views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = views[:, looked_at] @ (world.values + 1) ** np.arange(len(looked_at))
        return labels[at], confidences[at]

    return look


def exhaust(world: World, masks: MaskSet, look, threshold: float, certify=above, alarm=above) -> Counter:
    """Attack every image in every way. Broken: a certified image gets another label than the true one, and no
    alarm."""
    images = world.images
    keeps = [
        oracle.keep_of(world.image, [(w.top, w.left, w.height, w.width) for w in mask]).ravel()
        for mask in masks.windows
    ]
    vanilla, _ = look(images)
    labels, confidences = (
        np.stack(found, axis=1)
        for found in zip(*(look(np.where(k, images, world.fill)) for k in keeps), strict=True)
    )
    rows = list(zip(vanilla.tolist(), labels.tolist(), confidences.tolist(), strict=True))
    alarms = np.array([alarm(dissent(f, row, confident), threshold) for f, row, confident in rows])
    certificates = np.array(
        [
            [certify(agreement(y, row, confident), threshold) for y in range(LABELS)]
            for _, row, confident in rows
        ],
        dtype=bool,
    )
    certified = certificates.any(axis=1)
    truth = np.where(certified, certificates.argmax(axis=1), vanilla)
    counts = Counter(certified=int(certified.sum()))
    for pixels, content in world.attacks():
        attacked = images.copy()
        attacked[:, pixels] = content
        at = world.number(attacked)
        wrong = vanilla[at] != truth
        counts["broken"] += int((wrong & ~alarms[at] & certified).sum())
        counts["detected"] += int((wrong & alarms[at] & certified).sum())
        counts["others broken"] += int((wrong & ~alarms[at] & ~certified).sum())
    return counts


@pytest.mark.parametrize("world", WORLDS + SHAPES + TWICE, ids=str)
def test_no_attack_on_a_certified_image_goes_undetected(world: World):
    counts: Counter = Counter()
    for seed in range(12):
        counts.update(exhaust(world, world.masks, random_detector(world, seed), CONFIDENCES[seed % 3]))
    assert counts["broken"] == 0
    assert min(counts["certified"], counts["detected"], counts["others broken"]) >= 50


def some_attack_goes_undetected(
    world: World, masks: MaskSet, threshold: float, seeds: int = 300, **twin: object
) -> bool:
    return any(
        exhaust(world, masks, random_detector(world, seed), threshold, **twin)["broken"]
        for seed in range(seeds)
    )


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_twin_with_a_mask_less(world: World):
    masks = world.masks
    for i in range(len(masks)):
        fewer = replace(masks, windows=masks.windows[:i] + masks.windows[i + 1 :], grid=None)
        assert some_attack_goes_undetected(world, fewer, 0.3), f"without mask {i}"


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_twin_with_a_larger_patch(world: World):
    masks, (height, width) = world.masks, world.patch
    wider = next(
        (height, w) for w in range(width + 1, world.image[1] + 1) if masks.uncovered_patch((height, w))
    )
    assert some_attack_goes_undetected(replace(world, patch=wider), masks, 0.3)


@pytest.mark.parametrize("world", SHAPES + TWICE, ids=str)
def test_twin_with_the_masks_for_less(world: World):
    """Masks for one of the shapes, or for one patch, promise nothing about the other, or about two."""
    less = (
        [replace(world, patches=1)]
        if world.patches == 2
        else [replace(world, patch=one, others=()) for one in (world.patch, *world.others)]
    )
    holes = [
        (masks, hole)
        for masks in (one.masks for one in less)
        if (hole := replace(masks, **world.masks.threat).uncovered_patches())
    ]
    assert holes
    for masks, hole in holes:
        wary = wary_classifier(world, hole)
        assert (
            exhaust(world, masks, lambda views, wary=wary: (wary(views), np.full(len(views), 0.9)), 0.3)[
                "broken"
            ]
            > 0
        )


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_twin_that_certifies_equality(world: World):
    """A certificate at a confidence of exactly tau is false while the alarm needs more; with an alarm there
    as well it is true."""

    def at_least(confidence: float | None, threshold: float) -> bool:
        return confidence is not None and confidence >= threshold

    assert some_attack_goes_undetected(world, world.masks, 0.5, certify=at_least)
    assert not some_attack_goes_undetected(world, world.masks, 0.5, seeds=8, certify=at_least, alarm=at_least)


@torch.no_grad()
def naive(seed: int) -> list[list[tuple[int, float]]]:
    """(label, confidence) of the unmasked view of each image and then of each mask's, one at a time."""
    model, everything = network(seed), torch.ones(SIZE, dtype=torch.bool)
    found = []
    for image in pictures(seed):
        logits = [
            model(torch.where(keep, image, 0.5)[None])[0].float().double()
            for keep in (everything, *keeps_of(3))
        ]
        found.append([(int(one.argmax()), float(one.exp().max() / one.exp().sum())) for one in logits])
    return found


@pytest.mark.parametrize(("seed", "batch_size"), [(3, 1), (4, 7), (5, 64)])
def test_equals_one_view_at_a_time(seed: int, batch_size: int):
    model, images = network(seed), pictures(seed)
    found, views = naive(seed), Views(model)
    labels = torch.tensor(
        [masked[a % 3][0] if a % 2 else vanilla for a, ((vanilla, _), *masked) in enumerate(found)]
    )
    detector = MinorityReports(model, mask_set(3), threshold=0.3, batch_size=batch_size)
    views.forget()
    detections = detector.certify(images, labels)
    assert views.seen == len(images) * 10 == sum(one.passes for one in detections), "K+1 passes an image"
    assert max(views.batches) <= batch_size
    for one, label, ((vanilla, _), *masked) in zip(detections, labels.tolist(), found, strict=True):
        against = [confidence for answer, confidence in masked if answer != vanilla]
        together = (
            min(confidence for _, confidence in masked)
            if {answer for answer, _ in masked} == {label}
            else None
        )
        assert (one.label, one.vanilla_label) == (label, vanilla)
        assert one.dissent == (pytest.approx(max(against), abs=1e-6) if against else None)
        assert one.agreement == (together if together is None else pytest.approx(together, abs=1e-6))
        assert one.alarm is oracle.alarm(vanilla, masked, 0.3)
        assert one.certified is oracle.detection_certified(label, masked, 0.3)
    answers, alarms = detector.predict(images)
    assert (answers.dtype, alarms.dtype) == (torch.int64, torch.bool)
    assert answers.tolist() == [one.vanilla_label for one in detections]
    assert alarms.tolist() == [one.alarm for one in detections]
    assert all(one.certified is one.agreement is None for one in detector.examine(images))


def test_every_outcome_occurs():
    found = [row for seed in (3, 4, 5) for row in naive(seed)]
    outcomes = Counter(
        (oracle.alarm(v, m, 0.3), oracle.detection_certified(v, m, 0.3)) for (v, _), *m in found
    )
    assert min(outcomes[False, False], outcomes[False, True], outcomes[True, False]) >= 2


def test_equality_raises_no_alarm_and_certifies_nothing():
    """Exactly at the confidence, and at the next smaller float."""
    model, images, rows = network(4), pictures(4), naive(4)
    labels = torch.tensor([vanilla for (vanilla, _), *_ in rows])
    batch = {"batch_size": 64}
    tried = Counter()
    for a, one in enumerate(
        MinorityReports(model, mask_set(3), threshold=0, **batch).certify(images, labels)
    ):
        for name, outcome in (("agreement", "certified"), ("dissent", "alarm")):
            confidence = getattr(one, name)
            if confidence is None:
                continue
            for threshold, expected in ((confidence, False), (float(np.nextafter(confidence, 0)), True)):
                again = MinorityReports(model, mask_set(3), threshold=threshold, **batch).certify(
                    images, labels
                )[a]
                assert getattr(again, outcome) is expected
                tried[outcome] += 1
    assert min(tried["certified"], tried["alarm"]) >= 2


def test_confidences_near_one_are_told_apart():
    """In float32 both would be 1, and at no threshold could they be certified apart."""

    class Sure(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.stack([20 + 5 * images.mean((1, 2, 3)), images.new_zeros(len(images))], dim=1)

    one, other = MinorityReports(Sure().eval(), mask_set(3), threshold=0).certify(
        torch.stack([torch.zeros(3, *SIZE), torch.ones(3, *SIZE)]), torch.zeros(2, dtype=torch.int64)
    )
    assert one.agreement < other.agreement < 1


def test_a_premise_that_fails_is_refused():
    model, images = network(3), pictures(3)
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="expected a confidence from 0 to 1"):
            MinorityReports(model, mask_set(3), threshold=threshold)
    hole = MaskSet(SIZE, (3, 3), 3, ((Window(0, 0, 6, 6),),))
    with pytest.raises(SoundnessError, match="that no mask covers"):
        MinorityReports(model, hole, threshold=0.5)
    detector = MinorityReports(model, mask_set(3), threshold=0.5)
    with pytest.raises(SoundnessError, match="expected float values"):
        detector.predict(images * 3)
    with pytest.raises(SoundnessError, match="labels: expected"):
        detector.certify(images, torch.zeros(2))
    model[1].weight.data[0] = float("nan")
    with pytest.raises(SoundnessError, match="finite logits"):
        detector.predict(images)
    model.train()
    with pytest.raises(SoundnessError, match="evaluation mode"):
        detector.predict(images)


def test_compiled_and_refused_when_its_weights_change(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda module, **_options: module)
    model, images = network(4), pictures(4)
    compiled = MinorityReports(model, mask_set(3), threshold=0.3, batch_size=7, compile=True)
    plain = MinorityReports(model, mask_set(3), threshold=0.3, batch_size=64)
    assert compiled.network.compiled
    for one, other in zip(compiled.predict(images), plain.predict(images), strict=True):
        assert one.equal(other)
    with torch.no_grad():
        model[1].bias += 1
    with pytest.raises(SoundnessError, match="as it was compiled"):
        compiled.predict(images)


def test_certified_detection_holds_under_attack():
    """The theorem on a network: right or an alarm, under patches at every place; some do fool the undefended
    model."""
    model, images = network(4), pictures(4)
    labels = torch.tensor([vanilla for (vanilla, _), *_ in naive(4)])
    threshold = 0.3
    detector = MinorityReports(model, mask_set(3), threshold=threshold)
    certified = [a for a, one in enumerate(detector.certify(images, labels)) if one.certified]
    assert certified
    generator, attacked, truth = torch.Generator().manual_seed(0), [], []
    for a in certified:
        for top in range(SIZE[0] - 2):
            for left in range(SIZE[1] - 2):
                image = images[a].clone()
                image[:, top : top + 3, left : left + 3] = torch.randint(2, (3, 3, 3), generator=generator)
                attacked.append(image)
                truth.append(int(labels[a]))
    answers, alarms = detector.predict(torch.stack(attacked))
    wrong = answers != torch.tensor(truth)
    assert wrong.any()
    assert alarms[wrong].all()


@pytest.fixture
def options(trained: Path, photos: Path) -> list[object]:
    return typed("detect", model=trained, data=photos, limit=9, patch=24, masks_per_axis=3)


@pytest.fixture(scope="module")
def given(
    trained: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Given, object]:
    model, source = open_run(trained), load_source(str(photos))
    folder = tmp_path_factory.mktemp("detection") / "d"
    masks = MaskSet.covering(image_size=model.spec.image_size, patch_size=(24, 24), masks_per_axis=3)
    fabric = make_fabric(device="cpu")
    certify(model, source.first(9), masks, folder, fabric=fabric, defense="minority-reports")
    records = read_records(folder)
    assert {(one.agreement is None, one.dissent is None) for one in records} >= {(False, True), (True, False)}
    return folder, model, source


def test_detect_report_and_sweep(cli, options, given, trained: Path, photos: Path, tmp_path: Path):
    done = cli(*options, "--out", tmp_path / "d")
    assert done.code == 0, done.err
    assert "certified" in done.out
    lines = (tmp_path / "d" / "records.jsonl").read_bytes()
    assert lines == (given[0] / "records.jsonl").read_bytes()
    assert read_manifest(tmp_path / "d").kind == "detect"

    records = read_records(tmp_path / "d")
    assert len(records) == 9
    assert all(one.passes == 10 for one in records)
    exactly = next(one.agreement for one in records if one.agreement is not None)
    tau = [0.0, 0.5, exactly, 1.0]
    report = cli("report", tmp_path / "d", thresholds=",".join(map(repr, tau)), json=True)
    (shown,) = json.loads(report.out)
    assert (shown["kind"], shown["complete"], shown["passes"]) == ("detect", True, 90)
    assert [one["threshold"] for one in shown["thresholds"]] == tau
    for one, threshold in zip(shown["thresholds"], tau, strict=True):
        alarms = [r.dissent is not None and r.dissent > threshold for r in records]
        right = [r.vanilla_label == r.label and not alarm for r, alarm in zip(records, alarms, strict=True)]
        certified = [r.agreement is not None and r.agreement > threshold for r in records]
        for name, counted in (
            ("clean_accuracy", right),
            ("false_alarms", alarms),
            ("certified_detection_accuracy", certified),
        ):
            assert (one[name]["count"], one[name]["images"]) == (sum(counted), 9)
            assert len(one[name]["interval_95"]) == 2
    at = [one["certified_detection_accuracy"]["count"] for one in shown["thresholds"]]
    assert at == sorted(at, reverse=True)
    assert at[-1] == 0 < at[0]
    assert not any(key in json.dumps(shown) for key in ("robust",)), "a detector is not a robust classifier"

    model = load_run(trained)[1].eval()
    spec = given[1].spec
    masks = MaskSet.covering(image_size=spec.image_size, patch_size=(24, 24), masks_per_axis=3)
    images = as_float(torch.stack([Images(given[2].first(9), spec)[a].pixels for a in range(9)]))
    labels, alarms = MinorityReports(model, masks, threshold=0.5).predict(images)
    assert labels.tolist() == [one.vanilla_label for one in records]
    assert alarms.tolist() == [above(one.dissent, 0.5) for one in records], (
        "what is deployed is what was certified"
    )

    refused = cli("report", tmp_path / "d", "--min-margin", 0.5)
    assert (refused.code, "expected a folder that certify wrote" in refused.err) == (2, True), refused.err
    cli("certify", model=trained, data=photos, patch=24, masks_per_axis=2, limit=3, out=tmp_path / "c")
    both = cli("report", tmp_path / "d", tmp_path / "c")
    assert both.code == 0
    assert "certified robust" in both.out
    assert "false alarms" in " ".join(both.out.split())
    of_both = json.loads(cli("report", tmp_path / "c", tmp_path / "d", "--json").out)
    assert ["kind" in one for one in of_both] == [False, True]


def test_resume_and_other_experiments(
    cli, options, given, trained: Path, photos: Path, tmp_path: Path, blocks_of: Callable[[int], None]
):
    """A kill in mid-line resumes to the same bytes; another command or patch is another experiment."""
    blocks_of(5)
    cli(*options, "--out", tmp_path / "whole")
    out = tmp_path / "d"
    shutil.copytree(tmp_path / "whole", out)
    manifest, lines = json.loads((out / "manifest.json").read_text()), (out / "records.jsonl").read_bytes()
    write_manifest(out / "manifest.json", manifest | {"finished": None})
    (out / "records.jsonl").write_bytes(b"".join(lines.splitlines(keepends=True)[:7]) + b'{"index": 8, "na')
    (shown,) = json.loads(cli("report", out, "--json").out)
    assert (shown["complete"], shown["vanilla_accuracy"]["images"]) == (False, 7)
    done = cli(*options, "--out", out, "--resume")
    assert done.code == 0, done.err
    assert (out / "records.jsonl").read_bytes() == lines
    same = typed(model=trained, data=photos, limit=9, masks_per_axis=3, out=out, resume=True)
    for command, patch in (("certify", 24), ("detect", 20)):
        refused = cli(command, *same, patch=patch)
        assert (refused.code, "holds another experiment" in refused.err) == (2, True), refused.err


def test_bad_input_is_one_line(cli, options, given, trained: Path, photos: Path, tmp_path: Path):
    folder, image = given[0], photos / "red" / "0.png"
    for line, words in [
        (
            [*options, *typed(out=tmp_path / "x", thresholds="0,2")],
            "threshold 2: expected a confidence from 0",
        ),
        (["report", folder, "--thresholds", "high"], "thresholds 'high': expected"),
        (["report", folder, "--thresholds", "nan"], "expected a confidence from 0 to 1"),
        (typed("predict", image, model=trained, certified=folder), "certify, found those of detect"),
        (["report", trained], "expected records of certify"),
    ]:
        refused = cli(*line)
        assert (refused.code, refused.out, len(refused.err.splitlines())) == (2, "", 1)
        assert words in refused.err
    assert not (tmp_path / "x").exists()
    cli("certify", model=trained, data=photos, patch=24, masks_per_axis=2, limit=3, out=tmp_path / "c")
    refused = cli("report", tmp_path / "c", "--thresholds", "0.5")
    assert (refused.code, "expected a folder that detect wrote" in refused.err) == (2, True)


def test_unreadable_images_count_as_wrong(cli, trained: Path, photos: Path, tmp_path: Path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "red" / "0.png").write_bytes(b"no image")
    given = typed(model=trained, data=tmp_path / "photos")
    done = cli("detect", *given, patch="20,24", masks_per_axis=2, thresholds=0, out=tmp_path / "d")
    assert done.code == 0, done.err
    assert "1 unreadable images count as wrong" in done.out
    for name in ("20x20-k2", "24x24-k2"):
        (broken,) = (one for one in read_records(tmp_path / "d" / name) if one.error)
        assert broken.agreement is broken.dissent is broken.vanilla_label is None
        shares = at_threshold([broken], 0).shares
        assert {name: share.count for name, share in shares.items()} == {
            "clean_accuracy": 0,
            "false_alarms": 0,
            "certified_detection_accuracy": 0,
        }
    assert len(json.loads(cli("report", tmp_path / "d", "--json").out)) == 2
    assert cli("verify", tmp_path / "d", *given, "--all").code == 0


def test_an_untouched_folder(cli, given, trained: Path, photos: Path):
    found = verify(given[0], model=given[1], source=given[2], sample=None, device="cpu")
    assert found.findings == []
    assert (found.images, found.recomputed, found.undecided) == (9, 9, 0)
    assert found.certified == sum(above(one.agreement, 0) for one in read_records(given[0]))
    done = cli("verify", given[0], model=trained, data=photos)
    assert done.code == 0
    assert "for detection at threshold 0" in done.out
    assert "looked again at 9" in done.out


def say(**fields: object) -> Callable[[dict], dict]:
    """Entries that stand in the place of what was found."""
    return lambda line: fields


def invented(line: dict) -> dict:
    return {"agreement": 0.99, "dissent": None, "vanilla_label": line["label"]}


def of_another_class(line: dict) -> dict:
    return {"vanilla_label": (line["label"] + 1) % 3, "dissent": 0.9999999}


AGREED, DISSENTING = "agreement", "dissent"
UNREAD = {"error": "x", "passes": 0, "pixels": None, "vanilla_label": None, "agreement": None}
TAMPERED = {
    "agreement raised": (AGREED, lambda line: {"agreement": min(1.0, line["agreement"] + 0.02)}, "agreement"),
    "agreement invented": (DISSENTING, invented, "agreement 0.99, found None"),
    "dissent hidden": (DISSENTING, say(dissent=None), "dissent"),
    "dissent lowered": (DISSENTING, lambda line: {"dissent": line["dissent"] / 2}, "dissent"),
    "agreement of one": (AGREED, say(agreement=1.5), "is not a confidence"),
    "agreement as a word": (AGREED, say(agreement="0.9"), "is not a confidence"),
    "agreement with dissent": (AGREED, say(dissent=0.9), "and yet some dissent"),
    "vanilla label changed": (AGREED, of_another_class, "vanilla_label"),
    "vanilla label of no class": (AGREED, say(vanilla_label=3), "is not a class"),
    "passes": (AGREED, say(passes=9), "passes 9: expected 10"),
    "label changed": (AGREED, lambda line: {"label": (line["label"] + 1) % 3}, "fingerprint"),
    "pixels": (AGREED, say(pixels="0" * 64), "its pixels are not those"),
    "said to be unreadable": (AGREED, say(**UNREAD), "can be read, the record says 'x'"),
    "field added": (AGREED, say(certified=True), "other or missing ones: certified"),
}


@pytest.mark.parametrize(("which", "change", "words"), TAMPERED.values(), ids=TAMPERED)
def test_tampered_records(given, tmp_path: Path, which: str, change, words: str):
    """It is found although the forger has mended the hash."""
    shutil.copytree(given[0], tmp_path / "d")
    lines = lines_of(given[0])
    right = (line for line in lines if line["vanilla_label"] == line["label"])
    line = next(line for line in right if line[which] is not None)
    line |= change(line)
    forge(tmp_path / "d", lines)
    found = findings(tmp_path / "d", given)
    assert any(words in line for line in found), found


def test_tampered_manifests(given, tmp_path: Path):
    """A folder that is called a certification of answers, or has a mask less, is found."""
    for name, change, words in [
        (
            "kind",
            lambda m: m.update(kind="certify"),
            "other entries than those of a certification: exhaustive",
        ),
        ("inference", lambda m: m["experiment"].update(inference="challenger"), "other entries"),
        ("mask", lambda m: m["experiment"]["masks"]["windows"].pop(), "is covered by no mask"),
    ]:
        shutil.copytree(given[0], tmp_path / name)
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        change(manifest)
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
        assert any(words in line for line in findings(tmp_path / name, given, sample=0))


@pytest.mark.parametrize(
    ("vanilla", "agreed", "against", "possible"),
    [
        (0, 0.9, None, True),
        (0, None, 0.9, True),
        (1, 0.5, 0.9, True),
        (1, None, None, True),
        (1, None, 0.9, True),
        (0, None, None, False),
        (0, 0.9, 0.9, False),
        (1, 0.9, None, False),
        (1, 0.9, 0.5, False),
        (None, None, 0.5, False),
        (0, 1.1, None, False),
    ],
)
def test_what_a_record_cannot_say(
    vanilla: int | None, agreed: float | None, against: float | None, possible: bool
):
    fields = {"index": 0, "name": "x", "label": 0, "pixels": "", "vanilla_label": vanilla, "passes": 10}
    try:
        DetectionRecord(**fields, agreement=agreed, dissent=against)
    except ValueError:
        assert not possible
    else:
        assert possible
