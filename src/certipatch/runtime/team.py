"""A team of Ray actors: each holds the same thing on a device of its own and takes tasks as it gets free.

Ray places and starts the processes, on this machine or a cluster. Here stand only the rules of a run: a
worker computes nothing before it was accepted, a task whose worker died is done again by another, a node that
joins gets workers, and results come in the order of the tasks, whoever did them.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from ..errors import CertiPatchError, ConfigError, MachineError, ProcessError, brief, exit_code, one_line
from .console import stderr

LOOK_SECONDS = 2.0  # between two looks at which nodes there are
WAIT_SECONDS = 30.0  # without any worker, until a line says so
DEATHS = 3  # of workers that held the same task, or on the same device one after another


@dataclass(frozen=True)
class TeamAsked:
    """What ``--engine ray``, ``--address``, ``--devices-per-node`` and ``--device`` ask for.

    Attributes:
        address: of a Ray cluster; None: the one that is at hand, else one of this machine alone.
        devices_per_node: None: every GPU, or on CPUs one worker with all of a node's processors.
        device: "auto", "cpu" or "cuda"; auto: GPUs where the cluster has any.
    """

    address: str | None = None
    devices_per_node: int | None = None
    device: str = "auto"


class Held(Protocol):
    """What a worker holds, made there once: it says what it is, and does tasks."""

    def facts(self) -> Any: ...

    def __call__(self, task: Any, /) -> Any: ...


Make = Callable[[str], Held]  # on "cpu" or "cuda"
Accept = Callable[[Any], str | None]  # facts -> why such a worker is refused; None: it is not


@dataclass(frozen=True)
class Unseen:
    """The answer of a worker that cannot read what a task names: it shall be sent along, ``always`` or this
    time."""

    always: bool = False


AGAIN = object()


@dataclass(frozen=True)
class Failed:
    """What a worker says of an error of ours or of its machine; others are raised by Ray."""

    error: Exception


class Worker:
    """The process on a device, as Ray starts it."""

    held: Held

    def hold(self, make: Make, device: str, folder: str) -> Any:
        """Make what is held, in the folder where the driver is, if there is one here; its facts."""
        stderr.quiet = True  # only the driver speaks
        with suppress(OSError):
            os.chdir(folder)

        def take() -> Any:
            self.held = make(device)
            return self.held.facts()

        return _said(take)

    def do(self, task: Any) -> Any:
        """The result of a task."""
        return _said(lambda: self.held(task))


def _said(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        if exit_code(error) is None:
            raise
        known = isinstance(error, CertiPatchError)
        return Failed(error if known else MachineError(one_line(brief(error, 300)) or "out of memory"))


@dataclass(eq=False)
class Member:
    """A worker as the driver sees it.

    Attributes:
        place: the node and the number of the device there. name: the same, in words.
        state: "new" (holds nothing), "holding" (is making it), "idle", "busy" or "refused".
        sees: whether it can read by itself what tasks name.
    """

    place: tuple[str, int]
    name: str
    actor: Any
    state: str = "new"
    task: int = -1
    sees: bool = True
    facts: Any = None


@dataclass
class Team:
    """Workers on the devices of a Ray cluster; use as a context manager.

    Raises ConfigError for an address where no cluster answers, MachineError for a device that it does not
    have.
    """

    asked: TeamAsked
    members: list[Member] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._open = ExitStack()
        self._open.enter_context(
            redirect_stdout(self._open.enter_context(open(os.devnull, "w", encoding="utf-8")))
        )
        with self._open:  # Ray writes there what becomes of its processes; results are for who asked
            self._enter()
            self._open = self._open.pop_all()
        return self

    def _enter(self) -> None:
        self._ray = connect(self.asked.address)
        self._pending: dict[Any, Member] = {}
        self._deaths: Counter[tuple[str, int]] = Counter()
        self._tries: Counter[int] = Counter()
        self._looked = self._idle_since = time.monotonic() - LOOK_SECONDS
        self._make: Any = None
        self._said_waiting = False
        self._open.callback(self._ray.shutdown)
        self._open.callback(lambda: [self._ray.kill(member.actor) for member in self.members])
        self.device = self._choose_device()

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def noted(self) -> dict[str, Any]:
        """What a manifest says of the engine; the workers are added as they join."""
        return {"engine": f"ray {self._ray.__version__}", "workers": []}

    def lead(self, make: Make, accept: Accept) -> Any:
        """Let one worker make what all shall hold, and give its facts: others may be made after them.

        Raises what ``make`` raises there, and ProcessError if no worker is accepted.
        """
        self._begin(make, accept)
        self._drop_work()
        while True:
            self._look(at_most=1)
            self._receive()
            for member in self.members:
                if member.state == "idle":
                    return member.facts

    def others(self, make: Make) -> None:
        """From now on workers make this."""
        self._begin(make, self._accept)

    def _drop_work(self) -> None:
        """Forget what was done before, and workers that are still at it after an error."""
        for member in self._pending.values():
            self._ray.kill(member.actor)
            self.members.remove(member)
        self._pending.clear()
        self._deaths.clear()
        self._looked = 0.0
        for member in self.members:
            member.state, member.facts = "refused" if member.state == "refused" else "new", None

    def _begin(self, make: Make, accept: Accept) -> None:
        try:
            self._make = self._ray.put(make)
        except Exception as error:  # of pickle, which raises any
            raise ConfigError(
                f"engine ray: expected a model and images that can be sent to workers ({brief(error)}); run "
                "without --engine"
            ) from error
        self._accept = accept

    def map(
        self,
        tasks: Sequence[Any],
        send: Callable[[Any], Any] = lambda task: task,
        joined: Callable[[Any], None] = lambda facts: None,
    ) -> Iterator[Any]:
        """The results of the tasks, in their order.

        Args:
            send: makes of a task one that brings along what a worker cannot read by itself.
            joined: is called with the facts of each worker that was accepted, before it gets work.
        """
        waiting, done, following = deque(range(len(tasks))), dict[int, Any](), 0
        self._tries.clear()
        self._unseen: set[int] = set()
        told: set[int] = set()
        while following < len(tasks):
            self._look()
            for member in self.members:
                if member.facts is not None and id(member) not in told:
                    told.add(id(member))
                    joined(member.facts)
                if member.state == "idle" and waiting:
                    self._hand(member, waiting.popleft(), tasks, send)
            for number, result in self._receive():
                if result is AGAIN:
                    waiting.appendleft(number)
                else:
                    done[number] = result
            while following in done:
                yield done.pop(following)
                following += 1

    def _hand(self, member: Member, number: int, tasks: Sequence[Any], send: Callable[[Any], Any]) -> None:
        by_itself = member.sees and number not in self._unseen
        task = tasks[number] if by_itself else send(tasks[number])
        member.state, member.task = "busy", number
        self._pending[member.actor.do.remote(task)] = member

    def _receive(self) -> list[tuple[int, Any]]:
        """The numbers and results of tasks that are done; ``AGAIN`` for one that has to be done again."""
        if not self._pending:
            time.sleep(0.1)
            return []
        ready, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=LOOK_SECONDS)
        found = []
        for ref in ready:
            member = self._pending.pop(ref)
            try:
                answer = self._ray.get(ref)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from error  # a mistake of ours, as it would be in this process
            except self._ray.exceptions.RayError:
                found += self._died(member)
                continue
            if isinstance(answer, Failed):
                raise answer.error
            found += self._answered(member, answer)
        return found

    def _answered(self, member: Member, answer: Any) -> list[tuple[int, Any]]:
        if member.state == "holding":
            reason = self._accept(answer)
            member.state, member.facts = ("idle", answer) if reason is None else ("refused", None)
            if reason is not None:
                _say(f"{member.name} is refused: {reason}")
            return []
        member.state = "idle"
        self._deaths[member.place] = 0
        if isinstance(answer, Unseen):
            member.sees = not answer.always
            self._unseen.add(member.task)
            return [(member.task, AGAIN)]
        return [(member.task, answer)]

    def _died(self, member: Member) -> list[tuple[int, Any]]:
        """Forget a worker that is gone; the task that it had is done again. Raises ProcessError for a task
        that has cost several workers."""
        self.members.remove(member)
        self._looked = 0.0  # there may be room for another
        self._deaths[member.place] += 1
        _say(f"{member.name} has ended (killed, or out of memory?)")
        if member.state != "busy":
            return []
        self._tries[member.task] += 1
        if self._tries[member.task] >= DEATHS:
            raise ProcessError(
                f"engine ray: {DEATHS} workers have ended over the same block (out of memory?); what was "
                "written is kept: run the same command with --resume and a smaller --batch-size"
            )
        return [(member.task, AGAIN)]

    def _look(self, at_most: int | None = None) -> None:
        """Start a worker on each device that has none, and let those that hold nothing make it, so many at a
        time."""
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            taken = {member.place for member in self.members}
            for node in self._ray.nodes():
                for number in range(self._devices_of(node) if node["Alive"] else 0):
                    place = node["NodeID"], number
                    if place not in taken and self._deaths[place] < DEATHS:
                        self.members.append(self._start(node, number))
        holding = sum(member.state in ("holding", "idle", "busy") for member in self.members)
        for member in self.members:
            if member.state == "new" and (at_most is None or holding < at_most):
                member.state, holding = "holding", holding + 1
                self._pending[member.actor.hold.remote(self._make, self.device, os.getcwd())] = member
        self._check_hope()

    def _check_hope(self) -> None:
        """Say once that no worker is there yet. Raises ProcessError if none can be any more."""
        given_up = self.members or max(self._deaths.values(), default=0) >= DEATHS
        if given_up and all(member.state == "refused" for member in self.members):
            raise ProcessError(
                "engine ray: no worker is left, each was refused or has ended; what was written is kept: run "
                "the same command with --resume"
            )
        if any(member.state in ("idle", "busy") for member in self.members):
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > WAIT_SECONDS and not self._said_waiting:
            self._said_waiting = True
            _say(f"waiting for a worker: {len(self.members)} asked for, none is ready yet")

    def _start(self, node: dict[str, Any], number: int) -> Member:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        processors = int(node["Resources"].get("CPU", 1))
        needs = {"num_cpus": max(1, processors // max(1, self._devices_of(node)))}
        if self.device == "cuda":
            needs = {"num_cpus": 0, "num_gpus": 1}
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        actor = self._ray.remote(scheduling_strategy=here, max_restarts=0, **needs)(Worker).remote()
        address = node["NodeManagerAddress"]
        return Member((node["NodeID"], number), f"worker {number} on {address}", actor)

    def _devices_of(self, node: dict[str, Any]) -> int:
        """How many workers a node gets."""
        asked, there = self.asked.devices_per_node, int(node["Resources"].get("GPU", 0))
        if self.device == "cuda":
            return there if asked is None else min(asked, there)
        return (asked or 1) if node["Resources"].get("CPU", 0) >= 1 else 0

    def _choose_device(self) -> str:
        gpus = self._ray.cluster_resources().get("GPU", 0)
        if self.asked.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device {self.asked.device!r}: expected auto, cpu or cuda with --engine ray")
        if self.asked.device == "cuda" and not gpus:
            raise MachineError("device 'cuda': expected GPUs in the Ray cluster, found none")
        return "cpu" if self.asked.device == "cpu" or not gpus else "cuda"


def connect(address: str | None) -> Any:
    """The module ray, connected to a cluster; without one at hand, to one of this machine alone.

    Raises MachineError where ray is not installed, ConfigError for an address where no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MachineError(
            "engine ray: expected the package ray, found none; pip install 'certipatch[ray]'"
        ) from error
    before = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        _check_answers(address)
        ray.init(address=address, include_dashboard=False, **quiet)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ConfigError(
            f"address {address or 'auto'}: expected a Ray cluster that answers ({brief(error, 160)})"
        ) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray has taken it
    return ray


def _check_answers(address: str | None) -> None:
    """Raises OSError for an address where nothing listens: Ray would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address or "")
    if found is not None:
        socket.create_connection((found[1], int(found[2])), timeout=5).close()


def _say(line: str) -> None:
    stderr.print(one_line(line), markup=False, soft_wrap=True)
