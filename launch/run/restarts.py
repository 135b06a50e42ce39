"""Decide whether a run that ended is started again: the rule of `zeta launch local`.

slurm/pretrain.sbatch follows the same rule in a few lines of its own; the tests hold both against
one table.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from zeta.exit_codes import ExitCode

MAX_RESTARTS = 100
MAX_STALLED = 3
"""Most starts in a row without a new checkpoint: what ended each of them would end the next."""

_STOPPED_BEFORE_READY = {128 + n for n in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
_ENDS = {ExitCode.FINISHED, ExitCode.NEVER_RESTART, ExitCode.INTERRUPTED}


def as_rank_means(code: int) -> int:
    """Return the exit status that a rank would have ended with, had it been able to.

    USR1, USR2 and TERM ask a rank to save and to be started again (85). They end one whose
    interpreter is not up yet, and so has nothing to save.

    Args:
        code: exit status as a shell gives it: 128 + signal for a rank that a signal ended.
    """
    return ExitCode.REQUEUE if code in _STOPPED_BEFORE_READY else code


def wants_restart(code: int) -> bool:
    """Return whether a run that ended with `code` has work left that another start may do.

    It has after saving on request (85) and after a crash; not once it is finished (0), would fail
    the same way (93) or was stopped by a person (130).
    """
    return code not in _ENDS


@dataclass(frozen=True)
class RestartCount:
    """How often a run was started again, and how often in vain."""

    restarts: int = 0
    """Starts after the first, whatever their cause."""
    stalled: int = 0
    """Starts in a row, up to the last, that made no checkpoint."""

    def ended(self, *, new_checkpoint: bool) -> RestartCount:
        """Return the count after a start has ended."""
        return RestartCount(self.restarts, 0 if new_checkpoint else self.stalled + 1)

    def again(self) -> RestartCount:
        """Return the count with one more restart."""
        return RestartCount(self.restarts + 1, self.stalled)

    def obstacle(self, max_restarts: int = MAX_RESTARTS, max_stalled: int = MAX_STALLED) -> str:
        """Return why the run is not started again; empty: it may be."""
        if self.stalled >= max_stalled:
            return f"{self.stalled} starts in a row without a new checkpoint"
        if self.restarts >= max_restarts:
            return f"{self.restarts} restart{'' if self.restarts == 1 else 's'}"
        return ""
