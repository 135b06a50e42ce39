"""Records what W&B has of a run, in the run directory, so that no restart sends anything twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zeta import metric_names as names
from zeta.files import as_record, read_json, write_whole_text
from zeta.tracking.sinks import last_logged_steps

AXES = (names.IMAGES_SEEN, names.TOKENS_SEEN)
"""Metrics that every row repeats, so that each can be the x-axis of all others."""


@dataclass
class WandbState:
    """Content of `wandb_state.json`."""

    logged: dict[str, int] = field(default_factory=dict)
    """Last step of each metric that was handed to W&B. It is written before the rows are handed
    over: after a kill between the two they are missing in W&B, but never there twice."""
    before: int = -1
    """Last step of the metrics that are not in `logged`."""
    unsure_from: dict[str, int] | None = field(default_factory=dict)
    """`logged` when the current online session began; None: all of `logged` was uploaded."""
    session: int = 0
    """Process id of the training process of the last session; 0: no session yet."""
    mode: str | None = None
    """Mode of the last session, online or offline; None: no session yet."""
    page: str | None = None
    """URL of the run's page, once the server has sent it."""
    trouble: str | None = None
    """Why the server cannot be reached; None: it can."""
    pictures: list[str] = field(default_factory=list)
    """Names of the pack pictures that W&B has."""
    alerts: dict[str, float] = field(default_factory=dict)
    """Memory of `zeta.tracking.wandb_alerts.Alerts`."""

    def take_new(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what W&B lacks of a line of metrics.jsonl, and note it as handed over.

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
        """Work out what the server has of a session that did not end in order.

        Args:
            on_server: last step that the server has of the run; None: it does not have the run.
        """
        if self.unsure_from is None:
            return
        last = -1 if on_server is None else int(on_server)
        if not self.logged:  # the directory is new, but the run may not be (a copied checkpoint)
            self.before = last
            return
        floor = self.unsure_from
        self.logged = {
            name: max(floor.get(name, self.before), min(step, last))
            for name, step in self.logged.items()
        }

    def write(self, path: Path) -> None:
        """Replace the file, and wait for the disk."""
        write_whole_text(path, json.dumps(asdict(self)))


def read_state(path: Path) -> WandbState | None:
    """Return the state in the file `path`, or None if the file does not exist.

    Raises:
        ValueError: the file is damaged.
    """
    what = "remove it, and W&B gets what is logged from then on"
    try:
        return as_record(
            WandbState, read_json(path, limit=2**28, what=what), place=str(path), what=what
        )
    except FileNotFoundError:
        return None


def begin_state(path: Path, metrics: Path, sessions: Path) -> WandbState:
    """Return the state of a run: that of the file, or a new one.

    Args:
        path: wandb_state.json.
        metrics: metrics.jsonl.
        sessions: W&B's folder of the run. If it holds sessions but there is no state (the file
            was removed, or an early version of zeta wrote none), all lines count as sent.
    """
    state = read_state(path)
    if state is None:
        state = WandbState()
        if any(sessions.glob("*run-*")):
            state.logged, state.unsure_from = last_logged_steps(metrics, ever=True), None
    return state


def has_news(state: WandbState, metrics: Path) -> bool:
    """Return whether metrics.jsonl holds anything that was not handed to W&B."""
    return any(
        step > state.logged.get(name, state.before)
        for name, step in last_logged_steps(metrics).items()
        if name not in ("step", *AXES)
    )
