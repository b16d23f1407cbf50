"""Data sets that timm knows by name: streams and the hub's libraries, on local files."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from certipatch import models
from certipatch.data import Images, load_source
from certipatch.errors import DataError


def write_shard(path: Path, photos: Path, *, broken: bool = False) -> None:
    """A WebDataset shard: 00000.png, 00000.cls, 00001.png ..."""
    with tarfile.open(path, "w") as tar:
        for n, image in enumerate(sorted(photos.glob("*/*.png"))):
            label = ["blue", "green", "red"].index(image.parent.name)
            for extension, data in (("jpg", b"junk" if broken and n == 5 else image.read_bytes()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{n:05d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.mark.filterwarnings("default")  # webdataset leaves its file to the garbage collector
def test_wds_is_read_whole_and_an_unreadable_image_surfaces(photos: Path, tmp_path: Path):
    """timm's reader drops an unreadable image of a stream; a certificate's denominator must not shrink in silence."""
    pytest.importorskip("webdataset")
    write_shard(tmp_path / "good-0000.tar", photos)
    source = load_source(f"wds/{tmp_path}", split="good-0000.tar|24")
    assert source.labels == [0] * 8 + [1] * 8 + [2] * 8
    spec = models.describe(models.SMALL_CNN, classes=source.classes, num_classes=3)
    direct = Images(load_source(str(photos)), spec)
    assert all((Images(source, spec)[i].pixels == direct[i].pixels).all() for i in range(24))

    write_shard(tmp_path / "bad-0000.tar", photos, broken=True)
    with pytest.raises(DataError, match="cannot be read"):
        load_source(f"wds/{tmp_path}", split="bad-0000.tar|24")


@pytest.mark.filterwarnings("default")  # of pyarrow and datasets
def test_hfds_on_a_local_folder(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("certipatch.data.DOWNLOADS", tmp_path)
    source = load_source(f"hfds/{photos}", split="train")
    assert source.classes == ("blue", "green", "red")
    assert source.labels == [0] * 8 + [1] * 8 + [2] * 8
    assert source.open(9).size == (32, 32)


def test_an_image_is_never_read_through_another_process_offset(photos: Path, tmp_path: Path):
    """Two loader processes read one tar at the same time and see what one sees."""
    import torch
    from torch.utils.data import DataLoader

    from certipatch.data import collate

    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, arcname="photos")
    source = load_source(str(tmp_path / "photos.tar"))
    spec = models.describe(models.SMALL_CNN, classes=source.classes, num_classes=3)
    alone, together = (
        torch.cat([pixels for pixels, _ in DataLoader(Images(source, spec), batch_size=1, collate_fn=collate, num_workers=workers)])
        for workers in (0, 2)
    )
    assert torch.equal(alone, together)
