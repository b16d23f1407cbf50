"""Folders and tars as people and systems leave them: each image is counted or named, in one order."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.utils.misc import natural_key

from certipatch.data.load import load_source
from certipatch.data.names import IMAGE_ENDINGS, in_order
from certipatch.errors import DataError
from inputs import write_photos

TIES = (
    *("1", "01", "001", "\u0660\u0661", "\uff11"),  # numbers of one value, also in other digits
    *("cat", "Cat", "CAT", "cAt"),
    *("a1b02", "A1b2", "a01B2", "a1B02"),
    *("K", "\u212a", "k"),  # KELVIN SIGN has the lower case k
    *(unicodedata.normalize(form, "café") for form in ("NFC", "NFD")),
    *("m²", "1²", "1²2", "9" * 200, "0" + "9" * 200),
)


class TestOrder:
    def test_ties_are_broken_by_the_name(self):
        """One order of any set of names, whatever order they come in."""
        expected = sorted(TIES, key=in_order)
        assert len(set(expected)) == len(TIES)
        for seed in range(50):
            assert sorted(random.Random(seed).sample(TIES, len(TIES)), key=in_order) == expected
        for one, other in itertools.pairwise(expected):
            if in_order(one)[0] == in_order(other)[0]:
                assert one < other

    def test_without_ties_it_is_timms(self):
        names = [
            f"{word}{n}/{m}.png" for word in ("n0", "Zebra", "apple") for n in (2, 10, 1) for m in (9, 11)
        ]
        assert sorted(names, key=in_order) == sorted(names, key=natural_key)

    @pytest.mark.parametrize("packed", [False, True])
    def test_of_classes_and_images(self, tmp_path: Path, packed: bool):
        """Neither the order in which files were written nor the hash seed shows."""
        found = set()
        for seed in (1, 3):
            root = tmp_path / str(seed) / "data"
            members = [
                (c, n) for c in ("1", "01", "Cat", "cat") for n in ("1.png", "01.png", "A.png", "a.png")
            ]
            random.Random(seed).shuffle(members)
            for folder, name in members:
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (1, 1)).save(root / folder / name)
            if packed:
                with tarfile.open(root.with_suffix(".tar"), "w") as tar:
                    for folder, name in members:
                        tar.add(root / folder / name, f"{folder}/{name}")
            place = root.with_suffix(".tar") if packed else root
            script = (
                "import sys, json; from certipatch.data import load_source; s = load_source(sys.argv[1]);"
                "print(json.dumps([s.classes, list(s.names), list(s.labels), s.fingerprint()]))"
            )
            environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
            done = subprocess.run(
                [sys.executable, "-c", script, place], env=environment, capture_output=True, check=True
            )
            found.add(done.stdout)
        (one,) = found
        classes, names, labels, _ = json.loads(one)
        assert classes == ["01", "1", "Cat", "cat"]
        assert names[:5] == ["01/01.png", "01/1.png", "1/01.png", "1/1.png", "01/A.png"]
        assert [classes[label] for label in labels] == [name.split("/")[0] for name in names]


class TestEveryImageIsCounted:
    def test_all_that_pillow_reads(self):
        """Other builds of Pillow have other endings; data, documents and films are left out, and named."""
        Image.init()
        readable = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        assert readable - IMAGE_ENDINGS <= {
            *(".h5", ".hdf", ".bufr", ".grib", ".mpg", ".mpeg", ".iim", ".pdf", ".palm")
        }

    @pytest.mark.parametrize("packed", [False, True])
    def test_of_any_kind(self, tmp_path: Path, packed: bool):
        data = write_photos(tmp_path / "data", each=1)
        for ending in ("webp", "bmp", "tif", "TIFF", "gif", "JPG", "jpeg", "ppm", "jp2"):
            Image.new("RGB", (2, 2)).save(data / "red" / f"x.{ending}")
        shutil.copy(data / "red" / "x.JPG", data / "red" / "y.jfif")
        (data / "red" / "z.heic").write_bytes(b"no reader for this")
        source = load_source(packed_as_tar(data) if packed else str(data))
        assert len(source) == 3 + 9 + 2
        assert source.remarks == ()
        assert source.open(list(source.names).index("red/y.jfif")).size == (2, 2)

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize(
        ("left", "said"),
        [
            (("red/._0.png", "blue/._0.png"), "2 whose names begin with ._ (blue/._0.png, red/._0.png)"),
            (("red/.DS_Store",), "1 of .DS_Store (red/.DS_Store)"),
            (("red/Thumbs.db", "labels.csv"), "1 of .csv (labels.csv); 1 of .db (red/Thumbs.db)"),
            (("red/0.png~", "red/noext"), "1 of .png~ (red/0.png~); 1 without an ending (red/noext)"),
            (("red/clip.mpg",), "1 of .mpg"),
            ((".ipynb_checkpoints/0.png",), "(.ipynb_checkpoints/)"),
            (("red/.ipynb_checkpoints/0.png", "red/.ipynb_checkpoints/1.png"), "(red/.ipynb_checkpoints/)"),
            (("__MACOSX/red/._0.png",), "(__MACOSX/)"),
            (("red/@eaDir/0.jpg",), "(red/@eaDir/)"),
            ((".git/HEAD",), "(.git/)"),
        ],
    )
    def test_or_named(self, tmp_path: Path, packed: bool, left: tuple[str, ...], said: str):
        """What is no image by its name, or lies in a folder that a system or a program made."""
        data = write_photos(tmp_path / "data", each=2)
        before = load_source(str(data))
        for name in left:
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(data / "red" / "0.png", data / name)
        source = load_source(packed_as_tar(data) if packed else str(data))
        (line,) = source.remarks
        assert said in line
        assert source.take([0]).remarks == source.remarks
        assert source.fingerprint() == before.fingerprint()

    def test_a_hidden_folder_that_the_model_knows_is_a_class(self, tmp_path: Path):
        """A run that was trained on it goes on; and an image whose name begins with a dot is an image."""
        data = write_photos(tmp_path / "data", classes=(".net", "red"), each=1)
        shutil.copy(data / "red" / "0.png", data / "red" / ".1.png")
        source = load_source(str(data), classes=(".net", "red"))
        assert source.labels == [0, 1, 1]
        assert source.remarks == ()

    def test_a_folder_that_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        data, scandir = write_photos(tmp_path / "data", each=1), os.scandir

        def locked(path: str) -> object:
            if str(path).endswith("red"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", locked)
        with pytest.raises(DataError, match=r"can be read .*Permission denied"):
            load_source(str(data))


class TestLinks:
    def test_a_folder_twice_is_refused(self, tmp_path: Path):
        data = write_photos(tmp_path / "data", each=1)
        os.symlink(data / "red", data / "rouge")
        with pytest.raises(DataError, match=r"found red again as rouge|found rouge again as red"):
            load_source(str(data))
        os.remove(data / "rouge")
        os.symlink("..", data / "red" / "up")  # a circle
        with pytest.raises(DataError, match="again as red/up"):
            load_source(str(data))

    @pytest.mark.parametrize("link", [os.symlink, os.link])
    def test_an_image_twice_is_named(self, tmp_path: Path, link):
        data = write_photos(tmp_path / "data", each=1)
        link(data / "red" / "0.png", data / "blue" / "9.png")
        source = load_source(str(data))
        assert len(source) == 4
        (line,) = source.remarks
        assert "1 images are taken twice" in line
        assert "red/0.png is blue/9.png" in line

    def test_links_to_elsewhere_are_followed(self, tmp_path: Path):
        store = write_photos(tmp_path / "store", each=2)
        data = tmp_path / "data"
        (data / "red").mkdir(parents=True)
        os.symlink(store / "blue", data / "blue")
        os.symlink(store / "red" / "1.png", data / "red" / "1.png")
        os.symlink("/nowhere/2.png", data / "red" / "2.png")
        source = load_source(str(data))
        assert source.names == ["blue/0.png", "blue/1.png", "red/1.png", "red/2.png"]
        assert source.remarks == ()
        with pytest.raises(OSError, match=r"2\.png"):
            source.open(3)  # so that it is named as unreadable


class TestTar:
    def refused(self, path: Path, words: str) -> None:
        with pytest.raises(DataError, match=words) as refusal:
            load_source(str(path))
        assert "\n" not in str(refusal.value)

    def test_any_name(self, photos: Path, tmp_path: Path):
        for name in ("photos.tar", "UPPER.TAR", "archive"):
            shutil.move(packed_as_tar(photos, tmp_path / "t.tar"), tmp_path / name)
            assert load_source(str(tmp_path / name)).fingerprint() == load_source(str(photos)).fingerprint()

    @pytest.mark.parametrize("name", ["photos.tar.gz", "photos.tgz", "photos.tar"])
    def test_a_compressed_one(self, photos: Path, tmp_path: Path, name: str):
        content = Path(packed_as_tar(photos, tmp_path / "t.tar")).read_bytes()
        (tmp_path / name).write_bytes(gzip.compress(content))
        self.refused(tmp_path / name, "not compressed.*gunzip")

    def test_one_image_is_no_folder(self, photos: Path):
        self.refused(photos / "red" / "0.png", "one image; name the folder")

    def test_a_damaged_one(self, photos: Path, tmp_path: Path):
        """Python takes a damaged member for the end, and the images behind it for none."""
        path = tmp_path / "t.tar"
        content = Path(packed_as_tar(photos, path)).read_bytes()
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        for cut in (members[9].offset, members[9].offset + 100, members[9].offset_data + 10):
            path.write_bytes(content[:cut])
            self.refused(path, "t.tar")
        path.write_bytes(content[: members[9].offset] + b"x" * 512 + content[members[9].offset + 512 :])
        self.refused(path, "cut off or damaged")
        path.write_bytes(content + content)
        self.refused(path, "another tar appended")

    def test_a_member_twice(self, photos: Path, tmp_path: Path):
        path = packed_as_tar(photos, tmp_path / "t.tar")
        with tarfile.open(path, "a") as tar:
            tar.add(photos / "red" / "0.png", "./red/0.png")
        self.refused(Path(path), "once in the tar")

    def test_a_tar_inside(self, photos: Path, tmp_path: Path):
        inner = packed_as_tar(photos, tmp_path / "inner.tar")
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            tar.add(photos, "photos")
            tar.add(inner, "more/inner.TAR")
        self.refused(tmp_path / "t.tar", "tars inside it")

    def test_an_empty_class_folder(self, photos: Path, tmp_path: Path):
        shutil.copytree(photos, tmp_path / "data")
        (tmp_path / "data" / "fuchsia").mkdir()
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            tar.add(tmp_path / "data", "./photos")
        self.refused(tmp_path / "t.tar", "found none in fuchsia")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [b"caf\xe9/0.png", b"red/caf\xe9.png", b"red/caf\xe9.txt"])
def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path, packed: bool, name: bytes):
    """No record or manifest could hold it."""
    data = write_photos(tmp_path / "data", each=1)
    path = os.fsencode(data) + b"/" + name
    os.makedirs(os.path.dirname(path), exist_ok=True)
    shutil.copy(data / "red" / "0.png", path)
    with pytest.raises(DataError, match=r"UTF-8, found .*caf.udce9") as refusal:
        load_source(packed_as_tar(data) if packed else str(data))
    str(refusal.value).encode()


def packed_as_tar(folder: Path, to: Path | None = None) -> str:
    """A tar of what is in a folder, under the names that it has there."""
    path = to or folder.with_suffix(".tar")
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as tar:
        for found, _, files in os.walk(folder):
            for name in files:
                inside = os.path.relpath(os.path.join(found, name), folder)
                content = Path(found, name).read_bytes()
                member = tarfile.TarInfo(inside)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(path)


def test_a_picture_is_the_same_from_a_tar(photos: Path, tmp_path: Path):
    folder, tar = load_source(str(photos)), load_source(packed_as_tar(photos, tmp_path / "t.tar"))
    for i in range(len(folder)):
        assert np.array_equal(np.asarray(folder.open(i)), np.asarray(tar.open(i)))
