"""Every private interface of torch, Fabric and timm that the package uses, with a test of what it relies on.

A release of theirs that changes one of them fails here, by name, and not somewhere in a certificate. The last
test finds what is used and not listed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from timm.models import _hub
from torch import nn

SRC = Path(__file__).parents[2] / "src" / "certipatch"


def fabric_precision():
    """runtime/devices.py: Fabric's name of the precision in use."""
    assert Fabric(accelerator="cpu", precision="bf16-mixed")._precision.precision == "bf16-mixed"


def inductor_config():
    """views/network.py: weights frozen into the code, or BatchNorm folded in at each call."""
    with torch._inductor.config.patch({"freezing": True, "efficient_conv_bn_eval_fx_passes": False}):
        assert torch._inductor.config.freezing is True
        assert torch._inductor.config.efficient_conv_bn_eval_fx_passes is False


def dynamo_limit_and_backend():
    """views/network.py: any number of networks in a process, each with a compiler of its own."""
    with torch._dynamo.config.patch(recompile_limit=10**6):
        assert torch._dynamo.config.recompile_limit == 10**6
    assert callable(torch._dynamo.lookup_backend("inductor"))


def hooks_of_a_module():
    """views/network.py, views/prefix.py: hooks are kept by numbers that are given out once."""
    layer = nn.ReLU()
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    first = layer.register_forward_hook(lambda *_: None)
    layer.register_forward_pre_hook(lambda *_: None)
    numbers = {*layer._forward_hooks, *layer._forward_pre_hooks}
    assert len(numbers) == 2
    first.remove()
    again = layer.register_forward_hook(lambda *_: None)
    assert again.id not in numbers


def version_of_a_tensor():
    """views/network.py: a tensor that is changed in place counts its changes."""
    weight = torch.zeros(2)
    before = weight._version
    weight.add_(1)
    assert weight._version > before


def fake_tensors():
    """views/prefix.py: shapes without numbers."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert (torch.zeros(2, 3) @ torch.zeros(3, 4)).shape == (2, 4)


def dispatch_mode_and_overload_names():
    """views/prefix.py: every operation of a network passes by, with the name of its overload."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            seen.append((str(operation), operation._overloadname))
            return operation(*args, **kwargs or {})

    with Seen():
        torch.zeros(2) + 1
    assert ("aten.add.Tensor", "Tensor") in seen


def leaves_of_a_tree():
    """views/prefix.py: the tensors in nested arguments."""
    from torch.utils._pytree import tree_leaves

    assert tree_leaves([1, {"a": (2, 3)}]) == [1, 2, 3]


def compiled_module():
    """models/weights.py: ``torch.compile`` keeps the module it wraps, and prefixes names in its state."""
    layer = nn.Linear(2, 2)
    assert torch.compile(layer)._orig_mod is layer
    assert "_orig_mod.weight" in torch.compile(layer).state_dict()


def bf16_of_the_processor():
    """runtime/checks.py: whether the CPU multiplies bfloat16; where it is missing, the answer is no."""
    assert getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() in (True, False)


def config_for_the_hub():
    """deploy/push.py: timm writes the config.json by which it loads a model of the hub."""
    assert {"model", "config_path", "model_config"} <= {
        *inspect.signature(_hub.save_config_for_hf).parameters
    }


PRIVATE: dict[str, Callable[[], None]] = {
    "_precision": fabric_precision,
    "_inductor": inductor_config,
    "_dynamo": dynamo_limit_and_backend,
    "_forward_hooks": hooks_of_a_module,
    "_forward_pre_hooks": hooks_of_a_module,
    "_version": version_of_a_tensor,
    "_subclasses": fake_tensors,
    "_python_dispatch": dispatch_mode_and_overload_names,
    "_overloadname": dispatch_mode_and_overload_names,
    "_pytree": leaves_of_a_tree,
    "_hub": config_for_the_hub,
    "_orig_mod": compiled_module,
    "_is_avx512_bf16_supported": bf16_of_the_processor,
}


@pytest.mark.parametrize("name", PRIVATE)
def test_of(name: str):
    PRIVATE[name]()


def test_each_is_listed():
    """Names behind a dot that begin with one underscore, and are neither Python's nor ours."""
    texts = {path: path.read_text(encoding="utf-8") for path in SRC.rglob("*.py")}
    ours = {name for text in texts.values() for name in re.findall(r"(?:\bdef |self\.)(_\w+)", text)}
    used = {
        name: path.name
        for path, text in texts.items()
        for name in re.findall(r"(?<!self)\.(_[a-z]\w*)", text)
        if name not in ours | {"_exit", "_orig_mod", "_replace"}
    }
    assert {*used} | {"_orig_mod", "_is_avx512_bf16_supported"} == {*PRIVATE}, used
