"""``--engine ray``: who computes what a command writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..runtime.team import Team

ENGINES = ("ray",)


@contextmanager
def team_of(
    engine: str | None, address: str | None, devices_per_node: int | None, device: str
) -> Iterator[Team | None]:
    """The workers that were asked for, started; None without ``--engine``.

    Raises ConfigError for another engine, or for options that only an engine has, and what
    :class:`certipatch.runtime.team.Team` raises.
    """
    check_engine(engine, address, devices_per_node)
    if engine is None:
        yield None
        return
    from ..runtime.team import Team, TeamAsked

    with Team(TeamAsked(address, devices_per_node, device)) as team:
        yield team


def check_engine(engine: str | None, address: str | None, devices_per_node: int | None) -> None:
    """Raises ConfigError for what ``team_of`` does not take, before any work."""
    if engine is not None and engine not in ENGINES:
        raise ConfigError(f"engine {engine!r}: expected {' or '.join(ENGINES)}")
    if engine is None and (address is not None or devices_per_node is not None):
        raise ConfigError("--address and --devices-per-node: expected --engine ray with them")


def own_device(engine: str | None, device: str) -> str:
    """The device of this process, which only probes the model where workers do the rest."""
    return device if engine is None else "cpu" if device == "cpu" else "auto"
