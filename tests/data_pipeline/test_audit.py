"""The audit finds the account exact where it is, and names what is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.audit import NOT_FINITE, LedgerStep, audit_ledger
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.manifest import SampleFlag
from tests.data_pipeline.synthetic import config, synthetic_manifest
from zeta.packed import id_digest

LANES = 3
REJECTED = {7: "truncated", 50: "truncated", 90: "no image"}


@pytest.fixture(scope="module")
def plan() -> Plan:
    manifest = synthetic_manifest([60, 40, 50])
    manifest.samples["flags"][[3, 77]] |= np.uint8(SampleFlag.BAD)
    manifest.samples["label"][[10, 11, 12]] = -1
    return Plan(manifest, config(pack_window=16, require_labels=True), LANES, max_epochs=2)


def ledger(plan: Plan, lanes=None, first: int = 0, most: int = 9999) -> list[LedgerStep]:
    """Return the ledger of a run that rejects three samples whenever they come up."""
    lanes, steps = lanes or [plan.lane(lane) for lane in range(LANES)], []
    while any(lane.has_more() for lane in lanes) and len(steps) < most:
        noted, rejected = {}, set()
        for index, lane in enumerate(lanes):
            pack = lane.next_pack()
            ids = [] if pack is None else pack.sample_ids.tolist()
            rejected |= set(ids) & set(REJECTED)
            used = [i for i in ids if i not in REJECTED]
            if used:
                noted[index] = (len(used), id_digest(used))
        step = first + len(steps) + 1
        steps.append(LedgerStep(step, noted, rejected, False, [], plan.max_epochs))
    return steps


def audit(plan: Plan, steps: list[LedgerStep], committed: int | None = None):
    def read() -> Iterator[LedgerStep]:
        yield from steps

    return audit_ledger(
        plan, read(), REJECTED, committed=len(steps) if committed is None else committed
    )


def test_planned_is_trained_and_rejected_with_nothing_left(plan):
    result = audit(plan, ledger(plan))
    assert result.exact, result.problems
    assert [account.epoch for account in result.epochs] == [0, 1]
    for account in result.epochs:
        assert account.samples == 150
        assert account.not_planned == {"unusable, see manifest_rejected.jsonl": 2, "no label": 3}
        assert account.planned == 145
        assert account.trained == 142
        assert account.rejected == {"truncated": 2, "no image": 1}
        assert (account.remainder, account.open) == (0, 0)


def test_an_unfinished_epoch_shows_as_open(plan):
    steps = ledger(plan)
    result = audit(plan, steps[: len(steps) // 3])
    assert result.exact
    first = result.epochs[0]
    assert 0 < first.open == 145 - first.planned
    assert first.planned == first.trained + sum(first.rejected.values())


def test_a_run_that_goes_on_under_another_limit_of_epochs_is_exact(plan):
    """Raised in the middle and after the end, and then cut: each step has the limit it knew."""
    steps, lanes = list[LedgerStep](), [plan.lane(lane) for lane in range(LANES)]
    for epochs, count in ((2, 7), (3, 999), (4, 5), (5, 999)):
        longer = replace(plan, max_epochs=epochs)
        lanes = [longer.lane(index, lane.state) for index, lane in enumerate(lanes)]
        made = ledger(longer, lanes, len(steps), count)
        steps += [replace(step, max_epochs=epochs) for step in made]
    result = audit(replace(plan, max_epochs=5), steps)
    assert result.exact, result.problems
    assert [account.planned for account in result.epochs] == [145] * 5
    wrong = audit(plan, [replace(step, max_epochs=5) for step in steps])
    assert not wrong.exact


def test_a_step_that_changed_nothing_is_rejected_with_its_reason(plan):
    steps = ledger(plan)
    steps[2] = replace(steps[2], skipped=True)
    result = audit(plan, steps)
    assert result.exact
    images = sum(count for count, _ in steps[2].lanes.values())
    assert sum(account.rejected[NOT_FINITE] for account in result.epochs) == images


def test_every_departure_from_the_plan_is_named(plan):
    steps = ledger(plan)
    wrong = replace(steps[4], lanes=steps[4].lanes | {1: (2, id_digest([1, 2]))})
    absent = replace(steps[4], lanes={0: steps[4].lanes[0], 2: steps[4].lanes[2]})
    stranger = replace(steps[4], rejected=steps[4].rejected | {10})  # never planned
    cases = {
        "step 5: lane 1 should have used": [*steps[:4], wrong, *steps[5:]],
        "the ledger records nothing": [*steps[:4], absent, *steps[5:]],
        "step 5: sample 10 was rejected, but the plan has it": [*steps[:4], stranger, *steps[5:]],
        "step 5 is not in the ledger": [*steps[:4], *steps[5:]],
        "lane 2 is recorded twice": [*steps[:4], replace(steps[4], repeated=[2]), *steps[5:]],
        "but the newest checkpoint is from": steps[:-1],
    }
    for message, broken in cases.items():
        result = audit(plan, broken, committed=len(steps))
        assert not result.exact
        assert message in " ".join(result.problems)


def test_a_rejection_without_a_reason_is_a_problem(plan):
    result = audit_ledger(plan, iter(ledger(plan)), {7: "truncated"}, committed=0)
    assert not result.exact
    assert "quarantine.jsonl has no reason for it" in result.problems[0]


def test_lines_lost_after_the_last_checkpoint_are_told_apart_from_lost_samples(plan):
    steps = ledger(plan)
    torn = [*steps[:8], replace(steps[8], lanes={0: steps[8].lanes[0]})]
    result = audit(plan, torn, committed=6)
    assert result.exact
    assert (result.steps, result.uncommitted) == (8, 1)
    assert not audit(plan, torn, committed=9).exact


def test_a_sample_is_counted_once_and_its_views_as_often_as_they_are_seen(plan):
    views = 4
    several = replace(plan, config=replace(plan.config, views=views))
    steps = ledger(several)
    result = audit(several, steps)
    assert result.exact, result.problems
    for account in result.epochs:
        assert (account.planned, account.trained, account.views) == (145, 142, views * 142)
        assert (account.remainder, account.open) == (0, 0)
    first = several.lane(0).next_pack()
    assert first is not None
    missing = first.sample_ids.tolist()[:-1]  # one view of the last sample
    noted = steps[0].lanes | {0: (len(missing), id_digest(missing))}
    assert not audit(several, [replace(steps[0], lanes=noted), *steps[1:]]).exact
