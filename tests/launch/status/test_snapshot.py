"""Reading a run directory and the queue, whatever state they are in."""

from __future__ import annotations

import json
import os
import time

import pytest

from launch.run.lock import RunLock, this_owner
from launch.run.starts import note_start
from launch.status.snapshot import take_snapshot
from launch.status.state import judge
from zeta.run.directory import RunDir


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A run directory, and a squeue that is not there."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    run_dir = RunDir(tmp_path / "run")
    run_dir.logs.mkdir(parents=True)
    return run_dir


def squeue(files, script):
    path = files.path.parent / "bin/squeue"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_everything_that_is_there_is_read(files):
    files.config.write_text(
        "run: {name: b16}\ntrain: {max_steps: 50, watchdog: {heartbeat_s: 2}}\n"
    )
    files.metrics.write_text('{"step": 10, "train/loss": 2.0}\n{"step": 20, "train/lo')
    files.rank_heartbeat(0).parent.mkdir()
    beat = {"phase": "train", "step": 20, "phase_s": 1, "limit_s": 60, "time": time.time()}
    beat |= {"rank": 0, "host": "n1", "pid": 3}
    files.rank_heartbeat(0).write_text(json.dumps(beat))
    files.rank_heartbeat(1).write_text('{"phase": "tr')
    for step in (8, 16):
        folder = files.checkpoints / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    (files.checkpoints / "step_00000024").mkdir()  # no manifest: not whole
    files.quarantine.write_text('{"sample_id": 1}\n{"sample_id": 2}\n{"samp')
    files.slurm_restarts.write_text("2 step_00000016\n")
    for _ in range(3):
        note_start(files.starts, 0, 2)
    RunLock(files, this_owner({}, 2.0)).acquire()
    files.rank_log(0).write_text("run directory: x\nValueError: torn image\nstep 3\n")
    seen = take_snapshot(files.path)
    assert (seen.name, seen.limits.steps, seen.heartbeat_s) == ("b16", 50, 2.0)
    assert [row["step"] for row in seen.rows] == [10]
    assert [beat.rank for beat in seen.beats] == [0]
    assert seen.checkpoint_step == 16
    assert (seen.quarantined, seen.stalled, seen.starts) == (2, 2, 3)
    assert (seen.owner.pid, seen.owner_alive) == (os.getpid(), True)
    assert seen.error == "rank_00000.log: ValueError: torn image"
    assert (seen.queue_known, seen.job) == (False, None)
    assert judge(seen).state == "running"


def test_a_run_that_left_nothing_but_a_folder_for_its_logs_is_no_error(files):
    seen = take_snapshot(files.path)
    assert (seen.rows, seen.beats, seen.owner, seen.error) == ((), (), None, None)
    assert judge(seen).state == "unknown"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "is not a folder"), ("photo.jpg", "is not the directory of a run")],
)
def test_another_folder_is_refused_in_one_message(tmp_path, content, words):
    if content:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / content).touch()
    with pytest.raises(ValueError, match=words):
        take_snapshot(tmp_path / "x")


@pytest.mark.parametrize("trouble", ["", "[]", "\x00", "run: ["])
def test_a_config_that_cannot_be_read_costs_only_what_it_would_tell(files, trouble):
    files.config.write_text(trouble)
    seen = take_snapshot(files.path)
    assert (seen.name, seen.limits.steps) == ("run", None)


def test_how_it_ended_is_that_of_the_last_start(files):
    files.rank_log(0).write_text("run directory: x\nzeta: error: no\nrun directory: x\n")
    assert take_snapshot(files.path).last_words is None
    with files.rank_log(0).open("a") as log:
        log.write("zeta: stopped as asked, saved at step 4\n")
    assert take_snapshot(files.path).last_words == "zeta: stopped as asked, saved at step 4"


def test_the_queue_is_asked_for_the_job_of_the_run(files):
    owner = this_owner({"SLURM_JOB_ID": "17", "SLURM_CLUSTER_NAME": "c"}, 5.0)
    RunLock(files, owner).acquire()
    squeue(files, 'case "$*" in *--jobs=17*) echo "17|PENDING|BeginTime" ;; esac')
    seen = take_snapshot(files.path)
    assert (seen.queue_known, seen.job.state, seen.job.reason) == (True, "PENDING", "BeginTime")
    assert judge(seen).state == "requeued"
    squeue(files, "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    seen = take_snapshot(files.path)
    assert (seen.queue_known, seen.job) == (True, None)
    squeue(files, "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert not take_snapshot(files.path).queue_known


def test_a_job_that_waits_for_its_first_start_is_found_by_its_log(files):
    log = files.logs.resolve() / "slurm-21.log"
    squeue(files, f"echo '20|RUNNING|/other/x.log|'; echo '21|PENDING|{log}|'")
    seen = take_snapshot(files.path)
    assert (seen.job.id, judge(seen).state) == ("21", "pending")


@pytest.mark.parametrize(
    "line",
    [
        "zeta: error: loss is not finite",
        "zeta: error on rank 3: out of memory",
        "zeta: job 4: giving up after 3 restarts",
        "slurmstepd: error: *** STEP 1.0 ON n1 CANCELLED",
        "torch.OutOfMemoryError: CUDA out of memory",
        "RuntimeError: boom",
    ],
)
def test_what_counts_as_an_error(files, line):
    files.rank_log(0).write_text(f"step 1\n{line}\nstep 2, no error here\nWARNING: error x\n")
    assert take_snapshot(files.path).error == f"rank_00000.log: {line}"
