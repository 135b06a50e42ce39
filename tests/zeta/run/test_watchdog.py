"""A rank that hangs leaves its stacks and ends as a crash, and so do those that wait for it."""

import json
import os
import subprocess
import sys
import time

import pytest

from tests.zeta.training import ROOT
from zeta.run.directory import RunDir
from zeta.run.watchdog import CRASH, WatchdogConfig

JOB = "tests.zeta.trainer_jobs.train"
LIMITS = {"start_s": 40.0, "data_s": 2.0, "train_s": 2.0, "save_s": 3.0, "heartbeat_s": 0.2}


def _run(run_dir, **changes):
    options = {"packs_per_step": 4, "max_steps": 8, "dtype": "fp32", "checkpoint_every": 3}
    return {"run_dir": str(run_dir), "train": options, "watchdog": LIMITS, **changes}


def _beat(run_dir, rank):
    return json.loads(RunDir(run_dir).rank_heartbeat(rank).read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "phase", "waiting", "frame"),
    [
        ("data", "data", "train", "in steps"),
        ("train", "train", "train", "in wrapped"),
        ("save", "save", "save", "in _begin_save"),
    ],
)
def test_a_hang_on_one_rank_ends_all_with_their_stacks(
    ranks, tmp_path, where, phase, waiting, frame
):
    run_dir = tmp_path / "run"
    run = _run(run_dir, accidents={"hang": {"rank": 1, "where": where}})
    started = time.monotonic()
    codes, _ = ranks.start(JOB, 2, run, grace=30)
    assert time.monotonic() - started < 30
    assert codes[1] == CRASH
    assert codes[0] != 0  # by its own watchdog, or because its peer was gone
    log = RunDir(run_dir).rank_log(1).read_text()
    assert f"phase {phase}" in log
    assert "(most recent call first)" in log
    assert frame in log
    assert f"train.watchdog.{phase}_s" in log
    assert _beat(run_dir, 1)["phase"] == phase
    assert _beat(run_dir, 0)["phase"] == waiting


@pytest.mark.slow
def test_a_hang_that_holds_pythons_lock_ends_as_well(ranks, tmp_path):
    """Not even the watchdog's thread can run then; the alarm of faulthandler needs no lock."""
    run_dir = tmp_path / "run"
    where = "train, with Python's lock"
    run = _run(run_dir, accidents={"hang": {"rank": 0, "where": where}})
    run["watchdog"] = LIMITS | {"start_s": 4.0}  # the second pack is of the first step
    started = time.monotonic()
    codes, _ = ranks.start(JOB, 1, run)
    assert (codes, time.monotonic() - started < 30) == ([CRASH], True)
    log = RunDir(run_dir).rank_log(0).read_text()
    assert "Timeout" in log
    assert "in wrapped" in log


@pytest.mark.slow
def test_a_run_that_does_not_hang_is_left_alone_and_says_where_it_is(ranks, tmp_path):
    run_dir = tmp_path / "run"
    ranks.run(JOB, 2, _run(run_dir))
    for rank in range(2):
        beat = _beat(run_dir, rank)
        assert (beat["phase"], beat["step"], beat["rank"]) == ("ended", 8, rank)
        assert abs(beat["time"] - time.time()) < 60
        assert {"host", "pid", "phase_s", "limit_s"} <= beat.keys()


STACKS_OF_WORKERS = """
import multiprocessing, sys, time
from pathlib import Path
from zeta.train.config import WatchdogConfig
from zeta.run.watchdog import Watchdog

def decode_for_ever():
    time.sleep(1000)

limits = WatchdogConfig(start_s=0.5, heartbeat_s=0.1)
watchdog = Watchdog(Path(sys.argv[1]), 0, limits, print)
worker = multiprocessing.get_context("fork").Process(target=decode_for_ever)
worker.start()
worker.join()
"""


