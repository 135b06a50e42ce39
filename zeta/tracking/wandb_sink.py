"""Weights & Biases: one run for the life of a run directory, however often it is requeued.

The W&B client runs in processes of its own, which follow metrics.jsonl: see
`zeta.tracking.wandb_worker`. Here is what training does about it, which is to start them, and to
wait for them at the end.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from zeta.run.directory import RunDir
from zeta.tracking.config import WandbConfig
from zeta.tracking.wandb_control import Control, Ending, Order
from zeta.tracking.wandb_mode import resolve_mode
from zeta.tracking.wandb_state import WandbState, read_state
from zeta.tracking.wandb_supervisor import GRACE_S, OFFLINE_S

_LONG_S = 3.0
"""Seconds at the end after which it is said what is waited for."""


class WandbSink:
    """Has metrics.jsonl sent to one W&B run; a failure of W&B is told and never stops training."""

    def __init__(
        self,
        config: WandbConfig,
        *,
        name: str,
        run_dir: RunDir,
        run_id: str,
        run_config: Mapping[str, Any],
        resumed_step: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        """Start to send what metrics.jsonl holds and will hold.

        Args:
            config: mode, project and how the run is filed.
            name: display name of the run.
            run_dir: where metrics.jsonl is, and where W&B keeps its local files (`wandb/`).
            run_id: id of the run, the same after each restart; see `stable_run_id`.
            run_config: shown in W&B.
            resumed_step: committed steps that training goes on from.
            say: told what a person should know.
        """
        self._run_dir, self._say, self._limit_s = run_dir, say, config.finish_s
        self._told: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self.mode = resolve_mode(config.mode, os.environ)
        if self.mode == "disabled":
            return
        if config.mode == "online" and self.mode == "offline":
            say(
                "W&B: tracker.wandb.mode is online, but there is no API key: recorded offline; set "
                "WANDB_API_KEY, or type `wandb login`"
            )
        order = Order(
            run_dir=str(run_dir.path.absolute()),
            run_id=run_id,
            name=name,
            project=config.project,
            mode=self.mode,
            pid=os.getpid(),
            entity=config.entity,
            group=config.group,
            job_type=config.job_type,
            tags=list(config.tags),
            config=dict(run_config),
            resumed_step=resumed_step,
            finish_s=config.finish_s,
        )
        self._control = Control.begin(order)
        descriptor = self._control.descriptor
        # -P: a wandb.py in the folder that training was started from must not stand in for W&B.
        command = [sys.executable, "-P", "-m", "zeta.tracking.wandb_supervisor", str(descriptor)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=[descriptor],
            start_new_session=True,  # Ctrl-C and the end of the ranks are not meant for it
        )

    def tell(self) -> None:
        """Say where the run is shown, or why it is not, as soon as that is known."""
        if self._process is None or (state := self._state()) is None:
            return
        if state.trouble is not None and state.mode != "offline":
            self._say_once(
                f"W&B cannot be reached ({state.trouble}); training goes on, and what W&B misses "
                "is sent later"
            )
        elif state.mode == "online" and state.page is not None:
            self._say_once(f"W&B: {state.page}")

    def close(self, outcome: str, why: str = "") -> None:
        """End the session: wait for what is on its way, but not long, and say what is left.

        Args:
            outcome: finished, stopped or failed; see `Ending`.
            why: what a failed run says.
        """
        if self._process is None:
            return
        self._control.end(Ending(outcome, why))
        self._control.close()
        limit_s = self._limit_s + GRACE_S + OFFLINE_S + GRACE_S
        try:
            try:
                self._process.wait(_LONG_S)
            except subprocess.TimeoutExpired:
                self._say("W&B: waiting for the last metrics to be sent")
                self._process.wait(limit_s - _LONG_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.tell()
        self._process = None
        if hint := rest_hint(self._run_dir, self._state()):
            self._say(hint)

    def _say_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._say(text)

    def _state(self) -> WandbState | None:
        """Return what the session of this process has noted, if it has."""
        try:
            state = read_state(self._run_dir.wandb_state)
            return state if state is not None and state.session == os.getpid() else None
        except ValueError as error:
            self._say_once(f"W&B: {error}")
            return None


def rest_hint(run_dir: RunDir, state: WandbState | None) -> str | None:
    """Return how to send what W&B does not have of a run that has ended; None: it has all."""
    command = f"`zeta wandb-sync {shlex.quote(str(run_dir.path))}`"
    if state is None or state.mode is None:
        return f"W&B: nothing was recorded of this part of the run; {command} sends it"
    if state.trouble is not None or state.unsure_from is not None:
        trouble = "" if state.trouble is None else f" ({state.trouble})"
        return f"W&B does not have all of the run{trouble}; {command} sends the rest"
    if state.mode == "offline":
        return f"W&B: recorded offline; {command} uploads it"
    return None
