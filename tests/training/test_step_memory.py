"""What a training step takes is said before it starts, where it is much."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from certipatch.models.small import Normalize
from certipatch.runtime.devices import make_fabric
from certipatch.training import memory
from certipatch.training.memory import say_memory, step_bytes


def test_what_is_kept_for_the_backward_pass():
    """The inputs of both layers and the sign of the activation, for each view; gradient and momentum once."""
    body = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 50, bias=False), nn.Sigmoid(), nn.Linear(50, 2, bias=False)
    )
    model = nn.Sequential(Normalize((0.5,) * 3, (0.5,) * 3), body).train()
    weights = 4 * (192 * 50 + 50 * 2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    image, normalised, activation = 4 * 192, 4 * 192, 4 * 50
    for views in (1, 40):
        expected = 1.1 * (views * (image + normalised + activation) + 3 * weights)
        assert step_bytes(model, (8, 8), views, "32-true") == pytest.approx(expected, rel=0.01)
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_is_said_where_it_is_much(monkeypatch: pytest.MonkeyPatch, capsys):
    model, fabric = nn.Sequential(nn.Flatten(), nn.Linear(3 * 40 * 50, 9)), make_fabric(device="cpu")
    say_memory(model, (40, 50), 64, fabric)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(memory, "MUCH", 1e6)
    say_memory(model, (40, 50), 2**14, fabric)
    said = capsys.readouterr().err.replace("\n", "")
    assert said.startswith("a step will take about 0.9 GB of memory for its 16384 views of 40x50 pixels; ")
    assert "--batch-size" in said