TIMEOUTS = """
import sys
from pathlib import Path
import zeta.run.watchdog
from zeta.train.config import WatchdogConfig

zeta.run.watchdog.set_collective_timeout = lambda seconds: print(seconds)
limits = WatchdogConfig(start_s=1000, data_s=100, train_s=100, save_s=500, evaluate_s=50)
watchdog = zeta.run.watchdog.Watchdog(Path(sys.argv[1]), 0, limits, print)
for step, phase in enumerate(["data", "train", "data", "train", "save", "data", "evaluate"]):
    watchdog.enter(phase, 7 + step // 2)
    print(phase)
watchdog.close()
"""


NO_ROOM = """
import os, resource, sys, time
from pathlib import Path
import zeta.run.watchdog
from zeta.train.config import WatchdogConfig

os.dup2(os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT), 2)  # the rank's log
zeta.run.watchdog._LOOK_S = 0.05
heartbeat, limits = Path(sys.argv[1]), WatchdogConfig(heartbeat_s=0.1)
watchdog = zeta.run.watchdog.Watchdog(heartbeat, 0, limits, print)
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
time.sleep(0.5)
watchdog.enter("train", 5)
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
time.sleep(0.5)
print(heartbeat.read_text())
watchdog.close()
"""


WATCHES_FOR_LONG = """
import sys
from pathlib import Path
from zeta.train.config import WatchdogConfig
from zeta.run.watchdog import Watchdog

longest = dict.fromkeys(("start_s", "data_s", "train_s", "save_s", "evaluate_s"), 1e8)
watchdog = Watchdog(Path(sys.argv[1]), 0, WatchdogConfig(**longest), print)
watchdog.enter("save", 0)
watchdog.close()
"""


def _python(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.slow
def test_collectives_may_take_long_in_the_first_step_and_not_after(tmp_path):
    done = _python(TIMEOUTS, tmp_path / "beat.json")
    said = "1060.0 data train 160.0 data train 560.0 save 160.0 data evaluate"
    assert " ".join(done.stdout.split()) == said, done.stderr


@pytest.mark.slow
def test_a_collective_that_a_rank_never_joins_fails_after_the_timeout(ranks, tmp_path):
    out = tmp_path / "out.json"
    codes, _ = ranks.start("tests.zeta.distributed_jobs.timeouts", 2, {"out": str(out)}, grace=20)
    assert codes == [0, 0]
    patient, failed_after = json.loads(out.read_text())
    assert patient
    assert 0.5 < failed_after < 4


@pytest.mark.slow
def test_forked_workers_leave_their_stacks_too(tmp_path):
    done = _python(STACKS_OF_WORKERS, tmp_path / "heartbeat" / "0.json")
    assert done.returncode == CRASH
    assert "phase start of step 0 has lasted more than 0.5 s" in done.stdout
    assert "in decode_for_ever" in done.stderr


@pytest.mark.slow
def test_a_full_disk_does_not_end_the_watch(tmp_path):
    done = _python(NO_ROOM, tmp_path / "rank_00000.json", tmp_path / "log")
    assert done.returncode == 0, (tmp_path / "log").read_text()
    assert json.loads(done.stdout)["step"] == 5
    assert "could not be written: [Errno 27]" in (tmp_path / "log").read_text()


def test_a_step_may_wait_for_the_data_of_others():
    with pytest.raises(ValueError, match=r"train\.watchdog\.train_s is 10, below .*data_s = 20"):
        WatchdogConfig(train_s=10, data_s=20)
    with pytest.raises(ValueError, match=r"train\.watchdog\.save_s is -1"):
        WatchdogConfig(save_s=-1)
    with pytest.raises(ValueError, match=r"train_s is 10, below .*data_s = 0 \(no limit\)"):
        WatchdogConfig(train_s=10, data_s=0)
    assert WatchdogConfig(train_s=0, data_s=0).limit("train") == float("inf")


@pytest.mark.slow
def test_the_longest_limit_that_is_taken_can_be_watched(tmp_path):
    with pytest.raises(
        ValueError, match=r"train\.watchdog\.start_s is 1e\+09; it must be .* 1e\+08"
    ):
        WatchdogConfig(start_s=1e9)
    done = _python(WATCHES_FOR_LONG, tmp_path / "heartbeat" / "0.json")
    assert done.returncode == 0, done.stderr
