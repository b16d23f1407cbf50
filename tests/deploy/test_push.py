"""A folder for the hub is a training run, timm's model and a certificate at once; its card says what the
records say; and what will be public is shown before it is. Nothing here asks a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch

import certipatch as cp
from certipatch.config import ModelSpec
from certipatch.models.build import build, describe
from certipatch.models.runs import open_run
from certipatch.records.read import read_folder, read_records
from inputs import refused, write_manifest

pytestmark = pytest.mark.usefixtures("one_thread")

SHA = "0123456789abcdef0123456789abcdef01234567"
GEOMETRY = {"patch": 16, "masks_per_axis": 3}


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run of a small network of timm's, with a crop of its own."""
    from certipatch.data.load import load_source
    from certipatch.runtime.devices import make_fabric
    from certipatch.training.config import TrainConfig
    from certipatch.training.train import train

    source, out = load_source(str(photos)), tmp_path_factory.mktemp("push") / "run"
    stated = describe("test_resnet", classes=source.classes, num_classes=3, image_size=(32, 32))
    spec = ModelSpec(**{**stated.model_dump(), "crop_pct": 0.9, "mean": (0.4, 0.5, 0.6)})
    config = TrainConfig(
        strategy="vanilla", patch_size=(5, 5), masks_per_axis=2, epochs=3, batch_size=8, lr=0.05
    )
    train(build(spec), spec, source, source, config, out, fabric=make_fabric(device="cpu"))
    return out


@pytest.fixture(scope="module")
def certified(run: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "mine-k3"
    cp.certify(run, photos, out, patch="16", masks_per_axis=3, device="cpu", prove=True)
    return out


@pytest.fixture
def hub(cli, run: Path, certified: Path, tmp_path: Path) -> Path:
    out = tmp_path / "hub"
    done = cli("push", run, certified, to="me/it", dry_run=out, license="apache-2.0")
    assert done.code == 0, done.err
    return out


def on_the_hub(monkeypatch: pytest.MonkeyPatch, cache: Path, folder: Path, sha: str = SHA) -> None:
    """The cache of the hub's own library as if ``me/it`` had been fetched; the real snapshot_download reads
    it."""
    place = cache / "models--me--it"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(sha)
    shutil.copytree(folder, place / "snapshots" / sha)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


def test_one_folder_is_three_things(cli, hub: Path, run: Path, certified: Path, photos: Path):
    opened = open_run(hub)  # a run
    assert opened.weights_sha256 == open_run(run).weights_sha256
    bare = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()  # timm's model
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(bare(images), opened.network[1](images), atol=1e-5)  # other memory layout
    config = json.loads((hub / "config.json").read_bytes())
    assert config["label_names"] == ["blue", "green", "red"]
    assert config["pretrained_cfg"]["crop_pct"] == 0.9
    assert config["pretrained_cfg"]["mean"] == [0.4, 0.5, 0.6]
    data = timm.data.resolve_model_data_config(bare)
    assert (data["input_size"], data["crop_pct"], list(data["mean"])) == ((3, 32, 32), 0.9, [0.4, 0.5, 0.6])
    assert read_records(hub / "certificates" / "mine-k3") == read_records(certified)  # a certificate
    done = cli("verify", hub, model=hub, data=photos, sample=3)
    assert done.code == 0, done.out


def test_the_card_says_what_the_records_say(hub: Path, certified: Path):
    card = huggingface_hub.ModelCard.load(hub / "README.md")
    assert card.data.license == "apache-2.0"
    assert "certified-robustness" in card.data.tags
    records = read_records(certified)
    counts = {
        "vanilla_accuracy": sum(one.vanilla_label == one.label for one in records),
        "clean_accuracy": sum(one.defended_label == one.label for one in records),
        "certified_robust_accuracy": sum(one.certified and one.margin >= 1e-3 for one in records),
    }
    found = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert found == {name: count / len(records) for name, count in counts.items()}
    for count in counts.values():
        assert f"({count}/{len(records)};" in card.text
    assert card.text.index("What may be said") < card.text.index("What is not promised")
    assert "12,400,006" in card.text
    assert "do not prove who wrote them" in card.text


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("value: {share}", "value: 0.99", "certified_robust_accuracy of certificates/mine-k3 is 0.99"),
        ("({count}/24;", "(24/24;", "its table does not say {count}/24"),
        ("images: 24", "images: 23", "of 23 images, the records"),
        ("certificate: mine-k3", "certificate: other", "of certificates/other, of which there is none"),
        ("model-index", "index", "is damaged (KeyError"),
    ],
)
def test_twin_a_card_whose_number_is_another(cli, hub: Path, certified: Path, old: str, new: str, words: str):
    records = read_records(certified)
    count = sum(one.certified and one.margin >= 1e-3 for one in records)
    known = {"share": count / 24, "count": count}
    text = (hub / "README.md").read_text(encoding="utf-8")
    assert cli("verify", hub).code == 0
    assert old.format(**known) in text
    (hub / "README.md").write_text(text.replace(old.format(**known), new), encoding="utf-8")
    done = cli("verify", hub)
    assert done.code == 1
    assert f"README.md: {''}" in done.out
    assert words.format(**known) in done.out


