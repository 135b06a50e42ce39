"""The terminal shows the run, and everything else goes to the rank's log."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

from tests.zeta.training import ROOT

_SCRIPT = """
import os, subprocess, sys
from pathlib import Path
from zeta.run.console import Console
console = Console(Path(sys.argv[1]), int(sys.argv[2]))
print("from python")
os.write(1, b"from a C library\\n")
subprocess.run(["echo", "from a child"])
print("to stderr", file=sys.stderr)
console.start(2, 4, 2 / 4, 1)
values = {"train/loss": 0.5, "optim/lr": 1e-3, "throughput/images_per_s": 12.5,
          "throughput/tokens_per_s": 800.0, "data/fill": 0.985}
for step in (3, 4):
    console.step(step, step / 4)
    console.metrics(step, values)
console.message("saved it")
if sys.argv[3:]:
    console.fatal("it broke")
    console.fatal("it broke again")
console.close()
print("after the end")
"""
_NOISE = ["from python", "from a C library", "from a child", "to stderr"]


def _command(log, rank, *more):
    return [sys.executable, "-c", _SCRIPT, str(log), str(rank), *more]


def _run(log, rank, *more):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        _command(log, rank, *more), env=environment, capture_output=True, text=True, check=True
    )


def _script(script, log):
    return subprocess.run(
        [sys.executable, "-c", script, str(log)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )


def test_rank_0_shows_a_line_per_log_interval_and_the_noise_goes_to_its_log(tmp_path):
    log = tmp_path / "logs" / "rank_00000.log"
    done = _run(log, 0)
    lines = done.stdout.splitlines()
    shown = "step 3/4 eta 0:00:00 loss 0.5000 lr 1.00e-03 img/s 12.5 tok/s 800 fill 98.5%"
    assert " ".join(lines[0].split()) == shown
    assert len(lines[0]) == len(lines[1])
    assert lines[2:] == ["saved it", "after the end"]
    assert done.stderr == ""
    for text in [*_NOISE, "saved it"]:
        assert text in log.read_text()


def test_the_first_step_is_told_where_lines_of_metrics_are_many_steps_apart(tmp_path):
    script = _SCRIPT.replace("2 / 4, 1)", "2 / 4, 20)")
    command = [sys.executable, "-c", script, str(tmp_path / "log"), "0"]
    first, second, *_ = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    ).stdout.splitlines()
    told = r"step 3/4  the first one, took 0\.\d s; a line follows every 20 steps"
    assert re.fullmatch(told, first)
    assert "loss" in second


def test_other_ranks_show_nothing(tmp_path):
    log = tmp_path / "rank_00001.log"
    done = _run(log, 1)
    assert done.stdout == "after the end\n"
    assert done.stderr == ""
    for text in _NOISE:
        assert text in log.read_text()


def test_a_fatal_message_is_shown_once_and_a_restart_appends_to_the_log(tmp_path):
    log = tmp_path / "rank_00000.log"
    for _ in range(2):
        assert _run(log, 0, "fatal").stderr == "it broke\n"
    assert log.read_text().count("from a child") == 2


def _on_terminal(command, columns):
    """Run a command on a pseudo-terminal of so many columns and return what it showed."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, stdout=slave, stderr=slave, check=True)
    os.close(slave)
    shown = b""
    while True:
        try:
            data = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(master)
    return shown.decode()


def test_a_terminal_gets_one_live_bar(tmp_path):
    text = _on_terminal(_command(tmp_path / "rank_00000.log", 0), 160)
    assert "\r" in text
    assert "4/4" in text
    assert "loss 0.5000 lr 1.00e-03 img/s 12.5 tok/s 800 fill 98.5%" in text
    assert "saved it" in text
    for noise in _NOISE:
        assert noise not in text


_EVALUATION = """
import sys
from pathlib import Path
from zeta.run.console import Console
console = Console(Path(sys.argv[1]), 0)
console.start(10, 1000, 10 / 1000, 10)
console.step(20, 20 / 1000)
console.metrics(20, {"train/loss": 1.2345, "optim/lr": 1e-3, "throughput/images_per_s": 12345.5,
                     "throughput/tokens_per_s": 1234567.0, "data/fill": 0.985})
console.evaluating(3, 6)
console.evaluation(20, {"val loss": 0.5}, {"top1": 0.75}, "")
console.message("one word after another " * 6 + "/a/path/that/stays/whole")
console.close()
"""


def test_an_evaluation_leaves_the_bar_whole_on_a_terminal_of_100_columns(tmp_path):
    command = [sys.executable, "-c", _EVALUATION, str(tmp_path / "log")]
    pictures = _on_terminal(command, 100).replace("\n", "\r").split("\r")
    during = next(line for line in pictures if "evaluating" in line)
    assert during.rstrip().endswith("evaluating  50%]")
    assert "loss" not in during
    after = pictures[-3].rstrip()  # of the metrics, those that fit
    assert after.endswith("step/s, loss 1.2345 lr 1.00e-03 img/s 12345.5]")
    lines = [line.rstrip() for line in pictures]
    assert any(line.endswith("/a/path/that/stays/whole") for line in lines)
    assert "one word after another " * 4 + "one word" in lines  # 100 columns, at a space


def test_an_evaluation_shows_what_there_is_and_says_where_there_is_no_score(tmp_path):
    script = """
import sys
from pathlib import Path
from zeta.run.console import Console
console = Console(Path(sys.argv[1]), 0)
console.start(0, 2, 0.0, 1)
console.evaluation(1, {}, {}, "")
console.evaluation(1, {}, {"k-NN": 0.4286}, "")
console.evaluation(2, {"val loss": 0.5}, {}, "best 75.00% at step 1")
console.close()
"""
    done = _script(script, tmp_path / "log")
    assert done.stdout.splitlines() == [
        "step 1/2  evaluated, without a score",
        "step 1/2  k-NN  42.86%",
        "step 2/2  val loss    0.5000  best 75.00% at step 1",
    ]


def test_a_run_with_nothing_left_to_do_shows_no_bar(tmp_path):
    script = _SCRIPT.replace("console.start(2, 4, 2 / 4, 1)", "console.start(60, 30, 2.0, 1)")
    command = [sys.executable, "-c", script, str(tmp_path / "log"), "0"]
    assert "?step/s" not in _on_terminal(command, 100)


_BY_IMAGES = """
import sys, time
from pathlib import Path
from zeta.run.console import Console
console = Console(Path(sys.argv[1]), 0)
console.start(100, None, 0.5, 1)  # it went on from half of its images
time.sleep(0.5)
console.step(101, 0.5001)
console.metrics(101, {"train/loss": 1.0})
console.step(200, 1.25)  # the last step may go beyond
console.metrics(200, {"train/loss": 1.0})
console.close()
"""


def test_a_run_that_ends_by_images_tells_when_on_a_line_and_beside_the_bar(tmp_path):
    command = [sys.executable, "-c", _BY_IMAGES, str(tmp_path / "log")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, last = (line.split() for line in done.stdout.splitlines())
    hours, minutes, seconds = map(int, first[first.index("eta") + 1].split(":"))
    assert 2499 <= 3600 * hours + 60 * minutes + seconds < 3600  # 0.4999 left, 0.0001 in 0.5 s
    assert last[last.index("eta") + 1] == "0:00:00"
    assert re.search(r"eta 0:\d\d:\d\d loss 1.0000", _on_terminal(command, 100))
