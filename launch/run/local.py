"""Run training on this machine under the exit-code contract that a Slurm job follows."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from launch.config.load import load_config
from launch.run.checks import check_start
from launch.run.ranks import Outcome, run_ranks
from launch.run.restarts import MAX_RESTARTS, RestartCount, as_rank_means, wants_restart
from zeta.exit_codes import ExitCode
from zeta.run.directory import RunDir


def launch_local(
    config: str, overrides: Sequence[str], nproc: int, max_restarts: int = MAX_RESTARTS
) -> int:
    """Train on `nproc` ranks on this machine, starting them again after a crash, to the end.

    A signal to this process asks the run to stop: it is passed on to the ranks, and they are not
    started again.

    Args:
        config: a YAML file, or the name of a shipped recipe.
        overrides: `key=value` settings.
        nproc: number of ranks.
        max_restarts: largest number of starts after the first; 0: the caller decides on restarts.

    Returns:
        The exit status of the run: see `combined_exit_code`; `ExitCode.NEVER_RESTART` if it was
        given up because restarts did not help.

    Raises:
        ValueError: every rank would refuse to train: a wrong config, shards that cannot be read, a
            run directory of another run, more ranks than packs in a step. Raised before any rank is
            started.
    """
    checked = check_start(load_config(config, overrides), nproc)
    if checked.already_finished is not None:
        print(checked.already_finished)
        return ExitCode.FINISHED
    # -P: a launch.py in the current folder must not be imported instead of this package.
    command = [sys.executable, "-P", "-m", "launch", "train", config, *overrides]
    return _run_until_it_ends(command, nproc, checked.run_dir, max_restarts)


def _run_until_it_ends(
    command: Sequence[str], nproc: int, run_dir: RunDir, max_restarts: int
) -> int:
    count = RestartCount()
    while True:
        checkpoint = _newest_checkpoint(run_dir)
        outcome = run_ranks(command, nproc)
        if outcome.aborted:
            return ExitCode.INTERRUPTED
        _report_failures(outcome, run_dir)
        code = combined_exit_code(
            [code for rank, code in enumerate(outcome.codes) if rank not in outcome.killed]
        )
        if outcome.signalled or max_restarts == 0 or not wants_restart(code):
            return code
        reached = _newest_checkpoint(run_dir)
        count = count.ended(new_checkpoint=reached != checkpoint)
        if obstacle := count.obstacle(max_restarts):
            how = f"see {run_dir.logs}, then type the same command again to continue"
            _say(f"giving up after {obstacle}; {how}")
            return ExitCode.NEVER_RESTART
        count = count.again()
        restart = f"restart {count.restarts} of at most {max_restarts}"
        _say(f"the run ended with {code}; {restart}, from {reached or 'the beginning'}")


def combined_exit_code(codes: Sequence[int]) -> int:
    """Return the exit status of the whole run: the most important of those of its ranks.

    Never restart (93) comes before saved (85), interrupted (130) and a crash; 0 if all are 0.
    A rank that a signal ended counts as 128 + signal, as in a shell, or as saved if the signal
    asked for that.
    """
    plain = [as_rank_means(128 - code if code < 0 else code) for code in codes]
    for code in (ExitCode.NEVER_RESTART, ExitCode.REQUEUE, ExitCode.INTERRUPTED):
        if code in plain:
            return int(code)
    return next((code for code in plain if code != 0), 0)


def _newest_checkpoint(run_dir: RunDir) -> str | None:
    """Return the name of the newest checkpoint; None if the run has none yet."""
    latest = run_dir.checkpoints / "latest"
    return latest.read_text().strip() if latest.exists() else None


def _say(text: str) -> None:
    print(f"zeta: {text}", file=sys.stderr)


def _report_failures(outcome: Outcome, run_dir: RunDir) -> None:
    """Name the ranks that ended without a message of their own, and their logs."""
    reported = {*ExitCode, 1}
    for rank, code in enumerate(outcome.codes):
        if code in reported or rank in outcome.killed:
            continue
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        _say(f"rank {rank} {how}; see {run_dir.rank_log(rank)}")
