"""W&B, with its real client: one run over restarts, no step twice, and no power over training."""

import contextlib
import fcntl
import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.zeta.tracking.wandb_jobs import FakeTraining
from tests.zeta.tracking.wandb_record import config, history, records
from tests.zeta.tracking.wandb_server import KEY, wandb_server
from zeta.run.directory import RunDir
from zeta.tracking.config import WandbConfig
from zeta.tracking.wandb_sink import WandbSink
from zeta.tracking.wandb_state import read_state

pytestmark = pytest.mark.slow


def _environment(folder, **more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return clean | {"HOME": str(folder), "WANDB_ERROR_REPORTING": "false"} | more


def _wait_for_the_session(run_dir):
    """Until what sends the metrics of a process that was killed has begun and ended."""
    _wait((run_dir / "wandb_state.json").exists)
    with (run_dir / "wandb/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


def _wait(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def _files_with(folder, text):
    return [p for p in folder.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]


def test_offline_a_kill_and_a_replay_leave_one_run_with_each_step_once(tmp_path):
    run_dir = tmp_path / "run"
    settings = {"mode": "offline", "project": "p", "group": "g", "tags": ["a", "b"]}
    settings |= {"job_type": "pretrain", "entity": "me"}
    environment = _environment(tmp_path, WANDB_API_KEY=KEY)
    first = FakeTraining(run_dir, environment, wandb=settings)
    first.log(1)
    first.log(2, **{"train__loss": 5.0, "optim__skipped_steps": 2, "data__quarantined": 1})
    first.log(3)
    first.kill()
    _wait_for_the_session(run_dir)
    again = FakeTraining(run_dir, environment, wandb=settings, resumed_step=1)
    for step in (2, 3, 4):
        again.log(step)
    again.log(4, val__top1=0.5, val__loss=1.5)
    again.close("stopped")
    assert again.said[-1] == f"W&B: recorded offline; `zeta wandb-sync {run_dir}` uploads it"

    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    run_id = (run_dir / "wandb_run_id").read_text().strip()
    assert [path.name for path in files] == [f"run-{run_id}.wandb"] * 2
    rows = [row for path in files for row in history(path)]
    assert [r["trainer/step"] for r in rows if "train/loss" in r] == [1, 2, 3, 4]
    assert [r["train/loss"] for r in rows if "train/loss" in r] == [10.0, 5.0, 10 / 3, 2.5]
    assert [r["data/images_seen"] for r in rows] == [8 * r["trainer/step"] for r in rows]
    assert [r["data/tokens_seen"] for r in rows] == [100 * r["trainer/step"] for r in rows]
    assert rows[-1]["val/top1"] == 0.5

    run = records(files[0], "run")[0]
    assert (run.entity, run.project, run.display_name) == ("me", "p", "n")
    assert (run.run_group, run.job_type, list(run.tags)) == ("g", "pretrain", ["a", "b"])
    assert config(files[0]) | {"_wandb": 0} == {
        "train": {"seed": 3},
        "code": {"commit": "c0ffee"},
        "_wandb": 0,
    }
    metrics = [metric for path in files for metric in records(path, "metric")]
    assert {m.glob_name or m.name for m in metrics} >= {"trainer/step", "*", "val/top1"}
    best = {m.name: m.summary for m in metrics if m.name}
    assert best["val/top1"].max
    assert best["val/loss"].min
    assert best["train/loss"].min
    titles = [[alert.title for alert in records(path, "alert")] for path in files]
    assert titles == [
        ["Loss or gradient not finite", "Images could not be used", "Run failed"],
        ["Run restarted"],
    ]
    assert [record.exit_code for path in files for record in records(path, "exit")] == [1, 85]
    assert records(files[0], "stats"), "no system metrics"
    assert not _files_with(run_dir, KEY)


def test_the_signal_that_ends_the_client_of_a_preempted_job_ends_no_record(tmp_path):
    run_dir = tmp_path / "run"
    training = FakeTraining(run_dir, _environment(tmp_path), wandb={"mode": "offline"})
    training.log(1)
    _wait(lambda: _logged(run_dir) == [1])
    for process in _clients(tmp_path):
        os.kill(process, signal.SIGTERM)
    training.log(2)
    training.log(3)
    training.close("stopped")
    assert _logged(run_dir) == [1, 2, 3]
    last = max(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert [record.exit_code for record in records(last, "exit")] == [85]


def _logged(run_dir):
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    return [row["trainer/step"] for path in files for row in history(path)]


def _clients(home):
    """Process ids of the W&B clients that were started under a home directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = f"HOME={home}".encode() in (path / "environ").read_bytes().split(b"\0")
            if mine and b"wandb-core" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    assert found
    return found


def test_a_server_that_is_away_then_fails_then_stalls_gets_each_step_once_and_stops_nobody(
    tmp_path,
):
    run_dir = tmp_path / "run"
    with wandb_server() as server:
        environment = _environment(tmp_path) | server.environment(tmp_path)
        server.mood = "failing"
        training = FakeTraining(run_dir, environment, wandb={"mode": "auto", "finish_s": 3})
        slowest = max(training.log(step) for step in (1, 2, 3))
        _wait(lambda: server.requests > 0)
        server.mood = "well"
        _wait(lambda: (state := read_state(RunDir(run_dir).wandb_state)) and state.page)
        run_id = (run_dir / "wandb_run_id").read_text().strip()
        training.log(4)
        assert training.said[-1] == f"W&B: {server.url}/team/zeta/runs/{run_id}"
        run = server.runs[run_id]
        _wait(lambda: run.history("train/loss"))
        server.mood = "stalling"
        slowest = max(slowest, *(training.log(step) for step in (5, 6, 7)))
        assert slowest < 0.5
        assert training.close() < 30
        assert "W&B does not have all of the run" in training.said[-1]
        server.mood = "well"
        again = FakeTraining(run_dir, environment, wandb={"mode": "auto"}, resumed_step=5)
        for step in (6, 7, 8):
            again.log(step)
        again.close()
        assert again.said[-1] == f"W&B: {server.url}/team/zeta/runs/{run_id}"
        assert [step for step, _ in run.history("train/loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
        assert run.exit_codes[-1] == 0
        assert run.config["code"] == {"value": {"commit": "c0ffee"}}
        assert run.summary["train/loss"]["min"] == 10 / 8
        assert [title for title, _ in server.alerts] == ["Run restarted"]
    logged = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()]
    assert logged == list(range(1, 9))
    assert not _files_with(run_dir, KEY)


def test_where_no_server_ever_answers_the_run_is_recorded_offline(tmp_path):
    run_dir = tmp_path / "run"
    nobody = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
    training = FakeTraining(
        run_dir, _environment(tmp_path, **nobody), wandb={"mode": "online", "finish_s": 2}
    )
    training.log(1)
    assert training.close("failed", "out of luck") < 60
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    assert [row["trainer/step"] for row in history(path)] == [1]
    assert [alert.text for alert in records(path, "alert")] == ["out of luck"]
    assert "W&B: recorded offline" in training.said[-1]


def test_a_checkpoint_copied_elsewhere_goes_on_in_the_same_run_without_its_steps_again(tmp_path):
    with wandb_server() as server:
        environment = _environment(tmp_path) | server.environment(tmp_path)
        first = FakeTraining(tmp_path / "run", environment, wandb={})
        first.log(1)
        first.log(2)
        first.close("stopped")
        run_id = (tmp_path / "run/wandb_run_id").read_text().strip()
        copy = FakeTraining(
            tmp_path / "copy", environment, wandb={}, resumed_step=1, saved_id=run_id
        )
        copy.log(2)
        copy.log(3)
        copy.close()
        assert list(server.runs) == [run_id]
        assert [step for step, _ in server.runs[run_id].history("train/loss")] == [1, 2, 3]


def test_a_client_that_hangs_delays_neither_the_end_of_training_nor_the_next_session(tmp_path):
    run_dir = tmp_path / "run"
    settings = {"mode": "offline", "finish_s": 1}
    environment = _environment(tmp_path)
    hung = FakeTraining(run_dir, environment, wandb=settings)
    hung.log(1)
    _wait(lambda: _logged(run_dir) == [1])
    clients = _clients(tmp_path)
    for process in clients:
        os.kill(process, signal.SIGSTOP)
    assert max(hung.log(step, **{f"m{i}": 1.0 for i in range(2000)}) for step in (2, 3)) < 0.5
    hung.kill()
    began = time.monotonic()
    _wait_for_the_session(run_dir)
    assert time.monotonic() - began < 20
    again = FakeTraining(run_dir, environment, wandb=settings, resumed_step=3)
    again.log(4)
    _wait(lambda: 4 in _logged(run_dir))
    for process in set(_clients(tmp_path)) - set(clients):
        os.kill(process, signal.SIGSTOP)
    assert again.close("stopped") < 80
    for process in _clients(tmp_path):
        os.kill(process, signal.SIGKILL)
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()] == [1, 2, 3, 4]


def _sink(files, said):
    config = WandbConfig(mode="offline")
    return WandbSink(config, name="n", run_dir=files, run_id="1", run_config={}, notify=said.append)


def test_a_machine_that_starts_no_more_processes_does_not_end_training(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr("subprocess.Popen", refuse)
    said = []
    sink = _sink(RunDir(tmp_path), said)
    sink.poll()
    sink.close("finished")
    assert "could not be started or notified (Resource temporarily unavailable)" in said[0]
    assert len(said) == 2
    assert "zeta wandb-sync" in said[1]


def test_a_worker_that_breaks_is_started_again_later_and_later(tmp_path, monkeypatch):
    clock, started = [0], []

    class Broken:
        def __init__(self, *_, **__):
            started.append(clock[0])

        def poll(self):
            return 1

    monkeypatch.setattr("subprocess.Popen", Broken)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    sink = _sink(RunDir(tmp_path), [])
    for clock[0] in range(2000):
        sink.poll()
    assert started == [0, 5, 15, 35, 75, 155, 315, 635, 1235, 1835]
