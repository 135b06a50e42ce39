from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.shards.atomic_file import remove_leftovers, write_atomically
from data_pipeline.shards.parallel import SMALL_BYTES, _exit, run_tasks


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def fail_at_two(number: int) -> int:
    if number == 2:
        raise ValueError("two")
    return number


def test_tasks_run_in_other_processes_and_each_once():
    results = list(run_tasks(square, range(20), workers=2, nbytes=SMALL_BYTES))
    assert sorted(value for value, _ in results) == [n * n for n in range(20)]
    assert os.getpid() not in {process for _, process in results}


def test_little_data_one_task_or_one_worker_needs_no_process():
    for tasks, workers, nbytes in (([1, 2], 2, 10), ([1], 2, 2**40), ([1, 2], 1, 2**40)):
        assert {p for _, p in run_tasks(square, tasks, workers, nbytes)} == {os.getpid()}


def test_an_error_in_a_worker_reaches_the_caller():
    with pytest.raises(ValueError, match="two"):
        list(run_tasks(fail_at_two, range(4), workers=2, nbytes=SMALL_BYTES))


def ignore_the_end(task):
    number, note = task
    if number == 0:
        while not note.exists():
            time.sleep(0.05)
        raise ValueError("zero")
    note.write_text(str(os.getpid()))
    while True:
        try:
            time.sleep(60)
        except SystemExit:
            continue


@pytest.mark.slow
def test_a_worker_that_misses_its_signal_ends_all_the_same(tmp_path):
    note = tmp_path / "pid"
    with pytest.raises(ValueError, match="zero"):
        list(run_tasks(ignore_the_end, [(0, note), (1, note)], workers=2, nbytes=SMALL_BYTES))
    deadline = time.monotonic() + 40
    while Path(f"/proc/{note.read_text()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


SCRIPT = """
import os, sys, time
from pathlib import Path
from data_pipeline.shards.atomic_file import write_atomically
from data_pipeline.shards.parallel import SMALL_BYTES, run_tasks

def work(number):
    with write_atomically(Path(sys.argv[1]) / f"out-{number}") as stream:
        (Path(sys.argv[1]) / f"pid-{os.getpid()}").touch()
        stream.write(b"x")
        if number:
            time.sleep(300)

if __name__ == "__main__":
    for _ in run_tasks(work, range(8), 2, SMALL_BYTES):
        pass
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_end_when_the_parent_is_interrupted_or_killed(tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stderr=subprocess.PIPE,
    )
    wait_for(lambda: len(list(tmp_path.glob(".out-*"))) == 2 and (tmp_path / "out-0").exists())
    wait_for(lambda: len(list(tmp_path.glob("pid-*"))) == 2)  # made just after the files
    workers = [int(path.name[4:]) for path in tmp_path.glob("pid-*")]
    process.send_signal(how)
    process.wait(20)
    wait_for(lambda: not any(is_alive(worker) for worker in workers))
    if how == signal.SIGINT:
        assert not list(tmp_path.glob(".out-*"))
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.glob("*out-*")] == ["out-0"]


def test_a_second_signal_does_not_keep_a_worker_from_removing_its_file(tmp_path, monkeypatch):
    unlink = Path.unlink

    def unlink_after_a_signal(path: Path, missing_ok: bool = False) -> None:
        signal.raise_signal(signal.SIGTERM)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_after_a_signal)
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        with pytest.raises(SystemExit), write_atomically(tmp_path / "out"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert list(tmp_path.iterdir()) == []


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0]
    except FileNotFoundError:
        return False


def test_a_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(TypeError), write_atomically(path) as stream:
        stream.writelines([b"half", None])
    assert list(tmp_path.iterdir()) == []
    with write_atomically(path) as stream:
        stream.write(b"whole")
        assert not path.exists()
        remove_leftovers(tmp_path)
    assert path.read_bytes() == b"whole"


LEAVING = """
import atexit, os, signal
from data_pipeline.shards import parallel

signal.signal(signal.SIGTERM, parallel._exit)
atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))
"""


def test_a_signal_to_a_worker_that_leaves_already_prints_nothing():
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
