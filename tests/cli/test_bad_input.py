"""Bad input gets one clear line on stderr and exit code 2, and nothing is lost by it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from filelock import FileLock
from PIL import Image

from certipatch.data.load import load_source
from certipatch.errors import DataError
from certipatch.records.read import read_lines, read_records
from certipatch.records.schema import PatchCleanserRecord
from inputs import refused, typed, write_manifest, write_photos


def train_options(photos: Path, out: Path, **changed: object) -> list[object]:
    options = {"model": "small-cnn", "data": photos, "val_data": photos, "strategy": "vanilla", "patch": 5}
    return typed("train", **options | {"epochs": 1, "batch_size": 8, "out": out} | changed)


def certify_options(model: Path, photos: Path, out: Path, **changed: object) -> list[object]:
    options = {"model": model, "data": photos, "patch": 5, "masks_per_axis": 2, "out": out}
    return typed("certify", **options | changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "resnt18"}, ["unknown model", "resnt18"]),
        ({"model": "convnext_tiny.fb_in22"}, ["unknown model", "convnext_tiny.fb_in22k"]),
        ({"model": "runs/foo"}, ["no training run at runs/foo"]),
        ({"model": "./foo"}, ["no training run at ./foo"]),
        ({"strategy": "greedy"}, ["unknown strategy", "greedy-multisize"]),
        ({"strategy": "gutout-fine", "gradcam_layer": "layer9"}, ["no layer 'layer9'", "8, 10"]),
        ({"strategy": "gutout-fine", "gradcam_layer": "13"}, ["(1, 3)", "--gradcam-layer"]),
        ({"strategy": "random-both", "search_every": 2}, ["search every 2", "searches", "random-both"]),
        ({"search_precision": "bf16-mixed"}, ["search precision", "searches", "vanilla"]),
        ({"strategy": "greedy-coarse", "search_precision": "fp8"}, ["search_precision", "bf16-mixed", "fp8"]),
        ({"strategy": "random-fine", "gradcam_layer": "11"}, ["gutout", "random-fine"]),
        ({"data": "no/such/folder"}, ["no such file or folder"]),
        ({"data": "torch/nothing"}, ["torch/nothing"]),
        ({"split": "nosuch"}, ["split", "nosuch"]),
        ({"data": "digits", "split": "middle"}, ["split", "train and test"]),
        ({"patch": "300%"}, ["300%", "smaller"]),
        ({"patch": "0"}, ["at least 1 pixel"]),
        ({"patch": "-3"}, ["at least 1 pixel"]),
        ({"patch": "40"}, ["40x40", "32x32"]),
        ({"patch": "big"}, ["big", "3%"]),
        ({"masks_per_axis": 0}, ["masks per axis 0"]),
        ({"masks_per_axis": 29}, ["masks per axis 29", "28"]),
        ({"lr": -1}, ["lr"]),
        ({"image_size": "0"}, ["image size"]),
        ({"precision": "half"}, ["half"]),
        ({"precision": "bf16-true"}, ["bf16-true", "bf16-mixed"]),
        ({"val_data": "digits"}, ["validation data", "blue"]),
        ({"device": "abacus"}, ["abacus"]),
        ({"model": "resnet18", "image_size": 32, "weights": "no.pth"}, ["no.pth"]),
    ],
)
def test_options(cli, photos: Path, tmp_path: Path, changed: dict[str, object], words: list[str]):
    refused(cli(*train_options(photos, tmp_path / "run", **changed)), *words)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_pretrained_without_a_network(cli, photos: Path, tmp_path: Path):
    arguments = [*train_options(photos, tmp_path / "run", model="resnet18", image_size=32), "--pretrained"]
    refused(cli(*arguments), "pretrained weights cannot be loaded", "--weights")


def test_a_mistyped_run_in_certify(cli, photos: Path, tmp_path: Path):
    refused(
        cli(*certify_options(tmp_path / "foo", photos, tmp_path / "c")),
        f"no training run at {tmp_path / 'foo'}",
    )


def test_random_weights_are_not_certified(cli, photos: Path, tmp_path: Path):
    refused(cli(*certify_options("resnet18", photos, tmp_path / "c")), "--pretrained")


class TestData:
    def test_no_images(self, cli, tmp_path: Path):
        (tmp_path / "empty" / "cat").mkdir(parents=True)
        refused(cli(*train_options(tmp_path / "empty", tmp_path / "run")), "no images")

    def test_one_class(self, cli, tmp_path: Path):
        data = write_photos(tmp_path / "one", classes=("cat",))
        refused(cli(*train_options(data, tmp_path / "run")), "2 classes", "cat")

    def test_class_missing_in_validation(self, cli, photos: Path, tmp_path: Path):
        validation = write_photos(tmp_path / "val", classes=("blue", "red"))
        refused(cli(*train_options(photos, tmp_path / "run", val_data=validation)), "validation", "green")

    def test_class_folders_at_different_depths(self, cli, photos: Path, tmp_path: Path):
        """train/red and val/red must not be mixed because both are called red."""
        shutil.copytree(photos, tmp_path / "both" / "train")
        shutil.copytree(photos, tmp_path / "both" / "val")
        refused(cli(*train_options(tmp_path / "both", tmp_path / "run")), "side by side", "train")

    @pytest.mark.parametrize("text", ["blue\n\nred\ngreen\n", "blue\nblue\n"])
    def test_class_map_with_blank_or_repeated_lines(self, cli, photos: Path, tmp_path: Path, text: str):
        (tmp_path / "map.txt").write_text(text)
        refused(cli(*train_options(photos, tmp_path / "run", class_map=tmp_path / "map.txt")), "line 2")

    def test_markup_in_names(
        self, cli, trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.chdir(tmp_path)  # so that the name is short, and on one line
        out = Path("[red]x[") / "[bold]y"
        done = cli(*certify_options(trained, photos, out))
        assert done.code == 0, done.err
        assert "[bold]" in cli("report", out).out

    def test_unknown_class_in_validation(self, cli, photos: Path, tmp_path: Path):
        validation = write_photos(tmp_path / "val", classes=("blue", "green", "pink"))
        refused(cli(*train_options(photos, tmp_path / "run", val_data=validation)), "pink")

    def test_fewer_classes_keep_their_labels(self, tmp_path: Path):
        """Folder names, not their positions, say what a label means."""
        data = write_photos(tmp_path / "some", classes=("red",))
        assert load_source(str(data), classes=("blue", "green", "red")).labels == [2] * 8

    @pytest.mark.parametrize("how", ["no folder", "empty folder", "renamed images"])
    def test_a_class_of_the_run_without_an_image(
        self, cli, trained: Path, photos: Path, tmp_path: Path, how: str
    ):
        """A certified share over fewer classes than the run's would look like one over all."""
        data = tmp_path / "data"
        shutil.copytree(photos, data)
        for image in sorted((data / "green").iterdir()):
            image.rename(image.with_suffix(".bin")) if how == "renamed images" else image.unlink()
        if how == "no folder":
            (data / "green").rmdir()
        done = cli(*certify_options(trained, data, tmp_path / "c"))
        refused(done, "images of every class", "green")
        assert not (tmp_path / "c").exists()
        assert ("8 of .bin (green/0.bin, green/1.bin" in done.err) == (how == "renamed images")

    @pytest.mark.parametrize("damage", ["truncated", "empty", "text", "stumbles"])
    def test_unreadable_image(self, cli, trained: Path, photos: Path, tmp_path: Path, damage: str):
        """It is named and not certified in certify, refused in train, and never replaced by its neighbour."""
        data = tmp_path / "data"
        shutil.copytree(photos, data)
        bad = data / "green" / "3.png"
        content = bad.read_bytes()
        tiff = io.BytesIO()
        Image.open(bad).save(tiff, "TIFF")
        # Tag 273 says where the pixels are: as a whole number (4), or as a float (11), over which Pillow
        # stumbles.
        strips = struct.Struct("<HHI")
        stumbles = tiff.getvalue().replace(strips.pack(273, 4, 1), strips.pack(273, 11, 1))
        truncated = content[: len(content) // 2]
        damaged = {"truncated": truncated, "empty": b"", "text": b"not an image", "stumbles": stumbles}
        bad.write_bytes(damaged[damage])

        done = cli(*certify_options(trained, data, tmp_path / "c"))
        assert done.code == 0, done.err
        assert "1 unreadable" in done.out
        records = read_records(tmp_path / "c")
        assert len(records) == 24
        (record,) = (record for record in records if record.error)
        assert record.name == "green/3.png"
        assert not record.certified
        assert record.defended_label is None

        training = cli(*train_options(data, tmp_path / "run", val_data=photos))
        refused(training, "green/3.png", "remove or replace")
        done = cli("predict", bad, photos / "red" / "0.png", model=trained, patch=5, masks_per_axis=2)
        refused(done, "1 of 2 images")
        assert len(done.out.splitlines()) == 2

    def test_decompression_bomb(
        self, cli, trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        # 32 x 32 is now more than the limit that Pillow warns at.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
        done = cli(*certify_options(trained, photos, tmp_path / "c"))
        assert done.code == 0, done.err
        assert all("DecompressionBomb" in record.error for record in read_records(tmp_path / "c"))

    def test_what_is_no_file_is_not_read(self, cli, trained: Path, photos: Path, tmp_path: Path):
        """/dev/zero has no end, and a pipe no beginning."""
        data = write_photos(tmp_path / "data", each=1)
        os.symlink("/dev/zero", data / "red" / "z.png")
        os.mkfifo(data / "red" / "p.png")
        done = cli(*certify_options(trained, data, tmp_path / "c"))
        assert done.code == 0, done.err
        assert [record.error for record in read_records(tmp_path / "c") if record.error] == [
            "OSError: not a regular file"
        ] * 2

    def test_a_compressed_text_that_grows(self, cli, trained: Path, photos: Path, tmp_path: Path):
        """A PNG of a few kilobytes with a comment of a hundred megabytes."""
        data = write_photos(tmp_path / "data", each=1)
        plain = (data / "red" / "0.png").read_bytes()
        body = b"zTXt" + b"note\0\0" + zlib.compress(bytes(100_000_000), 9)
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        (data / "red" / "0.png").write_bytes(plain[:33] + chunk + plain[33:])  # behind the header
        done = cli(*certify_options(trained, data, tmp_path / "c"))
        assert done.code == 0, done.err
        assert [record.name for record in read_records(tmp_path / "c") if record.error] == ["red/0.png"]

    def test_truncated_tar(self, cli, tmp_path: Path):
        (tmp_path / "bad.tar").write_bytes(b"\x00" * 100)
        refused(cli(*train_options(tmp_path / "bad.tar", tmp_path / "run")), "bad.tar")


class TestTar:
    """A tar is read where it lies: nothing is unpacked, so no name in it leads anywhere."""

    def write(self, path: Path, photos: Path, *more: tarfile.TarInfo) -> Path:
        with tarfile.open(path, "w") as tar:
            tar.add(photos, arcname="photos")
            for member in more:
                tar.addfile(member)
        return path

    def member(self, name: str, **attributes: object) -> tarfile.TarInfo:
        member = tarfile.TarInfo(name)
        for key, value in attributes.items():
            setattr(member, key, value)
        return member

    def test_links_and_devices_are_no_images(self, photos: Path, tmp_path: Path):
        """They are not followed, and not left out in silence either."""
        (tmp_path / "secret.png").write_bytes((photos / "red" / "0.png").read_bytes())
        for attributes, word in (
            ({"type": tarfile.SYMTYPE, "linkname": str(tmp_path / "secret.png")}, "dereference"),
            ({"type": tarfile.LNKTYPE, "linkname": "../../secret.png"}, "dereference"),
            ({"type": tarfile.LNKTYPE, "linkname": "photos/red/0.png"}, "dereference"),
            ({"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5}, "plain files"),
            ({"type": tarfile.FIFOTYPE}, "plain files"),
        ):
            for name in ("photos/red/x.png", "photos/violet"):  # a link to a class folder has no ending
                path = self.write(tmp_path / "t.tar", photos, self.member(name, **attributes))
                with pytest.raises(DataError, match=word) as refusal:
                    load_source(str(path))
                assert name in str(refusal.value)

    @pytest.mark.parametrize(
        "name", ["../../../red/evil.png", "/etc/red/evil.png", "photos/red/../../../../evil.png"]
    )
    def test_names_that_lead_out(self, photos: Path, tmp_path: Path, name: str):
        (tmp_path / "in").mkdir()
        path = self.write(tmp_path / "in" / "t.tar", photos, self.member(name))
        with pytest.raises(DataError, match="side by side"):
            load_source(str(path))
        assert os.listdir(tmp_path) == ["in"]
        assert os.listdir(tmp_path / "in") == ["t.tar"]

    def test_a_pickle_beside_it_is_not_read(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        """timm keeps the list of a large tar as a pickle beside it, and older versions run what they find
        there."""
        path = self.write(tmp_path / "t.tar", photos)
        monkeypatch.setattr(os.path, "getsize", lambda _: 11 * 1024**3)
        (tmp_path / "_t_tarinfos.pickle").write_bytes(b"not to be read")
        assert len(load_source(str(path))) == 24

    def test_sparse_files(self, photos: Path, tmp_path: Path):
        path = self.write(
            tmp_path / "t.tar", photos, self.member("photos/red/s.png", type=tarfile.GNUTYPE_SPARSE)
        )
        with pytest.raises(DataError, match="sparse"):
            load_source(str(path))


class TestWords:
    """What a folder, a file or a record is called is shown and never obeyed."""

    NAMES = ("[red]", "a\nb", "\x1b[2J", "$\\x$|<b>")

    def test_class_names(self, cli, tmp_path: Path):
        data = write_photos(tmp_path / "data", classes=self.NAMES, each=2)
        run = tmp_path / "run"
        done = cli(*train_options(data, run), "--json")
        assert done.code == 0, done.err
        done = cli(*certify_options(run, data, tmp_path / "c"))
        assert (done.code, "\x1b" in done.out + done.err) == (0, False), done.err
        answer = cli("predict", data / self.NAMES[1] / "0.png", model=run, patch=5)
        assert len(answer.out.splitlines()) == 1
        others = write_photos(tmp_path / "o", classes=("x\ny\x1b[31m",), each=1)
        refused(cli(*certify_options(run, others, tmp_path / "d")), "x\\ny\\x1b[31m")

    def test_records(self, cli, trained: Path, photos: Path, tmp_path: Path):
        cli(*certify_options(trained, photos, tmp_path / "c"))
        path = tmp_path / "c" / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["experiment"]["model"]["arch"] = "[/red]\x1b[2J\nsmall-cnn"
        manifest["experiment"]["trained"]["strategy"] = "[bold]x"
        write_manifest(path, manifest)
        shown = cli("report", tmp_path / "c")
        assert shown.code == 0, shown.err
        assert "\x1b" not in shown.out
        assert "[bold]x" in shown.out
        manifest["experiment"]["masks"]["patch_size"] = ["[/red]", 5]
        write_manifest(path, manifest)
        refused(cli("report", tmp_path / "c"), "masks.patch_size.0")


class TestWeights:
    def write(self, path: Path, trained: Path, **changed: torch.Tensor) -> Path:
        state = safetensors.torch.load_file(trained / "model.safetensors") | changed
        safetensors.torch.save_file(state, path)
        return path

    def refuse(
        self, cli, photos: Path, tmp_path: Path, weights: Path, *words: str, model: str = "small-cnn"
    ) -> None:
        out = tmp_path / "c"
        refused(cli(*certify_options(model, photos, out, weights=weights)), *words)
        assert not out.exists()

    def test_good_ones_load(self, cli, trained: Path, photos: Path, tmp_path: Path):
        weights = trained / "model.safetensors"
        done = cli(*certify_options("small-cnn", photos, tmp_path / "c", weights=weights))
        assert done.code == 0, done.err

    def test_other_architecture(self, cli, trained: Path, photos: Path, tmp_path: Path):
        weights = trained / "model.safetensors"
        self.refuse(cli, photos, tmp_path, weights, "another architecture", model="test_efficientnet")

    def test_other_class_count(self, cli, trained: Path, tmp_path: Path):
        data = write_photos(tmp_path / "two", classes=("blue", "green"))
        self.refuse(cli, data, tmp_path, trained / "model.safetensors", "3 classes", "2")

    def test_truncated(self, cli, trained: Path, photos: Path, tmp_path: Path):
        whole = (trained / "model.safetensors").read_bytes()
        (tmp_path / "w.safetensors").write_bytes(whole[: len(whole) // 2])
        self.refuse(cli, photos, tmp_path, tmp_path / "w.safetensors", "truncated")
        (tmp_path / "w.pth").write_bytes(b"PK\x03\x04 nothing more")
        self.refuse(cli, photos, tmp_path, tmp_path / "w.pth", "truncated")

    def test_pickle_with_code(self, cli, photos: Path, tmp_path: Path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "pwned"),)

        (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weight": Evil()}, protocol=2))
        self.refuse(cli, photos, tmp_path, tmp_path / "evil.pth", "refused")
        torch.save({"weight": Evil()}, tmp_path / "evil2.pth")
        self.refuse(cli, photos, tmp_path, tmp_path / "evil2.pth", "refused")
        assert not (tmp_path / "pwned").exists()

    def test_pickles_that_stumble(self, cli, photos: Path, tmp_path: Path):
        for code in (b"\x80\x02.", b"\x80\x02}(.", b"\x80\x02ccertipatch.cli\nmain\n.", b"\x80\x02\x85."):
            (tmp_path / "w.pth").write_bytes(code)
            self.refuse(cli, photos, tmp_path, tmp_path / "w.pth", "w.pth")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, cli, trained: Path, photos: Path, tmp_path: Path, value: float):
        weights = self.write(tmp_path / "w.safetensors", trained, **{"13.bias": torch.full((3,), value)})
        self.refuse(cli, photos, tmp_path, weights, "finite", "13.bias")

    def test_a_run_whose_weights_were_swapped(self, cli, trained: Path, photos: Path, tmp_path: Path):
        shutil.copytree(trained, tmp_path / "run")
        self.write(tmp_path / "run" / "model.safetensors", trained, **{"13.bias": torch.zeros(3)})
        refused(cli(*certify_options(tmp_path / "run", photos, tmp_path / "c")), "sha256")


class TestOut:
    def test_another_experiment(self, cli, trained: Path, photos: Path, tmp_path: Path):
        cli(*certify_options(trained, photos, tmp_path / "c"))
        before = (tmp_path / "c" / "records.jsonl").read_bytes()
        other = cli(*certify_options(trained, photos, tmp_path / "c", patch=6), "--resume")
        refused(other, "another experiment", "patch_size")
        refused(cli(*certify_options(trained, photos, tmp_path / "c")), "--resume")
        assert (tmp_path / "c" / "records.jsonl").read_bytes() == before

    def test_among_the_images(self, cli, trained: Path, photos: Path, tmp_path: Path):
        refused(cli(*certify_options(trained, photos, photos / "c")), "outside of the data")
        refused(cli(*certify_options(trained, photos, "")), "found no name")
        assert not (photos / "c").exists()

    def test_not_writable(self, cli, trained: Path, photos: Path, tmp_path: Path):
        (tmp_path / "file").write_text("")
        refused(cli(*certify_options(trained, photos, tmp_path / "file" / "c")), "--out")

    def test_full_disk(
        self,
        cli,
        trained: Path,
        photos: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        blocks_of: Callable[[int], None],
    ):
        """The second write fails as on a full disk: there is one line, and --resume goes on from what was
        written."""
        blocks_of(8)
        whole = tmp_path / "whole"
        cli(*certify_options(trained, photos, whole))

        calls, fsync = [], os.fsync

        def full(handle: int) -> None:
            calls.append(handle)
            if len(calls) == 3:  # the manifest, the first block, the second block
                raise OSError(28, "No space left on device")
            fsync(handle)

        monkeypatch.setattr(os, "fsync", full)
        refused(cli(*certify_options(trained, photos, tmp_path / "c")), "No space left", "--resume")
        monkeypatch.setattr(os, "fsync", fsync)
        assert len(read_lines(tmp_path / "c" / "records.jsonl")) in (8, 16)
        assert cli(*certify_options(trained, photos, tmp_path / "c"), "--resume").code == 0
        assert (tmp_path / "c" / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()

    def test_damaged_records(self, cli, trained: Path, photos: Path, tmp_path: Path):
        cli(*certify_options(trained, photos, tmp_path / "c"))
        path = tmp_path / "c" / "records.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]) + "\n")
        refused(cli("report", tmp_path / "c"), "line 2")
        path.write_text("\n".join([lines[0], lines[0]]) + "\n")
        refused(cli("report", tmp_path / "c"), "occurs twice")
        refused(cli("report", tmp_path / "nothing"), "manifest.json")

    def test_changed_records_of_a_finished_run(self, cli, trained: Path, photos: Path, tmp_path: Path):
        cli(*certify_options(trained, photos, tmp_path / "c"))
        path = tmp_path / "c" / "records.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:10]))
        refused(cli("report", tmp_path / "c"), "10 lines found, 24 written")
        certified = next(line for line in lines if '"certified": true' in line)
        path.write_text(certified.replace('"failing_pair": null', '"failing_pair": [0, 1]'))
        refused(cli("report", tmp_path / "c"), "line 1", "certified, but")

    def test_two_writers(self, cli, trained: Path, photos: Path, tmp_path: Path):
        (tmp_path / "c").mkdir()
        with FileLock(tmp_path / "c" / ".lock"):
            refused(cli(*certify_options(trained, photos, tmp_path / "c")), "another process")


FLAWS = [
    {"pixels": None},
    {"margin": None},
    {"margin": -1.0},
    {"failing_label": 1},
    {"failing_pair": (0, 1)},
    {"defended_label": 1},
    {"case": "majority"},
    {"error": "x"},
]


@pytest.mark.parametrize("flaw", FLAWS, ids=str)
def test_what_a_certified_record_cannot_say(flaw: dict[str, object]):
    image = {"index": 0, "name": "x", "label": 0, "pixels": "0" * 64, "vanilla_label": 1, "defended_label": 0}
    failing = {"failing_pair": None, "failing_label": None}
    fields = {**image, **failing, "case": "agreed", "certified": True, "margin": 0.0, "passes": 11}
    assert PatchCleanserRecord(**fields).certified
    with pytest.raises(ValueError, match="its other fields say it is not"):
        PatchCleanserRecord(**fields | flaw)
