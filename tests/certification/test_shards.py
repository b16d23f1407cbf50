"""Shards of a certification: several processes, no communication, the records of one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from inputs import typed, write_photos
from processes import kill_process_1


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """More images than three blocks of 32, so that shards have something to share."""
    return write_photos(tmp_path_factory.mktemp("many"), each=34)


@pytest.fixture
def certify(cli, trained, many):
    def call(out, *options, patch="5", k="3"):
        given = typed("certify", model=trained, data=many, patch=patch, masks_per_axis=k, out=out)
        return cli(*given, *options)

    return call


@pytest.fixture
def one(certify, tmp_path):
    """The records that one process writes."""
    assert certify(tmp_path / "one").code == 0
    return records(tmp_path / "one")


def records(folder):
    return sorted(line for path in folder.glob("records*.jsonl") for line in path.read_text().splitlines())


@pytest.mark.parametrize("shards", [1, 3, 7])  # 7: more than there are blocks, so some have no image
def test_shards_in_any_order_write_the_records_of_one_process(certify, one, tmp_path, shards):
    for i in range(shards, 0, -1):
        outcome = certify(tmp_path / "parts", "--shard", f"{i}/{shards}")
        assert outcome.code == 0, outcome.err
    assert records(tmp_path / "parts") == one


def test_report_reads_any_set_of_shards(cli, certify, one, tmp_path):
    certify(tmp_path / "parts", "--shard", "2/2")
    (half,) = json.loads(cli("report", tmp_path / "parts", "--json").out)
    assert not half["complete"]
    # Of blocks of 32, 32, 32 and 6 images the second and the fourth.
    assert half["certified_robust_accuracy"]["images"] == 32 + 6
    certify(tmp_path / "parts", "--shard", "1/2")
    (whole,) = json.loads(cli("report", tmp_path / "parts", "--json").out)
    assert whole["complete"]
    assert whole["certified_robust_accuracy"]["images"] == len(one)


def test_resume_in_another_division(certify, one, tmp_path):
    """What shard 1 of 3 did is not done again by one process, nor by shards of 2, and nothing is missing."""
    out = tmp_path / "parts"
    certify(out, "--shard", "1/3")
    assert certify(out, "--shard", "1/2").code == 2  # without --resume
    assert certify(out, "--shard", "1/2", "--resume").code == 0
    assert certify(out, "--resume").code == 0
    assert records(out) == one
    before = {path: path.read_bytes() for path in out.glob("records*.jsonl")}
    assert certify(out, "--resume").code == 0
    assert {path: path.read_bytes() for path in out.glob("records*.jsonl")} == before


def test_shards_of_different_experiments_are_refused(cli, certify, tmp_path):
    certify(tmp_path / "parts", "--shard", "1/2")
    outcome = certify(tmp_path / "parts", "--shard", "2/2", "--exhaustive")
    assert outcome.code == 2
    assert "holds another experiment (exhaustive: False there, True here)" in outcome.err
    # Copied together from two machines:
    certify(tmp_path / "other", "--shard", "2/2", "--exhaustive")
    for path in (tmp_path / "other").glob("*2-of-2*"):
        path.rename(tmp_path / "parts" / path.name)
    outcome = cli("report", tmp_path / "parts")
    assert outcome.code == 2
    assert "shards of different experiments (exhaustive" in outcome.err


def test_a_changed_shard_is_refused(cli, certify, tmp_path):
    for i in (1, 2):
        certify(tmp_path / "parts", "--shard", f"{i}/2")
    path = tmp_path / "parts" / "records-2-of-2.jsonl"
    path.write_text(path.read_text().replace('"name": "', '"name": "x', 1))
    outcome = cli("report", tmp_path / "parts")
    assert outcome.code == 2
    assert "records-2-of-2.jsonl: is not what was written" in outcome.err
    # Nor does --resume make it good.
    outcome = certify(tmp_path / "parts", "--shard", "2/2", "--resume")
    assert outcome.code == 2
    assert "records-2-of-2.jsonl: is not what was written" in outcome.err


def test_records_without_their_manifest_are_refused(cli, certify, tmp_path):
    """Nothing says of which weights and masks records are that were copied in from elsewhere."""
    certify(tmp_path / "parts", "--shard", "1/2")
    certify(tmp_path / "other", "--shard", "2/2")
    (tmp_path / "other" / "records-2-of-2.jsonl").rename(tmp_path / "parts" / "records-2-of-2.jsonl")
    outcome = cli("report", tmp_path / "parts")
    assert outcome.code == 2
    assert "records-2-of-2.jsonl: expected its manifest beside it" in outcome.err


def test_two_divisions_at_once_are_refused(certify, tmp_path, trained):
    """Shards of 2 while a shard of 3 is being written would certify images twice."""
    certify(tmp_path / "parts", "--shard", "1/3")
    with FileLock(tmp_path / "parts" / ".lock-1-of-3"):
        outcome = certify(tmp_path / "parts", "--shard", "1/2", "--resume")
    assert outcome.code == 2
    assert "another process is writing there" in outcome.err
    assert not list((tmp_path / "parts").glob("*1-of-2.json*"))  # it left nothing behind


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2"])
def test_bad_shards(certify, tmp_path, shard):
    outcome = certify(tmp_path / "out", "--shard", shard)
    assert outcome.code == 2
    assert f"shard '{shard}': expected i/n" in outcome.err


SLOW = """
import sys, time
from certipatch.cli.app import main
from certipatch.defenses.patchcleanser.defense import PatchCleanser

