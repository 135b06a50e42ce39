"""Messages and exit statuses of commands that fail."""

from __future__ import annotations

import errno

from zeta.exit_codes import ExitCode, RunError

USER_ERRORS = (ValueError, RunError, OSError)
"""Errors that a user can correct, shown as one message. Anything else is a bug in zeta."""

FAILED = 1


def message(error: BaseException) -> str:
    """Return the one message for the terminal."""
    if isinstance(error, OSError) and error.strerror is not None:
        where = "" if error.filename is None else f": {error.filename}"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free some space and type the same command again" if full else ""
        return f"{error.strerror}{where}{hint}"
    if isinstance(error, UnicodeEncodeError):  # in practice a file name
        near = ascii(error.object[max(0, error.start - 60) : error.end + 20])
        return f"a name is not valid UTF-8 and cannot be written: {near}; rename the file or folder"
    return str(error) or type(error).__name__


def exit_code(error: BaseException, *, in_training: bool) -> int:
    """Return the exit status for an error.

    In training, a wrong setting is never restarted. An operating-system error may be gone at the
    next start, so it counts as a crash there.
    """
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if in_training and isinstance(error, ValueError | RunError):
        return ExitCode.NEVER_RESTART
    return FAILED
