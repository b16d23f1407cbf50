"""Shards as jobs: what the schedulers' variables mean, ``--submit``, and the signals that end a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from certipatch.cli.jobs import parse_minutes, shard_of_job, words_of_job
from certipatch.errors import ConfigError
from inputs import refused, typed

SLURM = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "64"}


@pytest.mark.parametrize(
    ("environment", "shards", "expected"),
    [
        (SLURM, None, (7, 64)),
        ({**SLURM, "SLURM_ARRAY_TASK_MIN": "0"}, None, (8, 64)),
        ({**SLURM, "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "5"}, None, (4, 5)),
        ({**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None, (7, 64)),  # as in every array
        ({"JOB_COMPLETION_INDEX": "0"}, 8, (1, 8)),
        ({"JOB_COMPLETION_INDEX": "7"}, 8, (8, 8)),
        ({"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "4"}, None, (2, 4)),
        ({"SKYPILOT_JOB_RANK": "2", "SKYPILOT_NUM_JOBS": "3"}, None, (3, 3)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, None, (1, 2)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, None, (2, 2)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, None, (4, 4)),
    ],
)
def test_the_number_of_a_job(environment, shards, expected):
    assert shard_of_job(environment, shards) == expected


@pytest.mark.parametrize(
    ("environment", "shards", "words"),
    [
        ({}, None, "found none of several jobs"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None, "found none of several jobs"),
        ({"JOB_COMPLETION_INDEX": "0"}, None, "give --shard auto/n"),
        ({"JOB_COMPLETION_INDEX": "8"}, 8, "Kubernetes says 9 of 8"),
        ({**SLURM}, 8, "Slurm array says 7 of 64"),
        ({**SLURM, "PMI_RANK": "0", "PMI_SIZE": "2"}, None, "Slurm array says 7/64 and MPI says 1/2"),
        ({**SLURM, "SLURM_ARRAY_TASK_ID": "x"}, None, "expected a number from 0 up"),
        ({**SLURM, "SLURM_ARRAY_TASK_ID": "0"}, None, "says 0 of 64"),
    ],
)
def test_no_number_of_a_job(environment, shards, words):
    with pytest.raises(ConfigError, match=words):
        shard_of_job(environment, shards)


def test_shard_auto_is_the_shard_that_it_names(cli, trained, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    command = typed("certify", model=trained, data=photos, patch=5, masks_per_axis=3, out=tmp_path / "out")
    assert cli(*command, "--shard", "auto/2").code == 0
    assert (tmp_path / "out" / "records-1-of-2.jsonl").stat().st_size
    refused(cli(*command, "--shard", "auto"), "Kubernetes does not say how many jobs it has")
    refused(cli(*command, "--shard", "auto/0"), "expected i/n")


@pytest.mark.parametrize(
    ("text", "minutes"), [("90", 90), ("2h", 120), ("1d", 1440), ("5m", 5), ("02:30:00", 150), ("0:0:9", 1)]
)
def test_minutes(text, minutes):
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize("text", ["", "0", "h", "-1", "2w", "nan", "1:x"])
def test_no_minutes(text):
    with pytest.raises(ConfigError, match="expected minutes, 2h, 1d"):
        parse_minutes(text)


def test_a_job_has_the_words_of_the_command():
    words = [
        "certify",
        "--submit",
        "4",
        "--model",
        "m",
        "--time=2h",
        "--gpus",
        "0",
        "--partition",
        "local",
        "--out",
        "o",
    ]
    assert words_of_job(words) == ["certify", "--model", "m", "--out", "o"]


def test_no_slurm_and_no_submitit(cli, trained, photos, tmp_path, monkeypatch):
    command = typed("certify", model=trained, data=photos, patch=5, out=tmp_path / "out")
    refused(cli(*command, "--time", "2h"), "expected --submit with them")
    monkeypatch.setitem(sys.modules, "submitit", None)
    outcome = cli(*command, "--submit", 2)
    assert (outcome.code, outcome.out) == (3, "")
    assert "pip install 'certipatch[slurm]'" in outcome.err


def test_submitted_jobs_write_the_records_of_one_process(trained, photos, tmp_path):
    """submitit's local executor, with two jobs."""
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    command = [sys.executable, "-m", "certipatch"]
    given = typed("certify", model=trained, data=photos, patch=5, masks_per_axis=2, out=tmp_path / "out")
    jobs = ["--submit", "2", "--partition", "local", "--gpus", "0", "--time", "5"]
    done = subprocess.run(
        [*command, *map(str, given), *jobs], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "done: 2 jobs" in done.stdout
    one = typed("certify", model=trained, data=photos, patch=5, masks_per_axis=2, out=tmp_path / "one")
    subprocess.run([*command, *map(str, one)], capture_output=True, timeout=100, check=True)
    first, second = ((tmp_path / "out" / f"records-{i}-of-2.jsonl").read_bytes() for i in (1, 2))
    assert first + second == (tmp_path / "one" / "records.jsonl").read_bytes()

    bad = typed("certify", model=trained, data=photos, patch=500, masks_per_axis=2, out=tmp_path / "bad")
    done = subprocess.run(
        [*command, *map(str, bad), *jobs], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 3
    assert "job 1/2 has failed: certipatch: " in done.stderr
    assert "Traceback" not in done.stderr


SLOW = """
import sys, time
from certipatch.cli.app import main
from certipatch.defenses.patchcleanser.defense import PatchCleanser

PatchCleanser.examine = lambda *arguments: (print("examines", flush=True), time.sleep(60))
sys.argv[0] = "certipatch"
main()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_scheduler_ends_a_job(trained, photos, tmp_path, name):
    command = typed("certify", model=trained, data=photos, patch=5, masks_per_axis=2, out=tmp_path / "out")
    words = [sys.executable, "-c", SLOW, *map(str, command)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "examines\n"
    time.sleep(0.2)
    os.kill(process.pid, getattr(signal, name))
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("interrupted; what is done is kept in ")
