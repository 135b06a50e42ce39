"""One run at a time in a run directory, and how the owner before is found to be gone."""

import json
import multiprocessing
import os
import subprocess
import threading
import time
from dataclasses import replace

import pytest

from launch.run import lock as run_lock
from launch.run.lock import RunLock, sees_claim, this_owner
from zeta.exit_codes import RunError
from zeta.run.directory import RunDir


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path / "run")


@pytest.fixture
def me():
    return this_owner({}, heartbeat_s=5.0)


@pytest.fixture
def elsewhere(me):
    """An owner on another machine."""
    return replace(me, host="far", machine="another boot", pid=1)


@pytest.fixture
def short_watch(monkeypatch):
    monkeypatch.setattr(run_lock, "_SHORTEST_WATCH_S", 0.5)
    monkeypatch.setattr(run_lock, "_BEATS", 0)
    monkeypatch.setattr(run_lock, "_LOOK_S", 0.05)


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """A squeue that answers as told."""

    def answer(body):
        program = tmp_path / "bin" / "squeue"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)

    return answer


def test_a_second_start_is_refused_while_the_first_runs_and_not_after(run_dir, me):
    first, second = RunLock(run_dir, me), RunLock(run_dir, me)
    first.acquire()
    with pytest.raises(RunError, match=rf"is in use.*process {os.getpid()} on .*touch .*STOP"):
        second.acquire()
    second.close()  # what it does not have it cannot give away
    with pytest.raises(RunError):
        second.acquire()
    first.close()
    second.acquire()


@pytest.mark.parametrize("dead_before", [False, True])
def test_of_many_starts_at_once_one_gets_it(run_dir, me, dead_before):
    if dead_before:
        RunLock(run_dir, replace(me, pid=2**22 + 1)).acquire()  # no process has such an id
    start, got = threading.Barrier(16), []

    def claim():
        lock = RunLock(run_dir, me)
        start.wait()
        try:
            lock.acquire()
        except RunError:
            return
        got.append(lock)

    threads = [threading.Thread(target=claim) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    assert len(list(run_dir.owners.iterdir())) == 1 + dead_before


def test_a_killed_owner_on_this_machine_is_succeeded_at_once(run_dir):
    def own():
        RunLock(run_dir, this_owner({}, 5.0)).acquire()
        time.sleep(100)

    process = multiprocessing.get_context("fork").Process(target=own)
    process.start()
    while not list(run_dir.owners.glob("*.json")):
        time.sleep(0.01)
    lock = RunLock(run_dir, this_owner({}, 5.0))
    with pytest.raises(RunError, match=f"process {process.pid}"):
        lock.acquire()
    process.kill()  # not reaped yet: a zombie does not train
    deadline = time.monotonic() + 5
    while run_lock._process_start(process.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    lock.acquire()
    process.join()


def test_another_process_with_the_id_of_a_dead_owner_is_not_taken_for_it(run_dir, me):
    RunLock(run_dir, replace(me, pid_started="1")).acquire()
    RunLock(run_dir, me).acquire()


def test_a_requeued_job_takes_its_own_directory_over_wherever_it_is_now(run_dir, elsewhere, me):
    RunLock(run_dir, replace(elsewhere, job="7", cluster="c")).acquire()
    RunLock(run_dir, replace(me, job="7", cluster="c", restarts=1)).acquire()


@pytest.mark.parametrize(
    ("answer", "gone"),
    [
        ("echo RUNNING", False),
        ("echo PENDING", False),  # requeued: it will come back
        ("exit 0", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
    ],
)
def test_slurm_is_asked_for_the_job_of_an_owner_on_another_node(
    run_dir, elsewhere, me, squeue, answer, gone
):
    squeue(f'[ "$*" = "--noheader --format=%T --jobs=7" ] || exit 9; {answer}')
    RunLock(run_dir, replace(elsewhere, job="7", cluster="c")).acquire()
    mine = RunLock(run_dir, replace(me, job="8", cluster="c"))
    if gone:
        mine.acquire()
    else:
        with pytest.raises(RunError, match="job 7, process 1 on far"):
            mine.acquire()


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer", ["echo COMPLETING", "echo 'Unable to contact slurm controller' >&2; exit 1", None]
)
@pytest.mark.parametrize("beats", [True, False])
def test_where_slurm_cannot_tell_the_heartbeat_does(
    run_dir, elsewhere, me, squeue, short_watch, answer, beats
):
    if answer is None:
        squeue("exit 0")  # a job of that id, but on another cluster
    else:
        squeue(answer)
    theirs = replace(elsewhere, job="7", cluster="other" if answer is None else "c")
    RunLock(run_dir, theirs).acquire()
    heartbeat = run_dir.rank_heartbeat(0)
    heartbeat.parent.mkdir()
    heartbeat.write_text("1")
    beat = threading.Timer(0.2, heartbeat.write_text, ["2"])
    if beats:
        beat.start()
    mine = RunLock(run_dir, replace(me, job="8", cluster="c"))
    began = time.monotonic()
    if beats:
        with pytest.raises(RunError):
            mine.acquire()
        beat.join()
    else:
        mine.acquire()
        assert time.monotonic() - began >= 0.5


def test_a_claim_that_was_cut_off_is_succeeded_after_a_while(run_dir, me, monkeypatch):
    monkeypatch.setattr(run_lock, "_WRITING_S", 0.3)
    run_dir.owners.mkdir(parents=True)
    (run_dir.owners / "000003.json").touch()
    RunLock(run_dir, me).acquire()
    assert json.loads((run_dir.owners / "000004.json").read_text())["pid"] == os.getpid()


def test_a_claim_is_seen_on_the_same_storage_only(run_dir, me, tmp_path):
    lock, elsewhere = RunLock(run_dir, me), RunDir(tmp_path / "other")
    lock.acquire()
    assert sees_claim(run_dir, lock.proof, patience_s=0)
    assert not sees_claim(elsewhere, lock.proof, patience_s=0)
    RunLock(elsewhere, replace(me, time=0)).acquire()  # of a run that this node had to itself
    assert not sees_claim(elsewhere, lock.proof, patience_s=0)


def test_a_start_waits_for_network_storage_to_show_a_claim(run_dir, me, tmp_path):
    lock, copy = RunLock(run_dir, me), RunDir(tmp_path / "seen_later")
    lock.acquire()
    show = ["sh", "-c", f"sleep 0.3; cp -r '{run_dir.path}' '{copy.path}'"]
    with subprocess.Popen(show):
        assert sees_claim(copy, lock.proof, patience_s=10)
