"""The proof from a run's files that every sample was used once an epoch, or says why not.

The plan is a pure function of shards, config and seed, so it is made again from the first step, and
each line of the ledger must be exactly what it says, whatever ranks wrote it and however often
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
    """What all ranks noted of one step."""

    step: int
    """Committed steps, this one included."""
    lanes: dict[int, tuple[int, str]]
    """Images used and digest of their ids, of each lane that used any."""
    rejected: set[int]
    skipped: bool
    repeated: list[int]
    """Lanes that more than one line speaks of."""
    max_epochs: int | None = None
    """Epochs after which the run was to end when it made this step."""


@dataclass
class EpochAccount:
    """What became of the samples of one epoch of one source."""

    source: str
    epoch: int
    samples: int
    """All samples of its shards."""
    not_planned: dict[str, int]
    """Samples that no epoch plans, by reason."""
    planned: int = 0
    trained: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """By reason."""

    @property
    def remainder(self) -> int:
        """Planned samples that nothing is known of; 0 unless something is wrong."""
        return self.planned - self.trained - sum(self.rejected.values())

    @property
    def open(self) -> int:
        """Samples of this epoch that were not planned yet; 0 once it is closed."""
        return self.samples - sum(self.not_planned.values()) - self.planned


@dataclass
class Audit:
    """The result of an audit."""

    steps: int = 0
    """Steps whose ledger lines were checked."""
    uncommitted: int = 0
    """Steps after the last checkpoint that were cut short; a resumed run does them again."""
    epochs: list[EpochAccount] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What does not agree; empty if the account is exact."""

    @property
    def exact(self) -> bool:
        """Whether every sample is accounted for."""
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
        reasons: why each rejected sample could not be used (quarantine.jsonl).
        committed: step of the newest checkpoint; later steps may be incomplete.
    """
    audit, accounts = Audit(), dict[tuple[int, int], EpochAccount]()
    lanes: list[LanePacker] = []
    for line in ledger:
        if not lanes or line.max_epochs != plan.max_epochs:
            # Resumed under another limit: the lanes go on from where they stood.
            plan = replace(plan, max_epochs=line.max_epochs)
            states = [lane.state for lane in lanes] or [LaneState()] * plan.num_lanes
            lanes = [plan.lane(lane, state) for lane, state in enumerate(states)]
        packs = _plan_step(lanes)
        problems, wrong = _compare(line, packs, audit.steps + 1)
        if problems and line.step > committed and not wrong:
            # A kill between two checkpoints may have lost what some ranks had not written yet.
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
            f"the ledger ends at step {audit.steps}, but the newest checkpoint is of {committed}"
        )
    audit.epochs = [accounts[key] for key in sorted(accounts)]
    audit.problems += [
        f"{account.rejected[UNRECORDED]} samples of epoch {account.epoch} of {account.source} were "
        "rejected, but quarantine.jsonl does not say why"
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
    """Return what differs from the plan, and whether any of it is more than absent."""
    if line.step != expected_step:
        return [f"step {expected_step} is not in the ledger"], False
    known = {int(i) for pack in packs.values() for i in pack.sample_ids}
    strangers = sorted(line.rejected - known)
    wrong = bool(line.repeated or strangers)
    problems = [f"step {line.step}: lane {lane} is noted twice" for lane in line.repeated]
    problems += [
        f"step {line.step}: sample {sample_id} was rejected, but no lane had it there"
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
            told = [
                "nothing" if entry is None else f"{entry[0]} images ({entry[1]})"
                for entry in (planned.get(lane), line.lanes.get(lane))
            ]
            problems.append(
                f"step {line.step}: lane {lane} should have used {told[0]}, the ledger says "
                f"{told[1]}"
            )
    return problems, wrong


def _count(
    plan: Plan,
    pack: PackPlan,
    line: LedgerStep,
    reasons: Mapping[int, str],
    accounts: dict[tuple[int, int], EpochAccount],
) -> None:
    """Enter the images of one pack into the accounts of their epochs."""
    sources = plan.source_of(pack.sample_ids).tolist()
    epochs, ids = pack.epochs.tolist(), pack.sample_ids.tolist()
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


def _new_account(plan: Plan, source: int, epoch: int) -> EpochAccount:
    entry = plan.sources[source]
    shards = slice(entry.first_shard, entry.stop_shard)
    return EpochAccount(
        source=entry.name,
        epoch=epoch,
        samples=sum(shard.count for shard in plan.manifest.shards[shards]),
        not_planned=rejected_by_reason(plan, shards),
    )
