"""The local launcher's promises about processes, with real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.run.ranks import run_ranks

LAUNCHER = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored in a suite that nohup started
from launch.run.ranks import run_ranks
outcome = run_ranks([sys.executable, *sys.argv[2:]], int(sys.argv[1]))
print("codes", *outcome.codes, "aborted", outcome.aborted, end=" ")
print("signalled", outcome.signalled, flush=True)
"""


def write_program(folder: Path, body: str) -> str:
    path = folder / "rank.py"
    path.write_text(
        "import os, pathlib, signal, subprocess, sys, time\n"
        "rank = os.environ['RANK']\n"
        "here = pathlib.Path(__file__).parent\n" + body
    )
    return str(path)


def start_launcher(nproc: int, program: str) -> subprocess.Popen[str]:
    # A session of its own, so that a test can press Ctrl-C as a terminal does: on the whole group.
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(nproc), program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(folder: Path, names: list[str]) -> None:
    deadline = time.monotonic() + 20
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline, f"{names} did not appear in {list(folder.iterdir())}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_ranks_find_what_torch_distributed_needs_in_their_environment(tmp_path):
    program = write_program(
        tmp_path,
        "import json\n(here / f'{rank}.json').write_text(json.dumps(dict(os.environ)))\n",
    )
    assert run_ranks([sys.executable, program], 2).codes == (0, 0)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first["RANK"], second["RANK"]) == ("0", "1")
    assert (first["LOCAL_RANK"], second["LOCAL_RANK"]) == ("0", "1")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        assert first[name] == second[name] == "2"
    assert first["MASTER_ADDR"] == "127.0.0.1"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]


@pytest.mark.parametrize(("users", "expected"), [(None, None), ("7", "7")])
def test_cores_are_shared_between_ranks_unless_the_user_says_otherwise(
    tmp_path, monkeypatch, users, expected
):
    if users is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        expected = str(max(1, len(os.sched_getaffinity(0)) // 2))
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", users)
    program = write_program(
        tmp_path, "(here / f'{rank}.txt').write_text(os.environ['OMP_NUM_THREADS'])\n"
    )
    run_ranks([sys.executable, program], 2)
    assert (tmp_path / "0.txt").read_text() == expected


def test_a_failing_rank_ends_the_others_and_their_workers(tmp_path):
    program = write_program(
        tmp_path,
        "if rank == '1':\n"
        "    while not (here / 'worker').exists(): time.sleep(0.02)\n"
        "    sys.exit(7)\n"
        "worker = subprocess.Popen(['sleep', '100'])\n"
        "(here / 'worker.part').write_text(str(worker.pid))\n"
        "(here / 'worker.part').rename(here / 'worker')\n"
        "time.sleep(100)\n",
    )
    outcome = run_ranks([sys.executable, program], 2, seconds_after_failure=0.2)
    assert outcome.codes[1] == 7
    assert outcome.killed == {0}
    assert not outcome.signalled  # by anybody outside
    assert not is_running(int((tmp_path / "worker").read_text()))


def test_ranks_that_report_in_time_are_not_killed(tmp_path):
    program = write_program(tmp_path, "time.sleep(0.5 * int(rank)); sys.exit(3 + int(rank))\n")
    outcome = run_ranks([sys.executable, program], 2, seconds_after_failure=20)
    assert outcome.codes == (3, 4)
    assert not outcome.killed


def test_ctrl_c_reaches_each_rank_once_and_ranks_may_save(tmp_path):
    program = write_program(
        tmp_path,
        "count = 0\n"
        "def stop(*_):\n"
        "    global count; count += 1\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "(here / f'ready{rank}').touch()\n"
        "while not count: time.sleep(0.02)\n"
        "time.sleep(0.5)\n"
        "(here / f'count{rank}').write_text(str(count))\n"
        "sys.exit(130)\n",
    )
    launcher = start_launcher(2, program)
    wait_for(tmp_path, ["ready0", "ready1"])
    os.killpg(launcher.pid, signal.SIGINT)
    time.sleep(0.02)  # `timeout --foreground` passes the same Ctrl-C on once more
    os.killpg(launcher.pid, signal.SIGINT)
    output, _ = launcher.communicate(timeout=20)
    assert output.strip() == "codes 130 130 aborted False signalled True"
    assert [(tmp_path / f"count{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_ranks_that_do_not_listen(tmp_path):
    program = write_program(
        tmp_path,
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "(here / f'ready{rank}').touch()\n"
        "time.sleep(100)\n",
    )
    launcher = start_launcher(2, program)
    wait_for(tmp_path, ["ready0", "ready1"])
    os.killpg(launcher.pid, signal.SIGINT)
    time.sleep(0.3)
    assert launcher.poll() is None
    os.killpg(launcher.pid, signal.SIGINT)
    output, _ = launcher.communicate(timeout=20)
    assert output.strip() == "codes -9 -9 aborted True signalled True"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "received"),
    [("SIGUSR1", "SIGUSR1"), ("SIGUSR2", "SIGUSR2"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")],
)
def test_signals_are_passed_on_to_every_rank(tmp_path, sent, received):
    program = write_program(
        tmp_path,
        f"signal.signal(signal.{received}, lambda *_: sys.exit(85))\n"
        "(here / f'ready{rank}').touch()\n"
        "time.sleep(100)\n",
    )
    launcher = start_launcher(2, program)
    wait_for(tmp_path, ["ready0", "ready1"])
    launcher.send_signal(getattr(signal, sent))
    output, _ = launcher.communicate(timeout=20)
    assert output.strip() == "codes 85 85 aborted False signalled True"


@pytest.mark.parametrize("presses", [0, 2])
def test_a_signal_that_comes_while_ranks_start_reaches_them_all(tmp_path, monkeypatch, presses):
    program = write_program(
        tmp_path,
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))\n"
        "(here / f'ready{rank}').touch()\n"
        "time.sleep(100)\n",
    )
    start = subprocess.Popen

    def start_and_signal(*args, env: dict[str, str] | None = None, **options):
        process = start(*args, env=env, **options)
        if env is None:  # not a rank
            return process
        wait_for(tmp_path, [f"ready{env['RANK']}"])
        if env["RANK"] == "1":  # two run, and the launcher knows of the first only
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.3)
            if not presses:
                os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr("launch.run.ranks.subprocess.Popen", start_and_signal)
    outcome = run_ranks([sys.executable, program], 3, seconds_after_failure=60)
    assert outcome.codes == ((-9, -9, -9) if presses else (85, 85, 85))
    assert outcome.aborted == (presses == 2)


@pytest.mark.slow
@pytest.mark.parametrize("stuck", [False, True])
def test_ranks_die_with_a_launcher_that_is_killed(tmp_path, stuck):
    program = write_program(
        tmp_path,
        "worker = subprocess.Popen(['sleep', '100'])\n"
        "(here / f'{rank}.part').write_text(f'{os.getpid()} {worker.pid}')\n"
        "(here / f'{rank}.part').rename(here / f'pids{rank}')\n"
        # An interpreter that never gives another thread its turn:
        + ("import ctypes; ctypes.PyDLL(None).sleep(100)\n" if stuck else "time.sleep(100)\n"),
    )
    launcher = start_launcher(2, program)
    wait_for(tmp_path, ["pids0", "pids1"])
    pids = [[int(pid) for pid in (tmp_path / f"pids{rank}").read_text().split()] for rank in (0, 1)]
    launcher.kill()
    launcher.wait()
    expected = [*pids[0], *pids[1]]
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in expected) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [pid for pid in expected if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
