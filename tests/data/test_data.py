"""Data sets that have a name: the paper's five in their own formats, streams, and the hub's libraries, on
local files."""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
import tarfile
import time
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from certipatch.data.load import judged_split, load_source
from certipatch.data.source import Images, Source, check_training_classes
from certipatch.errors import ConfigError, DataError
from certipatch.models.build import describe
from certipatch.models.small import SMALL_CNN
from inputs import write_photos


def write_shard(path: Path, photos: Path, *, broken: bool = False) -> None:
    """A WebDataset shard: 00000.png, 00000.cls, 00001.png ..."""
    with tarfile.open(path, "w") as tar:
        for n, image in enumerate(sorted(photos.glob("*/*.png"))):
            label = ["blue", "green", "red"].index(image.parent.name)
            for extension, data in (
                ("jpg", b"junk" if broken and n == 5 else image.read_bytes()),
                ("cls", str(label).encode()),
            ):
                member = tarfile.TarInfo(f"{n:05d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.filterwarnings("default")  # webdataset leaves its file to the garbage collector
def test_wds_is_read_whole_and_an_unreadable_image_surfaces(photos: Path, tmp_path: Path):
    """timm's reader drops an unreadable image of a stream; a certificate's denominator must not shrink in
    silence."""
    pytest.importorskip("webdataset")
    write_shard(tmp_path / "good-0000.tar", photos)
    source = load_source(f"wds/{tmp_path}", split="good-0000.tar|24")
    assert source.labels == [0] * 8 + [1] * 8 + [2] * 8
    spec = describe(SMALL_CNN, classes=source.classes, num_classes=3)
    direct = Images(load_source(str(photos)), spec)
    assert all((Images(source, spec)[i].pixels == direct[i].pixels).all() for i in range(24))

    write_shard(tmp_path / "bad-0000.tar", photos, broken=True)
    with pytest.raises(DataError, match="cannot be read"):
        load_source(f"wds/{tmp_path}", split="bad-0000.tar|24")


@pytest.mark.filterwarnings("default")  # of pyarrow and datasets
def test_hfds_on_a_local_folder(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("certipatch.data.named.DOWNLOADS", tmp_path)
    source = load_source(f"hfds/{photos}", split="train")
    assert source.classes == ("blue", "green", "red")
    assert source.labels == [0] * 8 + [1] * 8 + [2] * 8
    assert source.open(9).size == (32, 32)


def test_an_image_is_never_read_through_another_process_offset(photos: Path, tmp_path: Path):
    """Two loader processes read one tar at the same time and see what one sees."""
    from torch.utils.data import DataLoader

    from certipatch.data.source import stack

    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, arcname="photos")
    source = load_source(str(tmp_path / "photos.tar"))
    spec = describe(SMALL_CNN, classes=source.classes, num_classes=3)
    alone, together = (
        torch.cat(
            [
                loaded.pixels
                for loaded in DataLoader(
                    Images(source, spec), batch_size=1, collate_fn=stack, num_workers=workers
                )
            ]
        )
        for workers in (0, 2)
    )
    assert torch.equal(alone, together)


class TestThePapersDataSets:
    """ImageNet, ImageNette, CIFAR-10, CIFAR-100 and SVHN: small files in their own formats, read as a user
    names them."""

    @pytest.fixture
    def downloads(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Where downloads lie, with only torchvision's md5 sums of the real files switched off."""
        monkeypatch.setattr("certipatch.data.named.DOWNLOADS", tmp_path)
        for module in ("cifar", "svhn", "utils"):
            monkeypatch.setattr(
                f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: Path(path).is_file()
            )
        return tmp_path

    def pictures(self, labels: list[int]) -> np.ndarray:
        return np.random.default_rng(labels).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)

    def write_cifar(
        self, folder: Path, files: dict[str, list[int]], key: str, meta: tuple[str, str, list[str]]
    ) -> None:
        folder.mkdir()
        for name, labels in files.items():
            data = (
                self.pictures(labels).transpose(0, 3, 1, 2).reshape(len(labels), 3072)
            )  # all red, then green, then blue
            (folder / name).write_bytes(pickle.dumps({"data": data, key: labels}, protocol=2))
        (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: meta[2]}, protocol=2))

    def check(self, source: Source, name: str, batches: list[list[int]], classes: list[str]) -> None:
        labels = [label for batch in batches for label in batch]
        assert source.classes == tuple(classes)
        assert list(source.labels) == labels
        assert list(source.names) == [f"{name}/{i}" for i in range(len(labels))]
        lines = "".join(f"{name}/{i}\0{label}\n" for i, label in enumerate(labels))
        assert source.fingerprint() == hashlib.sha256(lines.encode()).hexdigest()

        written = np.concatenate([self.pictures(batch) for batch in batches])
        spec = describe(
            "convnext_tiny",
            classes=source.classes,
            num_classes=len(classes),
            image_size=(224, 224),
            crop_pct=1.0,
        )
        items = Images(source, spec)
        for i, picture in enumerate(written):
            assert np.array_equal(np.asarray(source.open(i)), picture)
            enlarged = np.asarray(Image.fromarray(picture).resize((224, 224), Image.Resampling.BICUBIC))
            pixels = items[i].pixels
            assert pixels.dtype == torch.uint8
            assert np.array_equal(pixels.permute(1, 2, 0), enlarged)

    def test_cifar10(self, downloads: Path):
        classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        files = {f"data_batch_{n}": [n - 1, n + 4] for n in range(1, 6)} | {"test_batch": [9, 0, 3]}
        self.write_cifar(
            downloads / "cifar-10-batches-py", files, "labels", ("batches.meta", "label_names", classes)
        )
        batches = [labels for name, labels in files.items() if name != "test_batch"]
        self.check(load_source("torch/cifar10", split="train"), "torch/cifar10/train", batches, classes)
        self.check(load_source("torch/cifar10", split="test"), "torch/cifar10/test", [[9, 0, 3]], classes)

    def test_cifar100(self, downloads: Path):
        classes = [f"thing {n}" for n in range(100)]
        files = {"train": [99, 0, 5, 42], "test": [7, 99]}
        self.write_cifar(
            downloads / "cifar-100-python", files, "fine_labels", ("meta", "fine_label_names", classes)
        )
        for split, labels in files.items():
            self.check(
                load_source("torch/cifar100", split=split), f"torch/cifar100/{split}", [labels], classes
            )

    def test_svhn(self, downloads: Path):
        """Its files call the digit 0 class 10, and have the image's number as the last axis."""
        scipy_io = pytest.importorskip("scipy.io")
        files = {"train": [1, 0, 9, 5], "test": [0, 0, 3], "extra": [4, 2]}
        for split, labels in files.items():
            y = np.array([[label or 10] for label in labels], dtype=np.uint8)
            scipy_io.savemat(
                downloads / f"{split}_32x32.mat", {"X": self.pictures(labels).transpose(1, 2, 3, 0), "y": y}
            )
        for split, labels in files.items():
            self.check(
                load_source("torch/svhn", split=split), f"torch/svhn/{split}", [labels], list("0123456789")
            )

    @pytest.mark.parametrize("data", ["imagenet", "imagenette2"])
    def test_folders(self, tmp_path: Path, data: str):
        """ImageNet as torchvision's script leaves it, and ImageNette as fast.ai's archive unpacks."""
        wnids = ("n01440764", "n02102040", "n03000684")
        for split, each in (("train", 2), ("val", 1)):
            write_photos(tmp_path / data / split, classes=wnids, each=each, size=300)
        (tmp_path / data / "noisy_imagenette.csv").write_text("path,noisy_labels_0\n")
        train, val = (load_source(str(tmp_path / data), split=split) for split in ("train", "val"))
        assert train.classes == val.classes == wnids
        assert train.labels == [0, 0, 1, 1, 2, 2]
        assert val.labels == [0, 1, 2]
        assert val.names == [f"{wnid}/0.png" for wnid in wnids]
        assert (
            train.fingerprint()
            == load_source(str(tmp_path / data / "train")).fingerprint()
            != val.fingerprint()
        )
        with pytest.raises(DataError, match="side by side"):
            load_source(str(tmp_path / data))

    @pytest.mark.parametrize("data", ["torch/cifar10", "torch/cifar100", "torch/svhn"])
    def test_no_network(self, cli, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str):
        def refuse(*_: object, **__: object) -> None:
            raise urllib.error.URLError("no network")

        monkeypatch.setattr("urllib.request.urlopen", refuse)
        monkeypatch.setattr("certipatch.data.named.DOWNLOADS", tmp_path / "downloads")
        done = cli(
            "train",
            model="small-cnn",
            data=data,
            val_data=photos,
            strategy="vanilla",
            patch=5,
            out=tmp_path / "run",
        )
        assert done.code == 2
        assert done.err.splitlines() == [
            f"certipatch: data {data}, split 'train': cannot be had (<urlopen error no network>)"
        ]

    @pytest.mark.parametrize("data", ["torch/cifar10", "torch/svhn"])
    def test_a_mistyped_split_is_not_the_test_split(self, downloads: Path, data: str):
        self.test_cifar10(downloads)
        with pytest.raises(ConfigError, match=r"trian.*train.*test"):
            load_source(data, split="trian")


