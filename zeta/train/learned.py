"""The rule that a run has learned from at least one image before it is saved or counts as done."""

from __future__ import annotations

from pathlib import Path

from zeta.exit_codes import RunError
from zeta.train.progress import Progress


def check_learned(progress: Progress, quarantine: Path, *, finished: bool = False) -> None:
    """Raise RunError if no image has changed the weights by the time that they are to be kept.

    Args:
        progress: the committed steps, the same on every rank.
        quarantine: file that names the images that could not be used.
        finished: whether the run ends here. Only then steps that were skipped, because their loss
            was not finite, count as learning nothing: before, `train.max_nonfinite_steps` decides.
    """
    step = progress.step
    if progress.images == 0 and (step or finished):
        raise RunError(
            f"no image was trained on in {step:,} step{'' if step == 1 else 's'}: "
            f"{progress.rejected:,} were read and none could be used, so the weights are the "
            f"initial ones and nothing is saved. {quarantine} names the first ones with their "
            "reasons; `zeta shards verify` finds all bad images"
        )
    if finished and 0 < step == progress.skipped_steps:
        raise RunError(
            f"the loss or gradient of all {step:,} steps was not finite, so the weights are the "
            "initial ones: lower optim.lr or raise optim.warmup_steps, or look at the images that "
            "the ledger lists"
        )
