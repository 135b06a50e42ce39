"""The rule by which a run says that its loader, not its device, sets the pace."""

from __future__ import annotations

from dataclasses import dataclass

from zeta import metric_names as names

LONG_S = 300.0
"""Seconds of training for which the loader has to bind before it is said: a cold cache or a slow
moment of the storage is no cause to change anything."""


@dataclass
class SupplyWatch:
    """Memory of the rule: how long the loader has been binding, log after log."""

    binding_s: float = 0.0
    """Seconds of training since the loader began to bind."""
    said: bool = False

    def warning(self, ratio: float, seconds: float) -> str | None:
        """Note the next log; return a warning once the loader has been binding for long.

        It is given once, and again only after the loader has kept up for a while.

        Args:
            ratio: `data/supply_ratio` of the steps since the log before.
            seconds: time of those steps.
        """
        if ratio >= names.SUPPLY_FROM:
            self.binding_s, self.said = 0.0, False
            return None
        self.binding_s += seconds
        if self.said or self.binding_s < LONG_S:
            return None
        self.said = True
        return (
            f"WARNING: the loader binds: for {self.binding_s / 60:.0f} minutes training has waited "
            f"for data, now {1 - ratio:.0%} of the time. More cores for data.workers, smaller "
            "images (`zeta shards shrink`) or several views of each (data.views) make it faster; "
            "`zeta data bench` measures the loader alone"
        )