def test_an_empty_class_folder_is_named(photos: Path, tmp_path: Path):
    """timm drops it, and every class after it would move up."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    for hidden in (".git", ".ipynb_checkpoints"):
        (data / hidden).mkdir()
    assert load_source(str(data)).classes == ("blue", "green", "red")

    (data / "fuchsia").mkdir()
    (data / "fuchsia" / "notes.txt").write_text("to be scanned")
    with pytest.raises(DataError, match="every class folder, found none in fuchsia;"):
        load_source(str(data))
    source = load_source(str(data), classes=("blue", "fuchsia", "green", "red"))
    assert source.labels == [0] * 8 + [2] * 8 + [3] * 8
    assert "no images in the class folders fuchsia" in source.remarks[-1]


def test_a_file_that_is_no_tar_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"expected a folder or \.tar") as refused:
        load_source(str(tmp_path / "photos.zip"))
    assert "\n" not in str(refused.value)


def test_digits_are_judged_on_their_test_part():
    assert judged_split("digits", None) == "test"
    assert judged_split("digits", "train") == "train"
    assert judged_split("torch/cifar10", None) is None
    assert judged_split("torch/cifar10", "val") == "val"


def test_every_class_needs_an_image_to_train_and_to_be_judged():
    def source(labels: list[int], classes: tuple[str, ...] = ("cat", "dog")) -> Source:
        return Source(
            classes, [f"{i}.png" for i in range(len(labels))], labels, lambda i: Image.new("L", (1, 1))
        )

    check_training_classes(source([0, 1]), source([1, 0, 0]))
    with pytest.raises(DataError, match=r"training data: .* none of dog"):
        check_training_classes(source([0, 0]), source([0, 1]))
    with pytest.raises(DataError, match=r"validation data: .* none of cat"):
        check_training_classes(source([0, 1]), source([1]))
    with pytest.raises(DataError, match="expected the classes cat, dog, found dog, cat"):
        check_training_classes(source([0, 1]), source([0, 1], ("dog", "cat")))


def test_a_thousand_classes_are_checked_at_once():
    """At ImageNet's size; a set of its labels made anew for each class would take 20 s."""
    labels = [i % 1000 for i in range(1_281_167)]
    source = Source(
        tuple(map(str, range(1000))), range(len(labels)), labels, lambda i: Image.new("L", (1, 1))
    )
    before = time.monotonic()
    check_training_classes(source, source)
    assert time.monotonic() - before < 5
