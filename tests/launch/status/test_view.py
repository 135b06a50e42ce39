"""What people and programs see of the status of a run."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from launch.status.state import Limits, judge
from launch.status.view import Screen, status_lines, status_object, wait_for_run, watch
from tests.launch.status.test_state import ENDED, snapshot


def _status(**changes):
    return judge(
        snapshot(limits=Limits(steps=100), checkpoint_step=32, checkpoint_time=0, **changes)
    )


def test_the_lines_hold_every_figure():
    text = "\n".join(status_lines(_status(quarantined=3, error="rank_00000.log: no")))
    for words in (
        "running: process 7 on n1", "40 of 100 (40.0%)", "about 2 min", "50.0 images/s", "1.5000",
        "step 32", "2 (2 in train)", "rank 1 on n2, 1.50 times", "3 images", "rank_00000.log: no",
    ):  # fmt: skip
        assert words in text


@pytest.mark.parametrize("columns", [1, 24, 40, 80, 300])
def test_no_line_is_wider_than_the_terminal_and_control_codes_do_nothing(columns):
    status = replace(_status(), error="a\x1b[2Jb\t" + "c" * 500)
    lines = status_lines(status, columns)
    assert max(map(len, lines)) <= max(columns, 24)
    assert not any("\x1b" in line for line in lines)


def test_json_holds_everything_and_is_json():
    found = json.loads(json.dumps(status_object(_status())))
    assert found["state"] == "running"
    assert found["stuck"] == []
    assert found["of_steps"] == 100


def test_without_a_terminal_each_change_is_a_line():
    out = io.StringIO()
    states = iter([_status(), _status(), _status(rows=()), _status(**ENDED, finished="step 40")])
    watch(lambda: next(states), 0.0, Screen(out, {}))
    lines = [line.split(None, 1)[1] for line in out.getvalue().splitlines()]
    assert [line.split()[0] for line in lines] == ["running", "running", "finished"]
    assert "40 of 100" in lines[0]


def test_on_a_terminal_it_is_drawn_in_place_and_ctrl_c_leaves_it_clean(tmp_path):
    run_dir = tmp_path / "run"
    (run_dir / "logs").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"step": 7, "train/loss": 2.0}\n')
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", "launch", "watch", str(run_dir), "--every", "0.2"],
        stdin=terminal, stdout=terminal, stderr=terminal, env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(terminal)
    seen, deadline = b"", time.monotonic() + 60
    while seen.count(b"\x1b[H") < 3:
        assert time.monotonic() < deadline
        seen += os.read(main, 65536)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    while chunk := _read(main):
        seen += chunk
    os.close(main)
    text = seen.decode()
    assert text.startswith("\x1b[?1049h\x1b[?25l")
    assert "\x1b[?25h\x1b[?1049l" in text
    after = text.rpartition("\x1b[?1049l")[2]
    assert "step          7" in after
    assert "Traceback" not in text


def _read(main):
    try:
        return os.read(main, 65536)
    except OSError:  # the other end is closed
        return b""


def test_a_run_that_has_not_begun_is_waited_for(tmp_path):
    out, run_dir = io.StringIO(), tmp_path / "run"
    made = threading.Timer(0.5, lambda: (run_dir.mkdir(), (run_dir / "logs").mkdir()))
    made.start()
    assert wait_for_run(run_dir, 0.05, out)
    assert run_dir.is_dir()
    assert out.getvalue() == f"zeta: waiting for a run in {run_dir}; Ctrl-C ends this\n"


def test_what_is_there_is_not_waited_for(tmp_path):
    (tmp_path / "file").write_text("no run")
    out = io.StringIO()
    assert wait_for_run(tmp_path, 0.05, out)
    assert wait_for_run(tmp_path / "file", 0.05, out)
    assert out.getvalue() == ""
