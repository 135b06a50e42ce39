"""`launch_local`: a run on this machine, under the contract that a Slurm step follows."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from launch.config import load_config
from launch.ranks import Outcome, run_ranks
from launch.start import check_start
from zeta.exit_codes import ExitCode
from zeta.run_dir import RunDir


def launch_local(config: str, overrides: Sequence[str], nproc: int) -> int:
    """Train on `nproc` ranks on this machine and wait for the end.

    Args:
        config: a YAML file, or the name of a shipped recipe.
        overrides: `key=value` settings.
        nproc: number of ranks.

    Returns:
        The exit status of the run: see `combined_exit_code`.

    Raises:
        ValueError: what every rank would refuse is said here once, before any rank starts: a wrong
            config, shards that cannot be read, a run directory of another run, more ranks than
            packs in a step.
    """
    start = check_start(load_config(config, overrides), nproc)
    if start.already_finished is not None:
        print(start.already_finished)
        return ExitCode.FINISHED
    # -P: a launch.py in the folder it is started from must not stand in for ours.
    command = [sys.executable, "-P", "-m", "launch", "train", config, *overrides]
    outcome = run_ranks(command, nproc)
    if outcome.aborted:
        return ExitCode.INTERRUPTED
    _report_failures(outcome, start.run_dir)
    return combined_exit_code(
        [code for rank, code in enumerate(outcome.codes) if rank not in outcome.killed]
    )


def combined_exit_code(codes: Sequence[int]) -> int:
    """Return the status of the whole run from those of its ranks, in the order that they matter.

    Never restart (93) before saved (85) before interrupted (130) before a crash; 0 if all are 0.
    A rank that a signal ended counts as 128 + signal, as in a shell.
    """
    plain = [128 - code if code < 0 else code for code in codes]
    for code in (ExitCode.NEVER_RESTART, ExitCode.REQUEUE, ExitCode.INTERRUPTED):
        if code in plain:
            return int(code)
    return next((code for code in plain if code != 0), 0)


def _report_failures(outcome: Outcome, run_dir: RunDir) -> None:
    """Name the ranks that ended without a word of their own, and their logs."""
    spoken = {*ExitCode, 1}
    for rank, code in enumerate(outcome.codes):
        if code in spoken or rank in outcome.killed:
            continue
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        print(f"zeta: rank {rank} {how}; see {run_dir.rank_log(rank)}", file=sys.stderr)