def test_from_the_hub_and_a_revision_that_moved(
    cli, hub: Path, run: Path, certified: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    on_the_hub(monkeypatch, tmp_path / "cache", hub)
    image = photos / "red" / "0.png"
    for pin in ("", f"@{SHA}"):
        address = f"hf-hub:me/it{pin}"
        given = {"model": address, "certified": f"{address}/certificates/mine-k3"}
        done = cli("predict", image, "--prove", **given)
        assert done.code == 0, done.err
        assert (f"@{SHA}" in done.err) == (pin == "")
        here = cli("predict", image, "--prove", model=run, certified=certified)
        assert json.loads(done.out) == json.loads(here.out)
    assert cli("verify", f"hf-hub:me/it@{SHA}").code == 0
    # somebody else's weights under the same name
    from certipatch.data.load import load_source
    from certipatch.runtime.devices import make_fabric
    from certipatch.training.config import TrainConfig
    from certipatch.training.train import train

    source, other = load_source(str(photos)), tmp_path / "other"
    spec = describe("test_resnet", classes=source.classes, num_classes=3, image_size=(32, 32))
    config = TrainConfig(
        strategy="vanilla", patch_size=(5, 5), masks_per_axis=2, epochs=1, batch_size=8, lr=0.01
    )
    train(build(spec, seed=1), spec, source, source, config, other, fabric=make_fabric(device="cpu"))
    shutil.copytree(hub / "certificates", other / "certificates")
    on_the_hub(monkeypatch, tmp_path / "cache", other, sha=SHA[::-1])
    moved = {"model": "hf-hub:me/it", "certified": "hf-hub:me/it/certificates/mine-k3"}
    refused(cli("predict", image, **moved), "is of another model")
    pinned = {"model": f"hf-hub:me/it@{SHA}", "certified": f"hf-hub:me/it@{SHA}/certificates/mine-k3"}
    assert cli("predict", image, **pinned).code == 0


def test_without_names(cli, run: Path, certified: Path, photos: Path, tmp_path: Path):
    out = tmp_path / "hub"
    done = cli("push", run, certified, "--no-names", to="me/it", dry_run=out)
    assert done.code == 0, done.err
    assert "Withheld: names of images" in done.out
    written = b"".join(
        path.read_bytes() for path in out.rglob("*") if path.suffix in (".json", ".jsonl", ".md")
    )
    for secret in (b"red/0.png", str(photos).encode(), b"certipatch train", b"certipatch certify"):
        assert secret not in written
    there, here = read_folder(out / "certificates" / "mine-k3"), read_folder(certified)
    assert there.manifest.written["names"] == "withheld"
    assert [one.name for one in there.records] == [str(one.index) for one in here.records]
    same = [one.model_copy(update={"name": ""}) for one in there.records]
    assert same == [one.model_copy(update={"name": ""}) for one in here.records]
    assert cli("verify", out).code == 0
    image = photos / "red" / "0.png"
    assert cli("predict", image, model=out, certified=out / "certificates" / "mine-k3").code == 0
    (out / "certificates" / "mine-k3" / "records.jsonl").write_bytes(b"")
    assert cli("verify", out).code == 1


class FakeHub:
    """What the library calls of the hub, noted."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, name: str, **how) -> None:
        self.calls.append(("create", name, how))

    def upload_folder(self, *, folder_path: str, repo_id: str, commit_message: str):
        self.calls.append(("upload", repo_id, commit_message))
        root = Path(folder_path)
        self.files = {
            str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
        }
        return SimpleNamespace(oid=SHA)


def test_it_asks_before_it_uploads(cli, run: Path, certified: Path, monkeypatch: pytest.MonkeyPatch):
    fake, answers = FakeHub(), []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)

    def confirm(question: str) -> bool:
        answers.append(question)
        return len(answers) > 1

    monkeypatch.setattr("typer.confirm", confirm)
    done = cli("push", run, certified, to="me/it")
    refused(done, "nothing was uploaded")
    assert fake.calls == []
    assert "names of 24 images in mine-k3: blue/0.png" in done.out
    done = cli("push", run, certified, "--private", to="me/it")
    assert done.code == 0, done.err
    assert f"hf-hub:me/it@{SHA}" in done.out
    assert answers == [f"Upload this to me/it, where it is {how}?" for how in ("public", "private to you")]
    assert [call[:2] for call in fake.calls] == [("create", "me/it"), ("upload", "me/it")]
    assert fake.calls[0][2] == {"private": True, "exist_ok": True}
    expected = {
        "README.md",
        "config.json",
        "manifest.json",
        "epochs.jsonl",
        "epochs.sha256",
        "model.safetensors",
    }
    inside = {f"certificates/mine-k3/{name}" for name in ("manifest.json", "records.jsonl", "records.sha256")}
    assert set(fake.files) == expected | inside
    assert cli("push", run, certified, "--yes", to="me/it").code == 0
    assert len(answers) == 2


def test_no_network_is_one_line(cli, run: Path, certified: Path):
    done = cli("push", run, certified, "--yes", to="me/it")
    assert done.code == 3
    assert len([line for line in done.err.splitlines() if line.startswith("certipatch:")]) == 1
    assert "the hub did not take it" in done.err
    assert "--dry-run DIR" in done.err


def test_bad_input(cli, run: Path, trained: Path, certified: Path, hub: Path, tmp_path: Path, photos: Path):
    out = tmp_path / "out"
    for name in ("me", "me/it/too", "../it", "me/a--b", "me/a..b", ""):
        refused(cli("push", run, certified, to=name, dry_run=out), "expected user/name")
    refused(cli("push", trained, certified, to="me/it", dry_run=out), "is of another model")
    refused(cli("push", run, run, to="me/it", dry_run=out), "expected records of certify")
    refused(cli("push", run, certified, certified, to="me/it", dry_run=out), "folders of different names")
    refused(cli("push", run, certified, to="me/it", dry_run=hub), "expected an empty folder")
    refused(cli("push", run, certified, to="me/it", deployed=run, dry_run=out), "a folder that export wrote")
    refused(cli("push", photos, certified, to="me/it", dry_run=tmp_path / "x"), "expected a folder with")
    manifest = json.loads((certified / "manifest.json").read_bytes())
    begun = shutil.copytree(certified, tmp_path / "begun")
    write_manifest(begun / "manifest.json", {**manifest, "finished": None})
    refused(cli("push", run, begun, to="me/it", dry_run=tmp_path / "y"), "expected a finished folder")


def test_an_export_goes_along(cli, trained: Path, photos: Path, tmp_path: Path):
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    certify = {"model": trained, "data": photos, **GEOMETRY, "out": tmp_path / "c"}
    assert cli("certify", **certify).code == 0
    assert cli("export", trained, certified=tmp_path / "c", data=photos, out=tmp_path / "d").code == 0
    given = {"to": "me/it", "deployed": tmp_path / "d"}
    done = cli("push", trained, tmp_path / "c", **given, dry_run=tmp_path / "hub")
    assert done.code == 0, done.err
    image = photos / "red" / "0.png"
    assert json.loads(cli("predict", image, model=tmp_path / "hub" / "onnx").out)["class"] == "red"
    assert cli("verify", tmp_path / "hub" / "onnx").code == 0
    done = cli("push", trained, tmp_path / "c", "--no-names", **given, dry_run=tmp_path / "other")
    refused(done, "an export states names of images")
