"""Rules that decide what W&B alerts about, from the lines of metrics.jsonl, and how often."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zeta import metric_names as names
from zeta.tracking.slow_rank import NOBODY, SlowRank

INTERVAL_S = 1800.0
"""Least seconds between two alerts of a kind, across restarts of the run."""


@dataclass(frozen=True)
class Alert:
    """A message that W&B sends to people."""

    kind: str
    title: str
    text: str
    level: str = "WARN"
    """INFO, WARN or ERROR."""


@dataclass
class Alerts:
    """The rules. What happens within the interval of its kind is reported by the next alert.

    Args:
        memory: last reported value by kind, and when (`kind_at`, seconds since 1970). It is
            changed in place, for the caller to save.
    """

    memory: dict[str, float] = field(default_factory=dict)

    def of_row(self, row: Mapping[str, Any], now: float | None = None) -> list[Alert]:
        """Return the alerts that a line of metrics.jsonl gives cause for.

        Args:
            row: `step` and metrics by name.
            now: seconds since 1970.
        """
        now = time.time() if now is None else now
        found = (self._nan(row), self._quarantine(row), self._straggler(row))
        return [alert for alert, value in found if alert and self._may_send(alert.kind, value, now)]

    def of_event(self, alert: Alert, now: float | None = None) -> list[Alert]:
        """Return the alert, unless one of its kind was sent within the interval."""
        now = time.time() if now is None else now
        return [alert] if self._may_send(alert.kind, 0.0, now) else []

    def _may_send(self, kind: str, value: float, now: float) -> bool:
        # A clock that was set back must not silence alerts until it is there again.
        if 0 <= now - self.memory.get(f"{kind}_at", float("-inf")) < INTERVAL_S:
            return False
        self.memory |= {kind: value, f"{kind}_at": now}
        return True

    def _nan(self, row: Mapping[str, Any]) -> tuple[Alert | None, float]:
        skipped = _number(row, names.SKIPPED_STEPS)
        before = self.memory.get("nan", 0.0)
        if skipped <= before:
            return None, skipped
        text = (
            f"{skipped - before:g} more steps up to step {row['step']} had a loss or gradient "
            f"that is not finite and were skipped; {skipped:g} in all"
        )
        return Alert("nan", "Loss or gradient not finite", text), skipped

    def _quarantine(self, row: Mapping[str, Any]) -> tuple[Alert | None, float]:
        """Alert at the first image, and whenever their number has doubled since."""
        count = _number(row, names.QUARANTINED)
        if count < max(1.0, 2 * self.memory.get("quarantine", 0.0)):
            return None, count
        text = f"{count:g} images could not be used up to step {row['step']}: see quarantine.jsonl"
        return Alert("quarantine", "Images could not be used", text), count

    def _straggler(self, row: Mapping[str, Any]) -> tuple[Alert | None, float]:
        if names.STRAGGLER_RATIO not in row:
            return None, NOBODY
        ratio, rank = _number(row, names.STRAGGLER_RATIO), int(_number(row, names.SLOWEST_RANK))
        rule = SlowRank(*(int(self.memory.get(key, NOBODY)) for key in ("suspect", "straggler")))
        is_new = rule.is_new(rank, ratio)
        self.memory |= {"suspect": rule.suspect, "straggler": rule.reported}
        if not is_new:
            return None, rank
        host = row.get(names.SLOWEST_HOST, "an unknown host")
        text = f"rank {rank} on {host} takes {ratio:.2f} times as long as the mean of the ranks"
        return Alert("straggler", "One rank is slow", f"{text}, at step {row['step']}"), rank


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name, 0)
    return float(value) if isinstance(value, int | float) else 0.0
