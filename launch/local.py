"""`launch_local`: a run on this machine, under the contract that a Slurm step follows."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.config import ZetaConfig, load_config
from launch.ranks import Outcome, run_ranks
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
        ValueError: the config is wrong, or asks for fewer packs a step than there are ranks; said
            here once, before any rank starts.
    """
    checked = load_config(config, overrides)
    _check_ranks(checked, nproc)
    outcome = run_ranks([sys.executable, "-m", "launch", "train", config, *overrides], nproc)
    if outcome.aborted:
        return ExitCode.INTERRUPTED
    _report_failures(outcome, RunDir(Path(checked.run.dir)))
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


def _check_ranks(config: ZetaConfig, nproc: int) -> None:
    if nproc > config.train.packs_per_step:
        raise ValueError(
            f"{nproc} ranks were asked for, but a step has only train.packs_per_step = "
            f"{config.train.packs_per_step} packs to share; start fewer ranks or raise it"
        )


def _report_failures(outcome: Outcome, run_dir: RunDir) -> None:
    """Name the ranks that failed and their logs; the ranks say themselves what went wrong."""
    expected = {0, int(ExitCode.REQUEUE), int(ExitCode.INTERRUPTED)}
    for rank, code in enumerate(outcome.codes):
        if code in expected or rank in outcome.killed:
            continue
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        print(f"zeta: rank {rank} {how}; see {run_dir.rank_log(rank)}", file=sys.stderr)
