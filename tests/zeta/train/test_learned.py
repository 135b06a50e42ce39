"""A run that learned nothing is neither saved nor finished."""

from __future__ import annotations

from pathlib import Path

import pytest

from zeta.exit_codes import RunError
from zeta.train.learned import check_learned
from zeta.train.progress import Progress

QUARANTINE = Path("runs/a/quarantine.jsonl")


@pytest.mark.parametrize("finished", [False, True])
def test_steps_without_one_image_are_refused_and_the_reasons_are_pointed_to(finished):
    with pytest.raises(RunError, match=r"no image .* in 4 steps: 36 were read .* runs/a/quar"):
        check_learned(Progress(step=4, rejected=36), QUARANTINE, finished=finished)


def test_an_end_before_any_step_is_refused_and_a_stop_before_any_is_not():
    check_learned(Progress(), QUARANTINE)
    with pytest.raises(RunError, match="no image was trained on in 0 steps"):
        check_learned(Progress(), QUARANTINE, finished=True)


def test_one_image_is_enough():
    for finished in (False, True):
        check_learned(Progress(step=4, images=1, rejected=35), QUARANTINE, finished=finished)
        check_learned(Progress(step=4, images=9, skipped_steps=3), QUARANTINE, finished=finished)


def test_steps_that_were_all_skipped_are_no_finish_but_may_be_saved_on_the_way():
    progress = Progress(step=4, images=9, skipped_steps=4)
    check_learned(progress, QUARANTINE)
    with pytest.raises(RunError, match="all 4 steps was not finite"):
        check_learned(progress, QUARANTINE, finished=True)
