"""What should not matter moves no certificate above the margin that docs/trust.md states.

That is the batch, its order, the number of threads and a resume, in float32 and in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from certipatch.certification.blocks import look
from certipatch.certification.certify import WayAsked
from certipatch.certification.certify import certify as certify_opened
from certipatch.data.load import load_source
from certipatch.data.source import Images, Item, as_float
from certipatch.defenses.contract import CertifiedDefense
from certipatch.defenses.patchcleanser.defense import PatchCleanser
from certipatch.geometry.masks import MaskSet
from certipatch.models.runs import load_run, open_run
from certipatch.records.read import read_records
from certipatch.records.schema import Line
from certipatch.runtime.devices import make_fabric

STATED = {"32-true": 1e-3, "bf16-mixed": 0.0625}  # logits, as in docs/trust.md


@pytest.mark.parametrize("precision", STATED)
def test_batch_order_and_threads_flip_no_certificate(
    trained: Path, photos: Path, one_thread: None, precision: str
):
    """Patches are so large, and logits so much smaller than trained, that some certificates are below the
    stated margin in bf16; in float32 none is."""
    stated = STATED[precision]
    spec, network, _ = load_run(trained)
    with torch.no_grad():
        for parameter in network[1][-1].parameters():
            parameter.mul_(0.125)
    images = Images(load_source(str(photos)), spec)
    items = [images[index] for index in range(24)]
    pixels, labels = (
        as_float(torch.stack([item.pixels for item in items])),
        torch.tensor([item.label for item in items]),
    )
    masks = MaskSet.covering(image_size=spec.image_size, patch_size=(12, 12), masks_per_axis=2)
    model = make_fabric(device="cpu", precision=precision).setup_module(network).eval()

    def certify(batch_size: int, order: torch.Tensor, threads: int) -> list[tuple[bool, float]]:
        torch.set_num_threads(threads)
        verdicts = PatchCleanser(model, masks, batch_size=batch_size).certify(pixels[order], labels[order])
        return [
            (bool(verdicts[place].certified), verdicts[place].margin) for place in order.argsort().tolist()
        ]

    forwards = torch.arange(len(items))
    first = certify(64, forwards, 1)
    above, below = of_certified(first, stated)
    assert len(above) >= 8
    assert any(not certified for certified, _ in first)
    print(
        f"{precision}: {len(below)} of {len(above) + len(below)} certificates have a margin of at most "
        f"{stated:g}"
    )
    assert bool(below) == (precision == "bf16-mixed")
    for batch_size, order, threads in [(1, forwards, 1), (7, forwards.flip(0), 1), (64, forwards, 2)]:
        again = certify(batch_size, order, threads)
        for a in above:
            assert again[a][0]
            assert abs(again[a][1] - first[a][1]) < stated


def of_certified(verdicts: list[tuple[bool, float]], stated: float) -> tuple[list[int], list[int]]:
    """The certified images with a margin above what is stated, and the others."""
    certified = [a for a, (is_certified, _) in enumerate(verdicts) if is_certified]
    return [a for a in certified if verdicts[a][1] > stated], [
        a for a in certified if verdicts[a][1] <= stated
    ]


@pytest.mark.parametrize("precision", STATED)
def test_resume_with_another_batch_size_and_more_threads(
    trained: Path,
    photos: Path,
    tmp_path: Path,
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
    blocks_of: Callable[[int], None],
    precision: str,
):
    """A resume in other batches flips no certificate above the stated margin; one as it was begun writes the
    same bytes."""
    blocks_of(8)
    opened, source = open_run(trained), load_source(str(photos))
    masks = MaskSet.covering(image_size=opened.spec.image_size, patch_size=(12, 12), masks_per_axis=2)

    def certify(folder: Path, batch_size: int, threads: int, *, resume: bool = False) -> None:
        torch.set_num_threads(threads)
        fabric = make_fabric(device="cpu", precision=precision)
        way = WayAsked(batch_size=batch_size)
        certify_opened(opened, source, masks, folder, fabric=fabric, way=way, resume=resume)

    class Killed(BaseException):
        pass

    def killed_in_the_second_block(
        defense: CertifiedDefense, device: torch.device, items: list[Item]
    ) -> list[Line]:
        if items[0].index == 8:
            raise Killed
        return look(defense, device, items)

    certify(tmp_path / "whole", 64, 1)
    for folder, batch_size, threads in ((tmp_path / "same", 64, 1), (tmp_path / "other", 7, 2)):
        with monkeypatch.context() as patch:
            patch.setattr("certipatch.certification.work.look", killed_in_the_second_block)
            with pytest.raises(Killed):
                certify(folder, 64, 1)
        certify(folder, batch_size, threads, resume=True)
    whole, same, other = (tmp_path / name / "records.jsonl" for name in ("whole", "same", "other"))
    assert same.read_bytes() == whole.read_bytes()
    pairs = list(zip(read_records(whole.parent), read_records(other.parent), strict=True))
    above = [
        (before, after) for before, after in pairs if before.certified and before.margin > STATED[precision]
    ]
    assert len(above) >= 8
    for before, after in above:
        assert after.certified
        assert abs(after.margin - before.margin) < STATED[precision]
