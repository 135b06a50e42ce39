"""What W&B has of a run: kept in the run directory, so that no restart sends anything twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zeta import metric_names as names
from zeta.tracking.sinks import last_logged_steps

AXES = (names.IMAGES_SEEN, names.TOKENS_SEEN)
"""Metrics that every row repeats, so that each can be the x-axis of all others."""


@dataclass
class WandbState:
    """`wandb_state.json`."""

    logged: dict[str, int] = field(default_factory=dict)
    """Last step of each metric that was handed to W&B. It is written before the rows are handed
    over: what a kill between the two leaves out is missing in W&B, never twice."""
    before: int = -1
    """The same for metrics that are not in `logged`."""
    unsure_from: dict[str, int] | None = field(default_factory=dict)
    """`logged` as it was when the present online session began; None: all of it was uploaded."""
    session: int = 0
    """Process that trained in the last session; 0: there was none."""
    mode: str | None = None
    """online or offline: of the last session; None: there was none."""
    page: str | None = None
    """URL of the run's page, once the server has told it."""
    trouble: str | None = None
    """Why the server cannot be reached; None: it can."""
    pictures: list[str] = field(default_factory=list)
    """Names of the pack pictures that W&B has."""
    alerts: dict[str, float] = field(default_factory=dict)
    """What the alerts were last about, and when: see `zeta.tracking.wandb_alerts`."""

    def take_new(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a line of metrics.jsonl has that W&B has not, and note it as handed over.

        The result is empty, or holds the metrics, W&B's step metric and the axes.
        """
        step = row["step"]
        new = {
            name: value
            for name, value in row.items()
            if name not in ("step", *AXES) and step > self.logged.get(name, self.before)
        }
        if not new:
            return {}
        axes = {name: row[name] for name in AXES if name in row}
        result = {names.STEP: step, **axes, **new}
        self.note(result)
        return result

    def note(self, row: Mapping[str, Any]) -> None:
        """Note a row, in the form that `take_new` returns, as handed over."""
        self.logged |= dict.fromkeys(row.keys() - {names.STEP, *AXES}, row[names.STEP])

    def settle(self, on_server: float | None) -> None:
        """Decide what the server lacks of a session that did not end in order.

        Args:
            on_server: last step that the server has of the run; None: it has no such run.
        """
        if self.unsure_from is None:
            return
        last = -1 if on_server is None else int(on_server)
        if not self.logged:  # nothing is known here: the directory is new to a run that is not
            self.before = last
            return
        floor = self.unsure_from
        self.logged = {
            name: max(floor.get(name, self.before), min(step, last))
            for name, step in self.logged.items()
        }

    def write(self, path: Path) -> None:
        """Replace the file, and wait for the disk."""
        building = path.with_name(f".tmp-{path.name}")
        with building.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        building.replace(path)


def read_state(path: Path) -> WandbState | None:
    """Return what `path` holds, or None where there is no such file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        return WandbState(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it, and W&B gets the whole run once more"
        ) from error


def begin_state(path: Path, metrics: Path, sessions: Path) -> WandbState:
    """Return the state of a run, made where there is none yet.

    Args:
        path: wandb_state.json.
        metrics: metrics.jsonl.
        sessions: W&B's folder of the run. Sessions in it without a state are of a version that
            logged every line, and kept none.
    """
    state = read_state(path)
    if state is None:
        state = WandbState()
        if any(sessions.glob("*run-*")):
            state.logged, state.unsure_from = last_logged_steps(metrics, ever=True), None
    return state


def has_news(state: WandbState, metrics: Path) -> bool:
    """Whether metrics.jsonl holds anything that was not handed to W&B."""
    return any(
        step > state.logged.get(name, state.before)
        for name, step in last_logged_steps(metrics).items()
        if name not in ("step", *AXES)
    )
