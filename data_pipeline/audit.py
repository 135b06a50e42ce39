"""The audit of a run: proof from its files that every sample was used once in each epoch.

The plan is a pure function of shards, config and seed. So it is computed again from the first step,
and each line of the ledger must match it exactly, whatever ranks wrote the line and however often
they were killed: planned = trained + rejected (by reason), with nothing left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from data_pipeline.plan.lane_packer import LanePacker, LaneState, PackPlan
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.summary import rejected_by_reason
from zeta.packed import id_digest

_MOST_PROBLEMS = 20
NOT_FINITE = "loss or gradient was not finite"
UNRECORDED = "no reason in quarantine.jsonl"


@dataclass
class LedgerStep:
    """The ledger lines of all ranks for one step."""

    step: int
    """Number of committed steps, this one included."""
    lanes: dict[int, tuple[int, str]]
    """Number of images used and digest of their ids, by lane; lanes that used none are absent."""
    rejected: set[int]
    """Sample ids that could not be used."""
    skipped: bool
    """True if loss or gradient was not finite, so that the step changed no weights."""
    repeated: list[int]
    """Lanes that appear in more than one line."""
    max_epochs: int | None = None
    """Epoch limit of the run when it made this step."""


@dataclass
class EpochAccount:
    """The account of the samples of one epoch of one source."""

    source: str
    epoch: int
    samples: int
    """Number of samples in its shards."""
    not_planned: dict[str, int]
    """Number of samples that no epoch plans, by reason."""
    planned: int = 0
    trained: int = 0
    views: int = 0
    """Number of images shown of the samples trained on: all views of each, local ones included."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Number of planned samples that could not be used, by reason."""

    @property
    def remainder(self) -> int:
        """Number of planned samples without a record; 0 unless something is wrong."""
        return self.planned - self.trained - sum(self.rejected.values())

    @property
    def open(self) -> int:
        """Number of samples of this epoch that were not planned yet; 0 once it is complete."""
        return self.samples - sum(self.not_planned.values()) - self.planned


@dataclass
class Audit:
    """The result of an audit."""

    steps: int = 0
    """Number of steps whose ledger lines were checked."""
    uncommitted: int = 0
    """Number of steps after the last checkpoint that were cut short; a resumed run repeats them."""
    epochs: list[EpochAccount] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Differences between ledger and plan; empty if the account is exact."""

    @property
    def exact(self) -> bool:
        """True if every sample is accounted for."""
        return not self.problems and all(epoch.remainder == 0 for epoch in self.epochs)


def audit_ledger(
    plan: Plan,
    ledger: Iterator[LedgerStep],
    reasons: Mapping[int, str],
    *,
    committed: int,
) -> Audit:
    """Plan the run again from its first step and compare it with its ledger.

    Args:
        plan: the plan of the run.
        ledger: all steps in order.
        reasons: reason of each rejected sample, by sample id (quarantine.jsonl).
        committed: step of the newest checkpoint; later steps may be incomplete.
    """
    audit, accounts = Audit(), dict[tuple[int, int], EpochAccount]()
    lanes: list[LanePacker] = []
    for line in ledger:
        if not lanes or line.max_epochs != plan.max_epochs:
            # Resumed under another limit: the lanes continue from their states.
            plan = replace(plan, max_epochs=line.max_epochs)
            states = [lane.state for lane in lanes] or [LaneState()] * plan.num_lanes
            lanes = [plan.lane(lane, state) for lane, state in enumerate(states)]
        packs = _plan_step(lanes)
        problems, wrong = _compare(line, packs, audit.steps + 1)
        if problems and line.step > committed and not wrong:
            # A kill between two checkpoints may have lost lines that some ranks had not written.
            audit.uncommitted = 1 + sum(1 for _ in ledger)
            break
        if problems:
            audit.problems += problems[: _MOST_PROBLEMS - len(audit.problems)]
            if len(audit.problems) >= _MOST_PROBLEMS or line.step != audit.steps + 1:
                break
        audit.steps += 1
        for pack in packs.values():
            _count(plan, pack, line, reasons, accounts)
    if audit.steps < committed and not audit.problems:
        audit.problems.append(
            f"the ledger ends at step {audit.steps}, but the newest checkpoint is from step "
            f"{committed}"
        )
    audit.epochs = [accounts[key] for key in sorted(accounts)]
    audit.problems += [
        f"{account.rejected[UNRECORDED]} samples of epoch {account.epoch} of {account.source} were "
        "rejected, but quarantine.jsonl has no reason for it"
        for account in audit.epochs
        if account.rejected[UNRECORDED]
    ]
    return audit


def _plan_step(lanes: list[LanePacker]) -> dict[int, PackPlan]:
    packs = ((index, lane.next_pack()) for index, lane in enumerate(lanes))
    return {index: pack for index, pack in packs if pack is not None}


def _compare(
    line: LedgerStep, packs: Mapping[int, PackPlan], expected_step: int
) -> tuple[list[str], bool]:
    """Return the differences from the plan, and whether any is more than a missing entry."""
    if line.step != expected_step:
        return [f"step {expected_step} is not in the ledger"], False
    known = {int(i) for pack in packs.values() for i in pack.sample_ids}
    strangers = sorted(line.rejected - known)
    wrong = bool(line.repeated or strangers)
    problems = [f"step {line.step}: lane {lane} is recorded twice" for lane in line.repeated]
    problems += [
        f"step {line.step}: sample {sample_id} was rejected, but the plan has it in no lane"
        for sample_id in strangers
    ]
    planned = {}
    for lane, pack in packs.items():
        used = pack.sample_ids[~np.isin(pack.sample_ids, list(line.rejected))].tolist()
        if used:
            planned[lane] = (len(used), id_digest(used))
    for lane in sorted(planned.keys() | line.lanes.keys()):
        if planned.get(lane) != line.lanes.get(lane):
            wrong |= lane in line.lanes
            expected, found = (
                "nothing" if entry is None else f"{entry[0]} images ({entry[1]})"
                for entry in (planned.get(lane), line.lanes.get(lane))
            )
            problems.append(
                f"step {line.step}: lane {lane} should have used {expected}, but the ledger "
                f"records {found}"
            )
    return problems, wrong


def _count(
    plan: Plan,
    pack: PackPlan,
    line: LedgerStep,
    reasons: Mapping[int, str],
    accounts: dict[tuple[int, int], EpochAccount],
) -> None:
    """Enter the samples of one pack into the accounts of their epochs."""
    samples = pack.select(np.flatnonzero(pack.views == 0))
    sources = plan.source_of(samples.sample_ids).tolist()
    epochs, ids = samples.epochs.tolist(), samples.sample_ids.tolist()
    for source, epoch, sample_id in zip(sources, epochs, ids, strict=True):
        if (source, epoch) not in accounts:
            accounts[source, epoch] = _new_account(plan, source, epoch)
        account = accounts[source, epoch]
        account.planned += 1
        if sample_id in line.rejected:
            account.rejected[reasons.get(sample_id, UNRECORDED)] += 1
        elif line.skipped:
            account.rejected[NOT_FINITE] += 1
        else:
            account.trained += 1
            account.views += plan.config.views_of_sample


def _new_account(plan: Plan, source: int, epoch: int) -> EpochAccount:
    entry = plan.sources[source]
    shards = slice(entry.first_shard, entry.stop_shard)
    return EpochAccount(
        source=entry.name,
        epoch=epoch,
        samples=sum(shard.count for shard in plan.manifest.shards[shards]),
        not_planned=rejected_by_reason(plan, shards),
    )
