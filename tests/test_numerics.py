"""What should not matter moves no certificate above the margin that docs/trust.md states, in float32 and in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from certipatch import models, runtime
from certipatch.data import Images, as_float, load_source
from certipatch.defense import PatchCleanser
from certipatch.masks import MaskSet


@pytest.mark.parametrize(("precision", "stated"), [("32-true", 1e-3), ("bf16-mixed", 0.25)])
def test_batch_order_and_threads_flip_no_certificate(trained: Path, photos: Path, one_thread: None, precision: str, stated: float):
    """Patches so large that some certificates are close; in float32 hardly any is closer than the stated margin."""
    spec, network, _ = models.load_run(trained)
    images = Images(load_source(str(photos)), spec)
    items = [images[index] for index in range(0, 24, 2)]
    pixels, labels = as_float(torch.stack([item.pixels for item in items])), torch.tensor([item.label for item in items])
    masks = MaskSet.covering(image_size=spec.image_size, patch_size=(12, 12), masks_per_axis=2)
    model = runtime.fabric(device="cpu", precision=precision).setup_module(network).eval()

    def certify(batch_size: int, order: torch.Tensor, threads: int) -> list[tuple[bool, float]]:
        torch.set_num_threads(threads)
        verdicts = PatchCleanser(model, masks, batch_size=batch_size).certify(pixels[order], labels[order])
        return [(bool(verdicts[place].certified), verdicts[place].margin) for place in order.argsort().tolist()]

    forwards = torch.arange(len(items))
    first = certify(64, forwards, 1)
    above = [a for a, (certified, margin) in enumerate(first) if certified and margin > stated]
    assert len(above) >= 4
    assert any(not certified for certified, _ in first)
    for batch_size, order, threads in [(1, forwards, 1), (7, forwards.flip(0), 1), (64, forwards, 2)]:
        again = certify(batch_size, order, threads)
        for a in above:
            assert again[a][0]
            assert abs(again[a][1] - first[a][1]) < stated
