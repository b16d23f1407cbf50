"""Any model from the command line and from Python: functions, addresses, modules in memory, and timm names
with what was certified. Their records are sealed, resumed, attacked, verified and answered with as a run's
are."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import Normalize

import certipatch as cp
from certipatch.errors import CertiPatchError
from certipatch.models.small import SmallCNN
from certipatch.records.read import read_records
from documentation import blocks
from inputs import refused

pytestmark = pytest.mark.usefixtures("one_thread")

GEOMETRY = {"patch": 5, "masks_per_axis": 2}
SMALL = {"image_size": 32}
SHA = "0123456789abcdef0123456789abcdef01234567"

MODULE = """
import safetensors.torch
import torch
from torch import nn
from torchvision.transforms import Normalize

from certipatch.models.small import SmallCNN


def mine():
    network = SmallCNN(3)
    network.load_state_dict(safetensors.torch.load_file({weights!r}))
    model = nn.Sequential(Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), network)
    model.preprocessing = {{"image_size": 32}}
    return model


def nothing():
    return None


def raises():
    raise ValueError("no weights here")


def unsized():
    return nn.Sequential(Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), SmallCNN(3))


def odd():
    model = unsized()
    model.preprocessing = {{"size": 32}}
    return model


def four():
    return SmallCNN(4)


class Tuple(nn.Module):
    def forward(self, images):
        return (images,)


def no_module():
    return "resnet18"
"""


@pytest.fixture
def mymodels(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module ``mymodels`` in the current folder."""
    (tmp_path / "here").mkdir()
    text = MODULE.format(weights=str(trained / "model.safetensors"))
    (tmp_path / "here" / "mymodels.py").write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mymodels", raising=False)
    yield tmp_path
    sys.modules.pop("mymodels", None)


def same_certificates(one: Path, other: Path) -> bool:
    return [(r.name, r.label, r.defended_label, r.certified, r.pixels) for r in read_records(one)] == [
        (r.name, r.label, r.defended_label, r.certified, r.pixels) for r in read_records(other)
    ]


def test_a_function_goes_all_the_way(cli, mymodels: Path, trained: Path, photos: Path):
    """Certified as the run whose weights it has; then predict, attack, verify, report and resume take it."""
    name, out = "mymodels:mine", mymodels / "c"
    assert cli("certify", model=trained, data=photos, **GEOMETRY, out=mymodels / "run").code == 0
    done = cli("certify", model=name, data=photos, **GEOMETRY, out=out)
    assert done.code == 0, done.err
    assert same_certificates(out, mymodels / "run")
    assert read_records(out)[0].certified
    assert cli("certify", model=name, data=photos, **GEOMETRY, out=out, resume=True).code == 0
    image = photos / "blue" / "0.png"
    done = cli("predict", image, "--prove", model=name, certified=out)
    assert done.code == 0, done.err
    assert json.loads(done.out)["class"] == "blue"
    done = cli("attack", model=name, records=out, data=photos, limit=3, restarts=1, out=mymodels / "a")
    assert done.code == 0, done.err
    done = cli("verify", out, model=name, data=photos, sample=5)
    assert done.code == 0, done.out + done.err
    assert cli("report", out, mymodels / "a", html=mymodels / "p.html").code == 0
    refused(cli("predict", image, model=trained, certified=out), "is of another model")
    refused(cli("predict", image, model=name, patch=5), "--certified FOLDER")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mymodels:nothing", ("returns a torch.nn.Module", "NoneType")),
        ("mymodels:no_module", ("returns a torch.nn.Module", "found str")),
        ("mymodels:raises", ("its function failed (ValueError: no weights here)",)),
        ("mymodels:absent", ("found none", "package.module:function")),
        ("nomodule.at.all:f", ("found none", "package.module:function")),
        ("mymodels:unsized", ("--image-size", "preprocessing")),
        ("mymodels:odd", ("preprocessing to be a dict of image_size", "'size'")),
    ],
)
def test_functions_that_return_no_model(cli, mymodels: Path, photos: Path, name: str, words):
    refused(cli("certify", model=name, data=photos, **GEOMETRY, out=mymodels / "c"), name, *words)
    assert not (mymodels / "c").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mymodels:four", "tells 4 classes apart, the data has 3"),
        ("mymodels:Tuple", "expected logits (images, classes), found tuple"),
        ("mymodels:mine", "does not take images of 36x36 pixels"),
    ],
)
def test_functions_of_other_models(cli, mymodels: Path, photos: Path, name: str, words: str):
    size = 36 if name == "mymodels:mine" else 32
    given = {"image_size": size, "data": photos, **GEOMETRY, "out": mymodels / "c"}
    refused(cli("certify", model=name, **given), name, words)
    refused(cli("certify", "--pretrained", model="mymodels:mine", **given), "drop --pretrained")


