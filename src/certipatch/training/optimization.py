"""What moves the weights in a step, and how far: the optimizer and the learning rate, made by timm."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from ..errors import ConfigError, brief
from .config import PAPERS, TrainConfig

DEFAULT_MOMENTUM = TrainConfig.model_fields["momentum"].default


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of the model's parameters.

    Raises ConfigError for one that timm does not know or that cannot train this model, and for a momentum of
    one that has none.
    """
    name = config.optimizer or PAPERS["optimizer"]
    _check_optimizer(name, config.momentum)
    # Where nothing decays, timm's groups of what does and what does not have no use.
    what = model if config.weight_decay else model.parameters()
    how = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    try:
        return create_optimizer_v2(what, opt=name, **how, **_fused(name, model))  # type: ignore[arg-type]
    except Exception as error:
        raise ConfigError(
            f"optimizer {name}: {type(error).__name__}: {brief(error, 160)}; choose another"
        ) from error


def _fused(name: str, model: nn.Module) -> dict[str, bool]:
    """On CUDA all weights move in one kernel, where the optimizer has such a one."""
    on_cuda = any(parameter.device.type == "cuda" for parameter in model.parameters())
    has_it = "fused" in inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters
    return {"fused": True} if on_cuda and has_it else {}


def _check_optimizer(name: str, momentum: float) -> None:
    known = list_optimizers()
    if name not in known:
        raise ConfigError(f"optimizer {name!r}: expected timm's name of one ({', '.join(known)})")
    about = get_optimizer_info(name)
    if about.second_order:
        raise ConfigError(f"optimizer {name}: expected one that needs first derivatives only")
    if momentum != DEFAULT_MOMENTUM and not about.has_momentum:
        raise ConfigError(f"momentum {momentum:g}: expected an optimizer that has one, found {name}")


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> Callable[[int, int], float]:
    """A function that sets the learning rate of a step, and returns it.

    It takes the epoch and the step in it, both counted from 0, and remembers nothing, so a resumed run goes
    on as it would have. ``steps`` are those of an epoch. Make it before the optimizer's state is restored.
    """
    how: dict[str, Any] = {"step_on_epochs": config.schedule in (None, "constant")}
    match config.schedule:
        case None:
            # timm counts the epochs from 1 here.
            how |= {"sched": "multistep", "decay_milestones": [max(1, config.epochs // 2) + 1]}
            how |= {"decay_rate": config.lr_decay}
        case "constant":
            how |= {"sched": "multistep", "decay_milestones": []}
        case "linear":
            how |= {"sched": "poly", "decay_rate": 1.0}  # the power
        case other:
            how |= {"sched": other}
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=config.epochs, updates_per_epoch=steps, **how)
    assert scheduler is not None

    def set_lr(epoch: int, step: int) -> float:
        scheduler.step(epoch)  # heard by a schedule of epochs only
        scheduler.step_update(epoch * steps + step)  # and this by one of steps
        return float(optimizer.param_groups[0]["lr"])

    return set_lr
