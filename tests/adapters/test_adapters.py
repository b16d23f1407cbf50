"""CertiPatch inside torchmetrics and Lightning, the loggers of ``train --log``, and attacks of others.

What is not installed is skipped, with the reason.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from certipatch import MaskSet, PatchCleanser
from certipatch.data.load import load_source
from certipatch.data.source import Images, as_float
from certipatch.models import describe
from certipatch.models.runs import open_run
from inputs import refused, typed

SIZE = (32, 32)


@pytest.fixture
def defense(trained: Path) -> PatchCleanser:
    masks = MaskSet.covering(image_size=SIZE, patch_size=(20, 20), masks_per_axis=3)
    return PatchCleanser(open_run(trained).network, masks)


@pytest.fixture
def batch(photos: Path) -> tuple[torch.Tensor, torch.Tensor]:
    source = load_source(str(photos))
    spec = describe("small-cnn", classes=source.classes, num_classes=len(source.classes))
    images = Images(source, spec)
    pixels = torch.stack([images[i].readable() for i in range(len(images))])
    return as_float(pixels), torch.tensor(list(source.labels))


class TestTorchmetrics:
    def test_counts_what_the_defense_certifies(self, defense: PatchCleanser, batch):
        pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
        from certipatch.adapters.torchmetrics import CertifiedRobustAccuracy

        images, labels = batch
        verdicts = defense.examine(images, labels)
        expected = sum(bool(v.certified) and v.margin >= 1e-3 for v in verdicts)
        assert 0 < expected < len(labels)
        metric = CertifiedRobustAccuracy(defense)
        for part in (slice(0, 10), slice(10, None)):
            metric.update(images[part], labels[part])
        assert float(metric.compute()) == pytest.approx(expected / len(labels))
        largest = max(v.margin for v in verdicts if v.certified)
        demanding = CertifiedRobustAccuracy(defense, min_margin=largest + 1)
        demanding.update(images, labels)
        assert float(demanding.compute()) == 0
        metric.reset()
        assert int(metric.images) == 0


class TestLightning:
    @pytest.mark.parametrize(("strategy", "copies"), [("greedy-multisize", 2), ("random-cutout", 1)])
    def test_batches_are_what_the_strategy_makes(self, trained: Path, batch, strategy: str, copies: int):
        pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
        from certipatch.adapters.lightning import MaskedTraining

        images, labels = batch
        masks = MaskSet.covering(image_size=SIZE, patch_size=(5, 5), masks_per_axis=6)
        network = open_run(trained).network
        given = [images.clone(), labels.clone()]
        MaskedTraining(strategy, masks, network, fill=0.5).on_train_batch_start(None, None, given, 0)
        assert given[0].shape == (copies * len(images), *images.shape[1:])
        assert torch.equal(given[1], labels.repeat(copies))
        hidden = (given[0] != images.repeat(copies, 1, 1, 1)).any(1)
        assert hidden.flatten(1).any(1).all()
        assert (given[0].movedim(1, -1)[hidden] == 0.5).all()

    def test_in_a_trainer(self, trained: Path, batch, tmp_path: Path):
        lightning = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
        from certipatch.adapters.lightning import MaskedTraining

        seen = []

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.network = open_run(trained).network

            def training_step(self, batch: Any, _index: int) -> torch.Tensor:
                seen.append(len(batch[0]))
                return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.01)

        module = Module()
        masks = MaskSet.covering(image_size=SIZE, patch_size=(5, 5), masks_per_axis=6)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch), batch_size=12)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        callback = MaskedTraining("greedy-multisize", masks, module.network)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lightning.Trainer(
                max_epochs=1, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet
            ).fit(module, loader)
        assert seen == [24, 24]


TRAIN = typed("train", model="small-cnn", data="digits", strategy="vanilla", patch=3, epochs=1, limit=64)


class TestLog:
    @pytest.mark.parametrize("name", ["wandb", "mlflow"])
    def test_what_is_logged(self, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
        """The calls, by a logger in the place of the library's."""
        calls: list[tuple[str, Any]] = []

        class Fake:
            def __init__(self, *words: Any, **options: Any) -> None:
                calls.append(("made", options))

            def log_metrics(self, metrics: dict[str, float], step: int) -> None:
                calls.append(("metrics", metrics))

            def save(self) -> None: ...

            def finalize(self, status: str) -> None:
                calls.append(("finalized", status))

        fake = ModuleType("pytorch_lightning.loggers")
        vars(fake).update(WandbLogger=Fake, MLFlowLogger=Fake)
        monkeypatch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
        monkeypatch.setitem(sys.modules, "pytorch_lightning.loggers", fake)
        done = cli(*TRAIN, log=name, out=tmp_path / "run")
        assert done.code == 0, done.err
        logged = {key for what, metrics in calls if what == "metrics" for key in metrics}
        assert {"step/loss", "epoch/validation_vanilla_accuracy"} <= logged
        assert calls[-1] == ("finalized", "")
        assert "run" in (calls[0][1].get("name"), calls[0][1].get("run_name"))
        plain = cli(*TRAIN, out=tmp_path / "plain")
        assert plain.code == 0
        weights = [(tmp_path / one / "model.safetensors").read_bytes() for one in ("run", "plain")]
        assert weights[0] == weights[1]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["wandb", "mlflow"])
    def test_by_the_library(self, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
        for package in (name, "sqlalchemy")[: 1 + (name == "mlflow")]:  # mlflow-skinny has no data base
            pytest.importorskip(package, reason=f"{package} is not installed")
        pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
        monkeypatch.setenv("WANDB_MODE", "offline")
        done = cli(*TRAIN, log=name, out=tmp_path / "run")
        assert done.code == 0, done.err
        assert any((tmp_path / "run" / name).iterdir())

    def test_without_the_package(self, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        for module in ("pytorch_lightning", "pytorch_lightning.loggers"):
            monkeypatch.setitem(sys.modules, module, None)
        done = cli(*TRAIN, log="wandb", out=tmp_path / "run")
        assert (done.code, "pip install 'certipatch[wandb]'" in done.err) == (3, True), done.err

    def test_another_name(self, cli, tmp_path: Path):
        refused(cli(*TRAIN, log="wanbd", out=tmp_path / "run"), "wandb")
        assert not (tmp_path / "run").exists()


class TestAttacksOfOthers:
    """docs/attacks.md: what a gradient attack of another library sees of PatchCleanser, and what a
    black-box one may do."""

    def test_the_defended_answer_has_no_gradient(self, defense: PatchCleanser, batch):
        images = batch[0][:2].clone().requires_grad_()
        answers = defense.predict(images.detach())
        assert not torch.as_tensor(answers).is_floating_point()
        assert not torch.as_tensor(answers).requires_grad

    def test_foolbox(self, defense: PatchCleanser, batch):
        """A decision-based attack asks for labels only; as logits it gets one-hot vectors of the defended
        answer."""
        foolbox = pytest.importorskip("foolbox", reason="foolbox is not installed")

        class Defended(nn.Module):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                labels = torch.as_tensor([v.defended_label for v in defense.examine(images.detach())])
                return nn.functional.one_hot(labels, 3).float()

        images, labels = batch[0][:4], batch[1][:4]
        model = foolbox.PyTorchModel(Defended().eval(), bounds=(0, 1), device="cpu")
        assert foolbox.accuracy(model, images, labels) == 1
        attack = foolbox.attacks.SaltAndPepperNoiseAttack(steps=2, across_channels=True)
        _, _, broken = attack(model, images, labels, epsilons=None)
        assert broken.shape == (4,)
