"""The exit codes that launchers and batch scripts act on. Anything else is a crash."""

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit status of a rank: the request to the launcher that started it."""

    FINISHED = 0
    """The run is complete: do nothing."""
    REQUEUE = 85
    """State is saved and work is left: start the same command again."""
    NEVER_RESTART = 93
    """A restart would fail the same way (config error, NaN limit, quarantine budget)."""
    INTERRUPTED = 130
    """Ctrl-C: state is saved; the same command continues the run later."""


class RunError(Exception):
    """A failure that a restart would repeat, raised on every rank; its text names the remedy."""


class UnsavedError(Exception):
    """The run ended without saving its last steps; raised on every rank.

    It counts as a crash: a restart repeats those steps from the last good checkpoint.
    """
