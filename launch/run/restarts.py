"""Decide whether a run that ended is started again: the rule of `zeta launch local`.

slurm/pretrain.sbatch implements the same rule in a few lines of shell; the tests compare both with
one table.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from zeta.exit_codes import ExitCode

MAX_RESTARTS = 100
MAX_STALLED = 3
"""Limit of starts in a row without a new checkpoint; the next start would end the same way."""

_STOPPED_BEFORE_READY = {128 + n for n in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
_ENDS = {ExitCode.FINISHED, ExitCode.NEVER_RESTART, ExitCode.INTERRUPTED}


def as_rank_means(code: int) -> int:
    """Return the exit status of a rank, with 85 for a rank ended by a request to save.

    USR1, USR2 and TERM ask a rank to save and to be started again (85). If its interpreter has not
    started yet, the signal ends the rank, which has nothing to save.

    Args:
        code: exit status as in a shell: 128 + signal for a rank that a signal ended.
    """
    return ExitCode.REQUEUE if code in _STOPPED_BEFORE_READY else code


def wants_restart(code: int) -> bool:
    """Return whether another start may continue a run that ended with `code`.

    It may after a save on request (85) and after a crash. It may not if the run is finished (0),
    would fail the same way (93) or was stopped by a person (130).
    """
    return code not in _ENDS


@dataclass(frozen=True)
class RestartCount:
    """The number of restarts of a run, and of those without progress."""

    restarts: int = 0
    """Number of starts after the first, for any cause."""
    stalled: int = 0
    """Number of latest starts in a row that made no checkpoint."""

    def ended(self, *, new_checkpoint: bool) -> RestartCount:
        """Return the count after a start has ended."""
        return RestartCount(self.restarts, 0 if new_checkpoint else self.stalled + 1)

    def again(self) -> RestartCount:
        """Return the count with one more restart."""
        return RestartCount(self.restarts + 1, self.stalled)

    def obstacle(self, max_restarts: int = MAX_RESTARTS, max_stalled: int = MAX_STALLED) -> str:
        """Return the reason not to start the run again; empty: it may be started."""
        if self.stalled >= max_stalled:
            return f"{self.stalled} starts in a row without a new checkpoint"
        if self.restarts >= max_restarts:
            return f"{self.restarts} restart{'' if self.restarts == 1 else 's'}"
        return ""