examine = PatchCleanser.examine
PatchCleanser.examine = lambda *arguments: (time.sleep(2), examine(*arguments))[1]
sys.argv[0] = "certipatch"
main()
"""


@pytest.mark.slow  # the next test kills too
def test_a_killed_shard_loses_nothing(certify, one, trained, many, tmp_path):
    """Two processes at once; one is killed after its first block. The other ends, --resume does the rest."""
    out = tmp_path / "parts"
    arguments = [*map(str, typed("certify", model=trained, data=many, patch=5, masks_per_axis=3, out=out))]
    slow, as_usual = (
        [sys.executable, "-c", SLOW, *arguments],
        [sys.executable, "-m", "certipatch", *arguments],
    )
    victim = subprocess.Popen([*slow, "--shard", "1/2"], stderr=subprocess.DEVNULL)
    other = subprocess.Popen(
        [*as_usual, "--shard", "2/2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    lines, deadline = out / "records-1-of-2.jsonl", time.monotonic() + 60
    while not (lines.exists() and lines.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert other.wait() == 0
    assert len(lines.read_text().splitlines()) == 32  # its first block, not its second
    assert certify(out, "--shard", "1/2", "--resume").code == 0
    assert records(out) == one


@pytest.mark.slow
def test_two_devices_and_one_of_them_killed(certify, trained, many, tmp_path):
    """Process 1 is killed in its second block: there is one line and exit code 3, what both wrote is kept,
    and --resume does the rest."""
    options = ["--exhaustive", "--device", "cpu"]
    assert certify(tmp_path / "one", *options, k="4").code == 0
    out = tmp_path / "two"
    command = typed(
        "certify", *options, model=trained, data=many, patch=5, masks_per_axis=4, out=out, devices=2
    )
    killed = kill_process_1(command, out / "records-2-of-2.jsonl")
    assert (killed.code, killed.out) == (3, "")
    assert [line for line in killed.err.splitlines() if not line.startswith("certify ")] == [
        "certipatch: a process of this run has ended (killed, or out of memory?); what was written is kept: "
        "run the same command with --resume"
    ]
    assert set(records(out)) < set(records(tmp_path / "one"))
    for shard in ("1/2", "2/2"):  # what each of the two does when the command is run again
        again = certify(out, *options, "--shard", shard, "--resume", "--json", k="4")
    assert json.loads(again.out)["complete"]
    assert records(out) == records(tmp_path / "one")


def test_several_patches_and_k_in_one_run(cli, certify, tmp_path):
    """A folder for each, with the records of a run of its own."""
    outcome = certify(tmp_path / "all", "--limit", 32, "--json", patch="5,3x4", k="2,3")
    assert outcome.code == 0, outcome.err
    found = [(one["patch_size"], one["masks_per_axis"]) for one in json.loads(outcome.out)]
    assert found == [([5, 5], 2), ([5, 5], 3), ([3, 4], 2), ([3, 4], 3)]
    assert {path.name for path in (tmp_path / "all").iterdir()} == {"5x5-k2", "5x5-k3", "3x4-k2", "3x4-k3"}
    certify(tmp_path / "single", "--limit", 32, patch="3x4", k="2")
    assert records(tmp_path / "all" / "3x4-k2") == records(tmp_path / "single")
    assert certify(tmp_path / "bad", k="3,x").code == 2
