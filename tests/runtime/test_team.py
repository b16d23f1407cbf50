"""A team of Ray workers: results in order, deaths made good, strangers refused. Needs the extra ray."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from certipatch.errors import ConfigError, MachineError, ProcessError, SoundnessError
from certipatch.runtime.team import Team, TeamAsked, Unseen

pytest.importorskip("ray", reason="the extra ray is not installed")
cloudpickle = pytest.importorskip("ray.cloudpickle")


@dataclass
class Squares:
    """Squares numbers; asked for ``fatal`` it ends its process, as long as ``deaths`` are left."""

    device: str
    folder: Path
    fatal: int = -1
    deaths: int = 0
    unseen: tuple[int, ...] = ()
    slow: dict[int, float] = field(default_factory=dict)

    def facts(self):
        return {"pid": os.getpid(), "device": self.device}

    def __call__(self, task):
        number, sent = task
        if number in self.unseen and not sent:
            return Unseen()
        if number == self.fatal and len(list(self.folder.iterdir())) < self.deaths:
            (self.folder / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if number < 0:
            raise SoundnessError(f"{number}: expected no such number")
        time.sleep(self.slow.get(number, 0))
        return number**2, os.getpid(), sent


def test_another_engine_and_no_ray(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MachineError, match=r"pip install 'certipatch\[ray\]'"):
        Team(TeamAsked()).__enter__()


def test_no_cluster_at_the_address():
    with pytest.raises(ConfigError, match=r"address 127\.0\.0\.1:1: expected a Ray cluster"):
        Team(TeamAsked("127.0.0.1:1")).__enter__()


@pytest.fixture(scope="module")
def team():
    cloudpickle.register_pickle_by_value(__import__(__name__))  # a worker does not have this file
    with Team(TeamAsked("local", devices_per_node=2)) as started:
        yield started


def numbers(*some):
    return [(number, False) for number in some]


def run(team, make, tasks, **options):
    team.lead(make, lambda facts: None)
    return list(team.map(tasks, send=lambda task: (task[0], True), **options))


def test_results_come_in_the_order_of_the_tasks(team, tmp_path):
    """The first task is the last to be done."""
    joined = []
    found = run(
        team, partial(Squares, folder=tmp_path, slow={0: 3}), numbers(*range(12)), joined=joined.append
    )
    assert [square for square, _, _ in found] == [number**2 for number in range(12)]
    assert not any(sent for _, _, sent in found)
    assert {facts["pid"] for facts in joined} >= {pid for _, pid, _ in found}
    assert all(facts["device"] == "cpu" for facts in joined)


def test_what_is_not_seen_is_sent(team, tmp_path):
    found = run(team, partial(Squares, folder=tmp_path, unseen=(1, 3)), numbers(*range(5)))
    assert [square for square, _, _ in found] == [0, 1, 4, 9, 16]
    assert [sent for _, _, sent in found] == [False, True, False, True, False]


def test_the_block_of_a_killed_worker_is_done_again(team, tmp_path, capsys):
    found = run(team, partial(Squares, folder=tmp_path, fatal=2, deaths=1), numbers(*range(8)))
    assert [square for square, _, _ in found] == [number**2 for number in range(8)]
    (killed,) = tmp_path.iterdir()
    assert found[2][1] != int(killed.name)
    assert "has ended (killed, or out of memory?)" in capsys.readouterr().err


def test_a_block_that_kills_every_worker_ends_the_run(team, tmp_path):
    with pytest.raises(ProcessError, match="3 workers have ended over the same block"):
        run(team, partial(Squares, folder=tmp_path, fatal=1, deaths=99), numbers(*range(3)))


def test_an_error_of_ours_stays_one(team, tmp_path):
    with pytest.raises(SoundnessError, match="-1: expected no such number"):
        run(team, partial(Squares, folder=tmp_path), numbers(0, -1))


def test_what_cannot_be_sent(team):
    with pytest.raises(ConfigError, match="that can be sent to workers"):
        team.lead(partial(Squares, folder=threading.Lock()), lambda facts: None)


def test_strangers_are_refused_by_name(team, tmp_path, capsys):
    """The last of this team: one worker is left, then none."""
    refused = []

    def refuse(facts, most):
        if len(refused) < most:
            refused.append(facts["pid"])
            return "it is a stranger"
        return None

    facts = team.lead(partial(Squares, folder=tmp_path), partial(refuse, most=1))
    assert facts["pid"] not in refused
    assert "worker " in (said := capsys.readouterr().err)
    assert "is refused: it is a stranger" in said
    found = list(team.map(numbers(1, 2, 3)))
    assert {pid for _, pid, _ in found} == {facts["pid"]}
    with pytest.raises(ProcessError, match="no worker is left"):
        team.lead(partial(Squares, folder=tmp_path), partial(refuse, most=9))
