"""What a model trains on: masks found now, or used again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from certipatch.data.source import Item, stack
from certipatch.geometry.masks import MaskSet
from certipatch.models.small import Normalize
from certipatch.records.manifest import read_manifest
from certipatch.records.read import read_lines
from certipatch.report.certification import strategy
from certipatch.runtime.devices import make_fabric
from certipatch.training.config import TrainConfig
from certipatch.training.masking import Masking
from inputs import typed

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (18, 18)
MASKS = MaskSet.covering(image_size=SIZE, patch_size=(3, 3), masks_per_axis=6)
ITEMS = [Item(i, str(i), i % 3, torch.randint(0, 100, (3, *SIZE), dtype=torch.uint8), None) for i in range(8)]


def masking(**options: object) -> Masking:
    config = TrainConfig(strategy="greedy-multisize", patch_size=(3, 3), masks_per_axis=6, **options)  # type: ignore[arg-type]
    model = torch.nn.Sequential(
        Normalize((0.9,) * 3, (1.0,) * 3), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(972, 3))
    )
    return Masking(model, MASKS, config, make_fabric(device="cpu"), len(ITEMS))


def hidden(made: tuple[torch.Tensor, ...], items: list[Item]) -> dict[int, bytes]:
    """Which pixels are hidden from each image, in both copies: the images are darker than the fill."""
    views = made[0].unflatten(0, (2, len(items))).amax(dim=2) > 0.5
    return {item.index: views[:, a].numpy().tobytes() for a, item in enumerate(items)}


def test_masks_are_used_again_between_searches():
    """In every second epoch what was found in the one before; an image that had no search yet is searched at
    once."""
    used, fresh = masking(search_every=2), masking()
    batches = [
        ITEMS[:6],
        [ITEMS[i] for i in (4, 7, 1, 0)],
        [ITEMS[i] for i in (7, 0, 5, 6)],
        [ITEMS[i] for i in (5, 1, 0, 7)],
    ]
    found, new = [], []
    for epoch, (items, passes) in enumerate(zip(batches, [6, 1, 4, 0], strict=True)):
        for parameter in fresh.model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        used.model.load_state_dict(fresh.model.state_dict())
        made = used(stack(items), epoch, seed=epoch)
        assert made[2] == 25 * passes
        found.append(hidden(made, items))
        new.append(hidden(fresh(stack(ITEMS), epoch, seed=epoch), ITEMS))
    assert len({tuple(epoch.values()) for epoch in new}) == 4, "other weights, other masks"
    assert found == [
        {i: new[0][i] for i in range(6)},
        {4: new[0][4], 7: new[1][7], 1: new[0][1], 0: new[0][0]},
        {i: new[2][i] for i in (7, 0, 5, 6)},
        {5: new[2][5], 1: new[0][1], 0: new[2][0], 7: new[2][7]},
    ]


def test_processes_tell_each_other_what_they_found(monkeypatch: pytest.MonkeyPatch):
    """After a step on two processes, either may have any of the images in the next epoch."""
    whole = masking(search_every=2)
    expected = hidden(whole(stack(ITEMS), 0, seed=0), ITEMS)
    mine, theirs = ITEMS[:4], ITEMS[4:]
    part, other = masking(search_every=2), masking(search_every=2)
    for process, items in ((part, mine), (other, theirs)):
        process.model.load_state_dict(whole.model.state_dict())
        assert process(stack(items), 0, seed=0)[2] == 4 * 25
    told: list[torch.Tensor] = []
    monkeypatch.setattr(
        "certipatch.training.masking.of_all", lambda _, rows: told.append(rows) or torch.cat(told)
    )
    other.share(stack(theirs))
    part.share(stack(mine))
    again = part(stack(ITEMS), 1, seed=0)
    assert again[2] == 0
    assert hidden(again, ITEMS) == expected


def test_train_with_a_cheaper_search(cli, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Searched in the first of two epochs, and in its own precision, while the gradient step keeps its own;
    recorded is what was done."""
    seen, forward = [], torch.nn.Linear.forward

    def watched(layer: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        output = forward(layer, inputs)
        seen.append((torch.is_grad_enabled(), output.dtype))
        return output

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    monkeypatch.setattr("certipatch.models.build._try", lambda *_: None)  # which looks once, in float32
    monkeypatch.setattr("certipatch.training.loop.say_memory", lambda *_: None)  # and so do these
    monkeypatch.setattr("certipatch.training.loop.slow_layers", lambda *_: [])
    dtype = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
    for precision, search in (("32-true", "bf16-mixed"), ("bf16-mixed", "32-true"), ("bf16-mixed", None)):
        run = tmp_path / f"{precision}-{search}"
        monkeypatch.setattr(
            "certipatch.training.loop.vanilla_accuracy", lambda *_: {"correct": 0, "images": 1}
        )
        seen.clear()
        what = {"model": "small-cnn", "data": photos, "val_data": photos, "strategy": "greedy-multisize"}
        how = {"patch": 5, "epochs": 2, "batch_size": 8, "search_every": 2, "precision": precision}
        alone = {"search_precision": search} if search else {}
        done = cli(*typed("train", **what, **how, **alone, out=run))
        assert done.code == 0, done.err
        assert set(seen) == {(True, dtype[precision]), (False, dtype[search or precision])}
        assert [
            line["forward_equivalents"] / line["images"] for line in read_lines(run / "epochs.jsonl")
        ] == [25 + 6, 6]
        asked = read_manifest(run).stated["train"]
        assert (asked["search_every"], asked["search_precision"]) == (2, search)
        assert (
            strategy(SimpleNamespace(trained=read_manifest(run).training.train))
            == "greedy-multisize, 2 epochs (searched in every 2.)"
        )
