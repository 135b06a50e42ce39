"""The exit codes that launchers and batch scripts act on. Anything else is a crash."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a rank's exit status asks of whoever started it."""

    FINISHED = 0
    """The run is complete: do nothing."""
    REQUEUE = 85
    """State is saved and work is left: start the same command again."""
    NEVER_RESTART = 93
    """A restart would fail the same way (config error, NaN limit, quarantine budget)."""
    INTERRUPTED = 130
    """Ctrl-C: state is saved, the same command continues when the person wants."""


class RunError(Exception):
    """A failure that a restart would repeat, raised on every rank alike; says what to change."""


class UnsavedError(Exception):
    """The run ended but its last steps could not be saved, on every rank alike.

    It counts as a crash: a restart repeats those steps from the last good checkpoint.
    """
