"""Ask Slurm: run one of its commands with a time limit, and understand how it answered."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence

_TIMEOUT_S = 30.0
_UNKNOWN_JOB = "Invalid job id"
"""Error of squeue for a job that it has forgotten, minutes after the job's end."""
_MARK = re.compile(r"^(sbatch|sinfo|squeue|srun|scontrol): (error: )?")


class SlurmUnavailableError(Exception):
    """A Slurm command is missing, failed or did not answer; the message names it and the cause."""


class SlurmMissingError(SlurmUnavailableError):
    """A Slurm command is not on PATH."""


def run_slurm(
    command: Sequence[str],
    *,
    timeout_s: float = _TIMEOUT_S,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command to its end, whatever its exit status.

    Args:
        command: program and arguments.
        timeout_s: seconds after which it is killed.
        environment: variables that it sees; those of this process unless given.

    Raises:
        SlurmMissingError: it is not on PATH.
        SlurmUnavailableError: it cannot be started, or did not answer in time.
    """
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except FileNotFoundError:
        raise SlurmMissingError(f"{command[0]} is not on PATH") from None
    except OSError as error:
        raise SlurmUnavailableError(f"{command[0]} cannot be started: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise SlurmUnavailableError(f"{command[0]} did not answer in {timeout_s:g} s") from None


def ask_slurm(
    *command: str,
    timeout_s: float = _TIMEOUT_S,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Return what a Slurm command prints; for the arguments see `run_slurm`.

    Raises:
        SlurmUnavailableError: it is missing, failed or did not answer in time.
    """
    done = run_slurm(command, timeout_s=timeout_s, environment=environment)
    if done.returncode != 0:
        reason = "; ".join(slurm_messages(done.stderr)) or f"ended with {done.returncode}"
        raise SlurmUnavailableError(f"{command[0]}: {reason}")
    return done.stdout


def ask_queue(*options: str, timeout_s: float = _TIMEOUT_S) -> list[str]:
    """Return the lines that squeue prints without its header; none for a job that it has forgotten.

    Args:
        options: further options of squeue.
        timeout_s: seconds to wait for the answer.

    Raises:
        SlurmUnavailableError: squeue is missing, failed or did not answer in time.
    """
    try:
        shown = ask_slurm("squeue", "--noheader", *options, timeout_s=timeout_s)
    except SlurmUnavailableError as error:
        if _UNKNOWN_JOB in str(error):
            return []
        raise
    return [line.strip() for line in shown.splitlines() if line.strip()]


def slurm_messages(stderr: str) -> list[str]:
    """Return the lines that a Slurm command wrote, without the program's name in front of them."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return [_MARK.sub("", line) for line in lines]
