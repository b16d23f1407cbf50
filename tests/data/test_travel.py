"""Images that travel: what a worker makes of the bytes that it is sent is what the driver sees."""

from __future__ import annotations

import tarfile
from dataclasses import replace

import pytest
import torch

from certipatch.data.load import load_source
from certipatch.data.source import Images
from certipatch.data.travel import Block, Seen, packed
from certipatch.models.build import describe
from certipatch.models.small import SMALL_CNN
from inputs import write_photos


@pytest.fixture
def folder(tmp_path):
    found = write_photos(tmp_path / "photos", each=3)
    (found / "green" / "1.png").write_bytes(b"no image")
    (found / "red" / "0.png").write_bytes(b"")
    return found


def sources(folder, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(folder, "photos")
    in_folder = load_source(str(folder))
    return {
        "folder": in_folder,
        "tar": load_source(str(tmp_path / "photos.tar")),
        "some": in_folder.take([7, 4, 0]),
        "no files": replace(in_folder, encoded=None),
        "digits": load_source("digits").first(9),
    }


@pytest.mark.parametrize("kind", ["folder", "tar", "some", "no files", "digits"])
def test_what_is_sent_is_what_the_driver_sees(folder, tmp_path, kind):
    source = sources(folder, tmp_path)[kind]
    spec = describe(SMALL_CNN, classes=source.classes, num_classes=len(source.classes))
    sent = packed(source, Block(range(len(source))))
    worker = Seen(source, spec, source.sample())
    worker.images = Images(replace(source, open=None, encoded=None), spec)  # it sees nothing of it
    received, expected = worker.items(sent), Images(source, spec)
    assert len(received) == len(source)
    for item, other in zip(received, map(expected.__getitem__, range(len(source))), strict=True):
        assert (item.index, item.name, item.label) == (other.index, other.name, other.label)
        assert item.error == other.error
        assert (item.pixels is None) == (other.pixels is None)
        assert item.pixels is None or torch.equal(item.pixels, other.pixels)


def test_a_worker_reads_by_path_what_it_sees(folder):
    source = load_source(str(folder))
    spec = describe(SMALL_CNN, classes=source.classes, num_classes=3)
    seen = Seen(source, spec, source.sample())
    assert [item.index for item in seen.items(Block([0, 1]))] == [0, 1]
    assert seen.items(Block([0, 4])) is None  # image 4 cannot be read: is it the worker, or the image?
    blind = Seen(source, spec, "another sample")
    assert not blind.sees
    assert blind.items(Block([0])) is None
