"""Weights & Biases: one run for the life of a run directory, however often it is requeued."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import wandb

from zeta.metric_names import STEP
from zeta.train_config import WandbConfig

WandbMode = Literal["online", "offline", "disabled"]
_LOG = logging.getLogger(__name__)


class WandbSink:
    """Logs to one W&B run; a failure of W&B is noted and never stops training."""

    def __init__(
        self,
        config: WandbConfig,
        *,
        name: str,
        folder: Path,
        run_id: str,
        run_config: Mapping[str, Any],
    ) -> None:
        """Start or continue the run.

        Args:
            config: mode and project.
            name: display name of the run.
            folder: where W&B keeps its local files (`folder/wandb`).
            run_id: id of the run, the same after each restart; see `stable_run_id`.
            run_config: the resolved config, shown in W&B.
        """
        self._run: Any = None
        mode = resolve_mode(config.mode, os.environ)
        if mode == "disabled":
            return
        try:
            self._run = wandb.init(
                project=config.project,
                name=name,
                id=run_id,
                # W&B ignores resume offline, with a warning; `wandb sync --append` stitches.
                resume="allow" if mode == "online" else None,
                mode=mode,
                dir=str(folder),
                config=dict(run_config),
                settings=wandb.Settings(console="off", silent=True),
            )
            self._run.define_metric(STEP)
            self._run.define_metric("*", step_metric=STEP)
        except (wandb.Error, OSError) as error:
            self._give_up("start", error)

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Log `values`."""
        if self._run is None:
            return
        try:
            # Never step=: W&B drops every step below its last, and so each replayed one.
            self._run.log({STEP: step, **values})
        except (wandb.Error, OSError) as error:
            self._give_up("log", error)

    def flush(self) -> None:
        """W&B writes in a process of its own; there is nothing to flush."""

    def close(self) -> None:
        """End the W&B run."""
        if self._run is not None:
            try:
                self._run.finish()
            except (wandb.Error, OSError) as error:
                self._give_up("finish", error)

    def _give_up(self, action: str, error: Exception) -> None:
        _LOG.warning("W&B could not %s (%s); training goes on without it", action, error)
        self._run = None


def resolve_mode(mode: str, environment: Mapping[str, str]) -> WandbMode:
    """Return online, offline or disabled; auto is online only where an API key is found.

    W&B never gets to ask for a key. WANDB_MODE, W&B's own switch, decides what auto means.
    """
    chosen = environment.get("WANDB_MODE") if mode == "auto" else mode
    if chosen == "disabled":
        return "disabled"
    has_key = "WANDB_API_KEY" in environment or _netrc_has_key(environment)
    if chosen == "online" or (chosen != "offline" and has_key):
        return "online"
    return "offline"


def stable_run_id(path: Path) -> str:
    """Return the run id kept at `path`, made once."""
    if not path.exists():
        building = path.with_name(f".tmp-{path.name}")
        building.write_text(secrets.token_hex(4) + "\n")
        building.replace(path)
    return path.read_text().strip()


def _netrc_has_key(environment: Mapping[str, str]) -> bool:
    path = Path(environment.get("NETRC", "~/.netrc")).expanduser()
    host = environment.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    return path.is_file() and host in path.read_text(errors="replace").split()
