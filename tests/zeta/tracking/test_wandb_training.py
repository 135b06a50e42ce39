"""W&B beside real training: what it costs, and what it has after a kill."""

import json
import threading
import time

import pytest

from tests.zeta.tracking.wandb_record import history
from tests.zeta.tracking.wandb_server import KEY, wandb_server
from zeta.run.directory import RunDir

pytestmark = pytest.mark.slow

JOB = "tests.zeta.trainer_jobs.train"
STEPS = 30
DRAW_S = 0.1


def _run(run_dir, steps, **changes):
    train = {"packs_per_step": 2, "max_steps": steps, "zero_stage": 0, "dtype": "fp32"}
    train |= {"log_every": 1, "checkpoint_every": 4}
    return {"run_dir": str(run_dir), "train": train, **changes}


def _metric(run_dir, name):
    lines = map(json.loads, RunDir(run_dir).metrics.read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def _step_s(run_dir):
    steps = sorted(_metric(run_dir, "time/step_s").values())
    return steps[len(steps) // 2]


def test_a_server_that_fails_and_stalls_and_recovers_does_not_slow_training(ranks, tmp_path):
    slow = {"slow": {"rank": 0, "where": "data", "seconds": DRAW_S}}
    ranks.run(JOB, 2, _run(tmp_path / "without", STEPS, accidents=slow))
    with wandb_server() as server:

        def trouble():
            for mood in ("failing", "stalling", "well"):
                server.mood = mood
                time.sleep(STEPS * DRAW_S / 3)

        away = threading.Thread(target=trouble)
        away.start()
        environment = server.environment(tmp_path)
        run_dir = tmp_path / "with"
        online = {"wandb": {"mode": "online", "finish_s": 60}, "environment": environment}
        ranks.run(JOB, 2, _run(run_dir, STEPS, accidents=slow, **online))
        away.join()
        (run,) = server.runs.values()
        assert [step for step, _ in run.history("train/loss")] == list(range(1, STEPS + 1))
        assert run.exit_codes == [0]
    assert _step_s(run_dir) < _step_s(tmp_path / "without") + 0.05
    assert list(_metric(run_dir, "train/loss")) == list(range(1, STEPS + 1))
    assert (run_dir / "FINISHED").exists()
    holders = [p for p in run_dir.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert holders == []


def test_after_a_kill_the_sessions_hold_each_step_once_as_metrics_jsonl_does(ranks, tmp_path):
    run_dir = tmp_path / "run"
    offline = {"wandb": {"mode": "offline"}}
    killed = {"kill": {"phase": "train step", "ranks": [0, 1], "count": 7}}
    codes, _ = ranks.start(JOB, 2, _run(run_dir, 8, accidents=killed, **offline))
    assert codes == [-9, -9]
    ranks.run(JOB, 2, _run(run_dir, 8, **offline))
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    rows = [row for path in files for row in history(path)]
    found = [(row["trainer/step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert found == list(_metric(run_dir, "train/loss").items())
    assert json.loads((run_dir / "wandb_state.json").read_text())["logged"]["train/loss"] == 8
