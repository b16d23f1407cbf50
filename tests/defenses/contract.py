"""One suite that every certified defense passes: a defense is tested by a class of a few lines.

    class TestMyDefense(DefenseContract):
        method = "my-defense"

        def build(self, model, masks, **options): return MyDefense(model, masks, **options)
        def twin(self, model, masks): return ... a defense with a premise or a part of the proof taken away

The theorem is tried by exhaustion on tiny worlds, around a real ``nn.Module``: every image, every place and
content of a patch. Its twin must fail. Then real records are written, resumed, tampered with and checked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from certipatch.certification.blocks import look
from certipatch.certification.certify import certify
from certipatch.certification.restore import restore
from certipatch.data.load import load_source
from certipatch.data.source import Images, as_float
from certipatch.defenses.contract import CertifiedDefense, Verdict
from certipatch.geometry.masks import MaskSet
from certipatch.models.runs import Opened, open_run
from certipatch.records.read import read_folder
from certipatch.runtime.devices import make_fabric
from certipatch.verify.check import verify
from tampering import forge, lines_of
from worlds import LABELS, WORLDS, World, random_classifier, wary_classifier

SEEDS = 4  # classifiers in each world
BLOCK = 8


class LookedUp(nn.Module):
    """A classifier of a world's images as a module: a look-up table of the pixels in the first channel."""

    def __init__(self, world: World, classify: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.world, self.classify = world, classify
        self.unused = nn.Parameter(torch.zeros(1))  # a defense asks a parameter for the device

    def forward(self, images: Tensor) -> Tensor:
        values = (images[:, 0] * self.world.values).round().long().flatten(1).numpy()
        labels = torch.from_numpy(np.asarray(self.classify(values))).long()
        return nn.functional.one_hot(labels, LABELS).float()


def every_image(world: World) -> Tensor:
    """(images, 3, H, W) float in [0, 1]: all images of a world, in the order of their numbers."""
    grey = torch.from_numpy(world.images).float().view(-1, 1, *world.image) / world.values
    return grey.expand(-1, 3, -1, -1).contiguous()


def with_a_mask_less(
    build: Callable[..., CertifiedDefense], world: World, fill: float
) -> Iterator[tuple[nn.Module, CertifiedDefense]]:
    """The twins of a defense with masks: a mask less than is needed, and nobody who proves that they
    cover."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("certipatch.defenses.masked._check_masks", lambda _: None)
        for i in range(len(world.masks)):
            windows = world.masks.windows[:i] + world.masks.windows[i + 1 :]
            fewer = replace(world.masks, windows=windows, grid=None)
            hole = fewer.uncovered_patches()
            classifiers = [wary_classifier(world, hole)] if hole else []
            classifiers += [random_classifier(world, seed) for seed in range(SEEDS)]
            for classify in classifiers:
                model = LookedUp(world, classify).eval()
                yield model, build(model, fewer, fill)


@pytest.mark.usefixtures("one_thread")
class DefenseContract(ABC):
    """The suite. ``method`` is the defense's row in ``certification/methods.py``; ``options`` are its own."""

    method: str
    options: ClassVar[dict[str, Any]] = {}
    worlds: ClassVar[tuple[World, ...]] = (WORLDS[0], WORLDS[9])
    geometry: ClassVar[dict[str, Any]] = {
        "patch_size": (6, 6),
        "masks_per_axis": 2,
    }  # of the 32x32 pixels of ``photos``

    @abstractmethod
    def build(self, model: nn.Module, masks: MaskSet, fill: float) -> CertifiedDefense:
        """The defense around a model, with the world's fill colour if it has one."""

    @abstractmethod
    def twins(self, world: World, fill: float) -> Iterator[tuple[nn.Module, CertifiedDefense]]:
        """Models and defenses around them with a part of the proof taken away, some certificate of which is
        false."""

    def model(self, world: World, seed: int) -> nn.Module:
        """A random classifier of a world's images."""
        return LookedUp(world, random_classifier(world, seed)).eval()

    def keeps(self, verdict: Verdict, label: int) -> bool:
        """Whether the defense kept its promise on an attacked image."""
        return verdict.defended_label == label

    def _broken(self, world: World, defense: CertifiedDefense) -> Counter[str]:
        """Attack every image in every way: how many images are certified, and how many attacks on them
        succeed.

        The true label of an image is what the defense answers on it, and of every seventh image another.
        """
        images, numbers = every_image(world), world.images
        found = defense.examine(images)
        labels = np.array(
            [one.vanilla_label if one.defended_label is None else one.defended_label for one in found]
        )
        labels[::7] = (labels[::7] + 1) % LABELS
        certified = np.array(
            [bool(one.certified) for one in defense.examine(images, torch.from_numpy(labels))]
        )
        kept = np.array([[self.keeps(one, label) for label in range(LABELS)] for one in found])
        counts: Counter[str] = Counter(certified=int(certified.sum()))
        for pixels, content in world.attacks():
            attacked = numbers.copy()
            attacked[:, pixels] = content
            broken = ~kept[world.number(attacked), labels]
            counts["broken"] += int((broken & certified).sum())
            counts["others broken"] += int((broken & ~certified).sum())
        return counts

    def test_no_attack_on_a_certified_image_succeeds(self):
        counts: Counter[str] = Counter()
        for world in self.worlds:
            for seed in range(SEEDS):
                model = self.model(world, seed)
                counts.update(self._broken(world, self.build(model, world.masks, world.fill / world.values)))
        assert counts["broken"] == 0
        assert counts["certified"] >= 100
        assert counts["others broken"] >= 20

    def test_its_twin_is_broken(self):
        """A soundness test that cannot fail is none."""
        world = self.worlds[0]
        twins = self.twins(world, world.fill / world.values)
        assert any(self._broken(world, twin)["broken"] > 0 for _, twin in twins)

    @pytest.fixture
    def opened(self, trained: Path) -> Opened:
        return open_run(trained)

    @pytest.fixture
    def masks(self) -> MaskSet:
        return MaskSet.covering(image_size=(32, 32), **self.geometry)

    @pytest.fixture
    def shown(self, opened: Opened, photos: Path) -> tuple[Tensor, Tensor]:
        """24 images that the trained network knows, a third of them with a wrong label."""
        images = Images(load_source(str(photos)), opened.spec)
        items = [images[index] for index in range(24)]
        labels = torch.tensor([(item.label + (item.index % 3 == 0)) % 3 for item in items])
        return as_float(torch.stack([item.readable() for item in items])), labels

    def test_the_company_of_an_image_changes_nothing(
        self, opened: Opened, masks: MaskSet, shown: tuple[Tensor, Tensor]
    ):
        """Alone, in another order, or beside black and white images, an image has the same verdict."""
        defense = self.build(opened.network, masks, 0.5)
        images, labels = shown
        together = defense.examine(images, labels)
        assert {verdict.certified for verdict in together} == {True, False}
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        shuffled = defense.examine(images[order], labels[order])
        loud = torch.cat([torch.zeros(5, 3, 32, 32), images, torch.ones(5, 3, 32, 32)])
        silent = torch.zeros(5, dtype=torch.int64)
        amid = defense.examine(loud, torch.cat([silent, labels, silent]))[5:-5]
        for index, verdict in enumerate(together):
            (alone,) = defense.examine(images[index : index + 1], labels[index : index + 1])
            (place,) = (order == index).nonzero()[0].tolist()
            for other in (alone, shuffled[place], amid[index]):
                assert _same(verdict, other)

    def test_what_cannot_be_meant_is_refused(
        self, opened: Opened, masks: MaskSet, shown: tuple[Tensor, Tensor]
    ):
        from certipatch import SoundnessError

        defense = self.build(opened.network, masks, 0.5)
        images, labels = shown
        wrong = [
            (images[:, :, :16], labels),
            (images * 255, labels),
            (images, labels[:3]),
            (images, labels.float()),
        ]
        for other, truth in wrong:
            with pytest.raises(SoundnessError):
                defense.examine(other, truth)
        opened.network.train()
        with pytest.raises(SoundnessError, match="evaluation mode"):
            defense.examine(images, labels)

    def _certify(self, opened: Opened, photos: Path, masks: MaskSet, out: Path, **how: Any) -> Path:
        source, fabric = load_source(str(photos)), make_fabric(device="cpu")
        certify(opened, source, masks, out, fabric=fabric, defense=self.method, **self.options, **how)
        return out

    def test_records_say_what_the_defense_found(
        self, opened: Opened, photos: Path, masks: MaskSet, tmp_path: Path
    ):
        folder = read_folder(self._certify(opened, photos, masks, tmp_path / "out"))
        assert folder.manifest.finished is not None
        assert folder.manifest.defense == self.method
        defense: Any = restore(folder.manifest, opened, make_fabric(device="cpu"))
        assert defense.name == self.method
        images = Images(load_source(str(photos)), opened.spec)
        assert len(folder.records) == len(images) == 24
        again = look(defense, torch.device("cpu"), [images[index] for index in range(24)])
        assert [record.model_dump() for record in again] == [record.model_dump() for record in folder.records]

    def test_a_killed_run_resumes_to_the_same_bytes(
        self,
        opened: Opened,
        photos: Path,
        masks: MaskSet,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        blocks_of: Callable[[int], None],
    ):
        blocks_of(BLOCK)
        whole = self._certify(opened, photos, masks, tmp_path / "whole")

        class Killed(BaseException):
            pass

        def dies(defense: CertifiedDefense, device: torch.device, items: list[Any]) -> list[Any]:
            if items[0].index >= BLOCK:
                raise Killed
            return list(look(defense, device, items))

        with monkeypatch.context() as patch:
            patch.setattr("certipatch.certification.certify.look", dies)
            with pytest.raises(Killed):
                self._certify(opened, photos, masks, tmp_path / "killed")
        lines = tmp_path / "killed" / "records.jsonl"
        assert lines.read_bytes().count(b"\n") == BLOCK
        lines.write_bytes(lines.read_bytes() + b'{"index": 8, "na')  # torn by the kill
        self._certify(opened, photos, masks, tmp_path / "killed", resume=True)
        assert lines.read_bytes() == (whole / "records.jsonl").read_bytes()
        parts = tmp_path / "parts"
        for part in (2, 1):
            self._certify(opened, photos, masks, parts, shard=(part, 2))
        assert read_folder(parts).records == read_folder(whole).records

    def test_verify_finds_tampering(self, opened: Opened, photos: Path, masks: MaskSet, tmp_path: Path):
        out, source = self._certify(opened, photos, masks, tmp_path / "out"), load_source(str(photos))

        def findings(sample: int = 0) -> list[Any]:
            found = verify(out, model=opened, source=source, sample=sample, device="cpu")
            return list(found.findings)

        assert findings(sample=4) == []
        kept, lines = (out / "records.jsonl").read_text(), lines_of(out)
        forged = 0
        for change in _forgeries(lines[0]):
            forge(out, [change, *lines[1:]])
            assert findings(), f"verify overlooked {change}"
            forged += 1
        for others in (lines[1:], [lines[1], *lines[1:]], [*lines, lines[0]]):
            forge(out, others)
            assert findings()
        forge(out, lines)
        assert findings() == []
        assert forged >= 6
        (out / "records.jsonl").write_text(
            kept.replace('"label": 0', '"label": 1', 1)
        )  # without mending hashes
        assert findings()


def _same(one: Verdict, other: Verdict) -> bool:
    """Equal, and equal margins up to the rounding of a batch.

    Without a certificate only the answers count: which wrong view is met first, and after how many passes,
    may depend on what is under way beside it.
    """
    answers = [(v.label, v.vanilla_label, v.defended_label, v.certified) for v in (one, other)]
    if answers[0] != answers[1] or not one.certified:
        return answers[0] == answers[1]
    pairs = [(vars(one)[name], vars(other)[name]) for name in vars(one)]
    return all(_near(a, b) for a, b in pairs)


def _near(one: Any, other: Any) -> bool:
    """Equal, or numbers that differ by rounding: large integers too, which are made of logits."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return bool(np.isclose(one, other, rtol=1e-5, atol=1e-4))
    return bool(one == other)


def _forgeries(line: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The line with one field after the other changed to what it is not, as far as it has them."""
    yield {**line, "name": "another"}
    yield {**line, "label": (line["label"] + 1) % 3}
    yield {**line, "pixels": "00"}
    yield {**line, "passes": -1}
    yield {**line, "index": 99}
    yield {**line, "vanilla_label": 7}
    if "certified" in line:
        yield {**line, "certified": "yes"}
        yield {**line, "certified": True, "defended_label": (line["label"] + 1) % 3}
        yield {**line, "margin": -1.0}
    if "agreement" in line:
        yield {**line, "agreement": 2.0}
