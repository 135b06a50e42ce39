"""Find the rank that the others wait for, by comparing each rank's own time at every log.

A rank's own time is the time before it first waits for others: drawing its packs, and the forward
pass and loss of each of them. The backward pass is left out, because gradients are exchanged in it
and every rank leaves it at about the same time; a slow host or an expensive pack shows in the
forward pass just as well.

On a CUDA device work is queued and the host runs ahead of it, so the time of a forward pass is
taken from events on the device's stream and read after the step, which ends by waiting for the
device anyway. At ZeRO-3 the forward pass waits for the weights of other ranks, so the ratio is a
lower bound.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from zeta import metric_names as names
from zeta.tracking.slow_rank import SlowRank


@dataclass(frozen=True)
class RankLoad:
    """A rank's own time in a step, in seconds: the mean since the last log."""

    host: str
    data_s: float
    """Waiting for its packs."""
    forward_s: float
    peak_gib: float = 0.0
    """Peak memory so far, in GiB."""

    @property
    def own_s(self) -> float:
        """Time before it waited for others."""
        return self.data_s + self.forward_s


@dataclass
class Balance:
    """The sum of this rank's own time, and its comparison with the other ranks."""

    notify: Callable[[str], None]
    """Called with a message when one rank is much slower than the others."""
    host: str = field(default_factory=socket.gethostname)
    _data_s: float = 0.0
    _forward_s: float = 0.0
    _steps: int = 0
    _slow: SlowRank = field(default_factory=SlowRank)

    def add(self, data_s: float, forward_s: float) -> None:
        """Count one step."""
        self._data_s += data_s
        self._forward_s += forward_s
        self._steps += 1

    def take(self, peak_gib: float) -> RankLoad:
        """Return the mean of the steps since the last call, for the other ranks."""
        steps = max(self._steps, 1)
        load = RankLoad(self.host, self._data_s / steps, self._forward_s / steps, peak_gib)
        self._data_s = self._forward_s = 0.0
        self._steps = 0
        return load

    def metrics(self, loads: list[RankLoad]) -> dict[str, float | str]:
        """Return the metrics of the loads of all ranks; log the slow rank, if it is a new one."""
        slowest, ratio = straggler(loads)
        load = loads[slowest]
        if self._slow.is_new(slowest, ratio):
            self._slow.reported = slowest
            self.notify(
                f"rank {slowest} on {load.host} is the slowest: {ratio:.2f} times the mean of the "
                f"ranks; in each step it waits {load.data_s:.3f} s for its data and takes "
                f"{load.forward_s:.3f} s forward"
            )
        return {
            names.STRAGGLER_RATIO: ratio,
            names.SLOWEST_RANK: slowest,
            names.SLOWEST_HOST: load.host,
        }


def straggler(loads: list[RankLoad]) -> tuple[int, float]:
    """Return the rank with the longest own time, and the ratio of that time to the mean."""
    own = [load.own_s for load in loads]
    slowest = max(range(len(own)), key=own.__getitem__)
    mean = sum(own) / len(own)
    return slowest, own[slowest] / mean if mean > 0 else 1.0
