"""A process that logs as training does, step by step as it is told: `python -m ... ARGUMENTS`.

It reads commands, a JSON list a line: ["log", STEP, VALUES], ["close", OUTCOME, WHY]; and answers
each with a line, which holds the seconds that it took and what was said to the user meanwhile.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.zeta.training import ROOT
from zeta.run.directory import RunDir
from zeta.tracking.config import WandbConfig
from zeta.tracking.sinks import JsonlSink, OnlyNew, WithAxes, last_logged_steps
from zeta.tracking.wandb_mode import stable_run_id
from zeta.tracking.wandb_sink import WandbSink


def serve() -> None:
    arguments = json.loads(sys.argv[1])
    run_dir, said = RunDir(Path(arguments["run_dir"])), []
    step = arguments.get("resumed_step", 0)
    seen = {}
    sink = WithAxes(JsonlSink(run_dir.metrics, step), lambda _step: seen)
    sink = OnlyNew(sink, last_logged_steps(run_dir.metrics))
    tracker = WandbSink(
        WandbConfig(**arguments["wandb"]),
        name="n",
        run_dir=run_dir,
        run_id=stable_run_id(run_dir.wandb_run_id, arguments.get("saved_id")),
        run_config={"train": {"seed": 3}, "code": {"commit": "c0ffee"}},
        resumed_step=step,
        notify=said.append,
    )
    for line in sys.stdin:
        command, *values = json.loads(line)
        began = time.monotonic()
        if command == "log":
            seen |= {"data/images_seen": 8 * values[0], "data/tokens_seen": 100 * values[0]}
            sink.log(*values)
            tracker.poll()
        else:
            sink.close()
            tracker.close(*values)
        print(json.dumps([time.monotonic() - began, said]), flush=True)
        said.clear()


class FakeTraining:
    """Such a process."""

    def __init__(self, run_dir: Path, environment: dict[str, str], **arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps({"run_dir": str(run_dir), **arguments})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONPATH": str(ROOT)},
        )
        self.said: list[str] = []

    def log(self, step: int, **values: object) -> float:
        """Log `train/loss` or other values; returns the seconds it took."""
        metrics = {name.replace("__", "/"): value for name, value in values.items()}
        return self._tell(["log", step, metrics or {"train/loss": 10 / step}])

    def close(self, outcome: str = "finished", why: str = "") -> float:
        """End; returns the seconds it took."""
        seconds = self._tell(["close", outcome, why])
        self.process.communicate()
        assert self.process.returncode == 0
        return seconds

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.communicate()

    def _tell(self, command: list[object]) -> float:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        seconds, said = json.loads(self.process.stdout.readline())
        self.said += said
        return seconds


if __name__ == "__main__":
    serve()