def saved_by_timm(folder: Path, seed: int = 0) -> Path:
    """A tiny network as ``timm.models.push_to_hf_hub`` would upload it."""
    torch.manual_seed(seed)
    network = timm.create_model("test_resnet", num_classes=3).eval()
    names = {"label_names": ["blue", "green", "red"]}
    timm.models.save_for_hf(network, folder, model_config=names, safe_serialization=True)
    return folder


def on_the_hub(monkeypatch: pytest.MonkeyPatch, cache: Path, folder: Path, sha: str = SHA) -> None:
    """Prepare the hub's cache, as if ``me/it`` had been fetched; nothing is asked over the network."""
    place = cache / "models--me--it"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / "main").write_text(sha)
    shutil.copytree(folder, place / "snapshots" / sha)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


def test_a_folder_that_timm_saved(cli, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Here or on the hub, pinned or not; and the records are those of the timm name with the same weights."""
    folder = saved_by_timm(tmp_path / "saved")
    on_the_hub(monkeypatch, tmp_path / "cache", folder)
    weights = {"weights": folder / "model.safetensors", "image_size": 32}
    models = {
        "local": {"model": f"local-dir:{folder}", **SMALL},
        "hub": {"model": "hf-hub:me/it", **SMALL},
        "pinned": {"model": f"hf-hub:me/it@{SHA}", **SMALL},
        "name": {"model": "test_resnet", **weights},
    }
    for out, asked in models.items():
        done = cli("certify", **asked, data=photos, **GEOMETRY, out=tmp_path / out)
        assert done.code == 0, done.err
        assert (f"model hf-hub:me/it@{SHA}" in done.err) == (out == "hub")
    assert all(same_certificates(tmp_path / out, tmp_path / "name") for out in models)
    image = photos / "red" / "0.png"
    said = [
        cli("predict", image, model=name, certified=tmp_path / out, **given)
        for out in models
        for name, given in (("hf-hub:me/it", {}), ("test_resnet", {"weights": weights["weights"]}))
    ]
    assert {one.code for one in said} == {0}, said[0].err
    assert len({json.loads(one.out)["label"] for one in said}) == 1
    certified = {"certified": tmp_path / "name"}
    refused(cli("predict", image, model="test_resnet", **certified), "--weights or --pretrained")
    refused(
        cli("predict", image, model="resnet18", weights=weights["weights"], **certified),
        "model.arch: test_resnet there, resnet18 here",
    )


def test_a_revision_that_moved(cli, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``main`` is another model now than the one that was certified: refused; the old one by its commit is
    not."""
    on_the_hub(monkeypatch, tmp_path / "cache", saved_by_timm(tmp_path / "old"))
    done = cli("certify", model="hf-hub:me/it", data=photos, limit=3, **GEOMETRY, **SMALL, out=tmp_path / "c")
    assert done.code == 0, done.err
    on_the_hub(monkeypatch, tmp_path / "cache", saved_by_timm(tmp_path / "new", seed=1), sha=SHA[::-1])
    image = photos / "red" / "0.png"
    refused(cli("predict", image, model="hf-hub:me/it", certified=tmp_path / "c"), "weights of sha256")
    assert cli("predict", image, model=f"hf-hub:me/it@{SHA}", certified=tmp_path / "c").code == 0


def test_an_address_may_hold_a_training_run(
    cli, trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    on_the_hub(monkeypatch, tmp_path / "cache", trained)
    for name in ("hf-hub:me/it", f"local-dir:{trained}", str(trained)):
        out = tmp_path / name.replace("/", "_").replace(":", "_")
        done = cli("certify", model=name, data=photos, limit=6, **GEOMETRY, out=out)
        assert done.code == 0, done.err
        assert cli("predict", photos / "red" / "0.png", model=name, certified=out).code == 0
    refused(
        cli("certify", "--pretrained", model="hf-hub:me/it", data=photos, **GEOMETRY, out=tmp_path / "x"),
        "a training run has its own weights",
    )


def test_addresses_that_cannot_be_opened(cli, photos: Path, tmp_path: Path):
    given = {"data": photos, **GEOMETRY, "out": tmp_path / "c"}
    refused(cli("certify", model="hf-hub:me/absent", **given), "cannot be fetched", "local-dir:")
    refused(cli("certify", model="hf-hub:me/it/too/much", **given), "expected hf-hub:user/name")
    refused(cli("certify", model=f"local-dir:{tmp_path}/none", **given), "expected a folder")
    (tmp_path / "empty").mkdir()
    empty = cli("certify", model=f"local-dir:{tmp_path}/empty", **given)
    refused(empty, "expected a training run, or a config")
    folder = saved_by_timm(tmp_path / "saved")
    name = {"model": f"local-dir:{folder}"}
    refused(cli("certify", "--pretrained", **name, **given), "has its own weights")
    config = json.loads((folder / "config.json").read_text())
    for changed, words in (
        ({"model_args": {"in_chans": 1}}, "model_args that differ from the architecture's (in_chans)"),
        ({"label_names": ["red", "green", "blue"]}, "give --class-map"),
        ({"pretrained_cfg": {}}, "does not describe a model"),
        ({"architecture": 3}, "as timm's save_for_hf writes it"),
        ({"architecture": "no_such_net"}, "unknown model"),
        ({"architecture": "test_vit", "model_args": None}, "not those of test_vit"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        refused(cli("certify", **name, **given), words)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    refused(cli("certify", **name, **given), "expected model.safetensors")


class Pictures:
    """A data set as torchvision's are without a transform."""

    classes = ("blue", "green", "red")

    def __init__(self, folder: Path) -> None:
        paths = [path for name in self.classes for path in sorted((folder / name).iterdir())]
        self.samples = [(str(path), self.classes.index(path.parent.name)) for path in paths]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        with Image.open(path) as image:
            return image.convert("RGB"), label


def mine(trained: Path) -> nn.Module:
    network = SmallCNN(3)
    network.load_state_dict(safetensors.torch.load_file(trained / "model.safetensors"))
    return nn.Sequential(Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), network)


def test_from_python(cli, trained: Path, photos: Path, tmp_path: Path):
    """A module and pictures in memory, or a run and a folder: the same certificates; and back to a
    defense."""
    model = mine(trained)
    found = cp.certify(model, Pictures(photos), tmp_path / "a", patch="5", masks_per_axis=2, image_size=32)
    cp.certify(trained, str(photos), tmp_path / "b", patch="5", masks_per_axis=2)
    assert found == read_records(tmp_path / "a")
    assert same_certificates(tmp_path / "a", tmp_path / "b")
    assert cli("verify", tmp_path / "a").code == 0
    defense = cp.load_defense(mine(trained), tmp_path / "a")
    assert len(defense.masks) == 4
    assert cp.load_defense(str(trained), tmp_path / "b").masks == defense.masks
    other = mine(trained)
    with torch.no_grad():
        other[1][0].weight[0, 0, 0, 0] += 1
    with pytest.raises(cp.SoundnessError, match="weights of sha256"):
        cp.load_defense(other, tmp_path / "a")


def test_from_python_what_cannot_be_used(trained: Path, photos: Path, tmp_path: Path):
    model, out = mine(trained), tmp_path / "c"
    no_pictures = [(torch.zeros(3), 0), (1, 1), (1, 2)]
    for refused_call, words in (
        (lambda: cp.certify(model, photos, out), "--image-size"),
        (lambda: cp.certify(model, [], out, image_size=32), "expected labels"),
        (lambda: cp.certify("resnet18", photos, out), "expected a module or a training run"),
        (lambda: cp.certify(trained, photos, out, image_size=32), "without an image_size"),
        (lambda: cp.certify(nn.Linear(3, 3), photos, out, image_size=32), "does not take images"),
        (lambda: cp.certify(model, no_pictures, out, image_size=32), "pictures (PIL)"),
    ):
        with pytest.raises(CertiPatchError) as error:
            refused_call()
        assert words in str(error.value)


def documented() -> dict[str, object]:
    """What the file of functions in docs/own-model.md defines."""
    (block,) = (b for b in blocks() if b.page.name == "own-model.md" and "def torchvision_resnet18" in b.text)
    scope: dict[str, object] = {}
    exec(compile(block.text.replace('weights="DEFAULT"', "weights=None"), str(block), "exec"), scope)
    return scope


def test_a_network_of_torchvision(photos: Path, tmp_path: Path):
    """The function of docs/own-model.md, with random weights in place of downloaded ones."""
    torch.manual_seed(0)
    model = documented()["torchvision_resnet18"]()
    model[1].fc = nn.Linear(512, 3)
    assert model.preprocessing["image_size"] == 224
    records = cp.certify(model, photos, tmp_path / "c", patch="3%", masks_per_axis=2, limit=2)
    assert len(records) == 2
    assert cp.load_defense(model, tmp_path / "c").masks.image_size == (224, 224)


def test_a_network_of_transformers(photos: Path, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32,
        patch_size=8, num_labels=3,
    )  # fmt: skip
    network = documented()["Logits"](transformers.ViTForImageClassification(config))
    model = nn.Sequential(Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), network)
    records = cp.certify(model, photos, tmp_path / "c", patch="5", masks_per_axis=2, image_size=32, limit=4)
    assert len(records) == 4
