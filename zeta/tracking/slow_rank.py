"""The one rule by which a rank counts as slow, for the console and for W&B's alerts."""

from __future__ import annotations

from dataclasses import dataclass

from zeta import metric_names as names

NOBODY = -1
"""Stands for no rank."""


@dataclass
class SlowRank:
    """Memory of the rule: a rank is slow if it is the slowest by far in two logs in a row.

    One log is not enough: on a busy machine now one rank is slow and now another.
    """

    suspect: int = NOBODY
    """Rank that was the slowest by far in the last log."""
    reported: int = NOBODY
    """Rank that was reported; set by the caller, cleared when no rank is slow any more."""

    def is_new(self, rank: int, ratio: float) -> bool:
        """Note the next log, and return whether its slowest rank is slow and not yet reported.

        Args:
            rank: the slowest rank.
            ratio: its own time over the mean of all ranks.
        """
        before, slow = self.suspect, ratio >= names.STRAGGLER_FROM
        self.suspect = rank if slow else NOBODY
        if not slow:
            self.reported = NOBODY
        return slow and rank == before and rank != self.reported
