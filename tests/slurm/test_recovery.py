"""What can happen to a run on a cluster, and that nothing of it changes what is trained.

Real slurmctld and slurmd, the batch script as shipped, the real `zeta` with DeepSpeed ZeRO-2 or
ZeRO-3 on two nodes. All runs are started at once, because most of their time is waiting; each test
then looks at its own: at Slurm's records, at the loss of every step beside that of a run that
nothing happened to, and at the ledger.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import pytest

from tests.slurm.cluster import Cluster, running
from tests.slurm.runs import Run, make_shards

pytestmark = pytest.mark.slow

PARTITIONS = (
    "PartitionName=main Nodes=n[1-2] Default=YES PreemptMode=OFF",
    "PartitionName=low Nodes=n[3-4] PriorityTier=1 PreemptMode=REQUEUE GraceTime=30",
    "PartitionName=high Nodes=n[3-4] PriorityTier=2 PreemptMode=OFF",
    "PartitionName=fragile Nodes=n[5-6] PreemptMode=OFF",
    "PartitionName=frail Nodes=n[7-8] PreemptMode=OFF",
)
SETTINGS = [
    "data.token_budget=256",
    "data.max_images_per_pack=16",
    "train.packs_per_step=2",
    "train.max_steps=null",
    "train.max_epochs=8",
    "train.log_every=1",
    "train.checkpoint_every=10",
    "optim.schedule=constant",
    "optim.warmup_steps=1",
    "tracker.wandb.mode=disabled",
    "cluster.preflight=false",  # test_preflight.py has it; here it would only take its time
]
ONLY_ON_REQUEST = "train.checkpoint_every=null"
REQUEUED = "PENDING"
"""What Slurm writes down as the state of a job that ended to be requeued."""
# As `zeta launch slurm --nodes 1-2` asks for them; with --ntasks-per-node=1 sbatch gives only one.
ONE_OR_TWO = ("--nodes=1-2", "--mincpus=1")
ONE_RANK_EACH = "SLURM_NTASKS_PER_NODE=1"


class Scenario(NamedTuple):
    """A run, and what happens to it."""

    happens: Callable[[Run], object]
    zero_stage: int
    settings: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    seconds_per_step: float = 0.2
    exported: str = ""
    first: bool = False
    """Start it alone: the clock is part of what happens."""


def nothing(run: Run) -> None:
    pass


def time_limit(run: Run) -> None:
    """Once is enough: when it was requeued, it gets time for the rest."""
    run.wait_for_restart()
    run.cluster.run("scontrol", "update", f"JobId={run.job}", "TimeLimit=30")


def usr1(run: Run) -> None:
    run.wait_for_step(5)
    run.cluster.run("scancel", "--signal=USR1", run.job)


def preempted(run: Run) -> None:
    run.wait_for_step(5)
    run.cluster.submit(
        "--partition=high", "--nodes=2", "--exclusive", "--output=none", "--wrap=sleep 3"
    )


def requeued_by_an_operator(run: Run) -> None:
    run.wait_for_step(5)
    run.cluster.run("scontrol", "requeue", run.job)


def rank_killed(run: Run) -> None:
    run.wait_for_step(15)
    os.kill(run.rank_pid(1), signal.SIGKILL)


def rank_stopped(run: Run) -> None:
    run.wait_for_step(15)
    os.kill(run.rank_pid(1), signal.SIGSTOP)


def first_node_lost(run: Run) -> None:
    run.wait_for_step(15)
    run.cluster.kill_node("n5")


def second_node_lost(run: Run) -> None:
    run.wait_for_step(15)
    run.cluster.kill_node("n8")


SCENARIOS = {
    "time limit": Scenario(
        time_limit,
        2,
        (ONLY_ON_REQUEST,),
        # Slurm looks at limits every 30 s: the signal comes 29 to 59 s after the start.
        flags=("--time=1", "--signal=USR1@1"),
        seconds_per_step=1.5,
        first=True,
    ),
    "undisturbed, ZeRO-2": Scenario(
        nothing, 2, ("tracker.wandb.mode=offline",), seconds_per_step=0
    ),
    "undisturbed, ZeRO-3": Scenario(nothing, 3, seconds_per_step=0),
    "one rank hangs": Scenario(
        rank_stopped,
        2,
        ("data.read_deadline_s=10", *(f"train.watchdog.{part}_s=20" for part in ("data", "train"))),
    ),
    "first node lost": Scenario(
        first_node_lost, 3, flags=("--partition=fragile", *ONE_OR_TWO), exported=ONE_RANK_EACH
    ),
    "second node lost": Scenario(
        second_node_lost, 2, flags=("--partition=frail", *ONE_OR_TWO), exported=ONE_RANK_EACH
    ),
    "preempted": Scenario(
        preempted, 2, (ONLY_ON_REQUEST, "tracker.wandb.mode=offline"), flags=("--partition=low",)
    ),
    "USR1": Scenario(usr1, 3, (ONLY_ON_REQUEST,)),
    "requeued by an operator": Scenario(requeued_by_an_operator, 3, (ONLY_ON_REQUEST,)),
    "one rank killed": Scenario(rank_killed, 3),
    "no progress": Scenario(
        nothing, 2, ("train.watchdog.start_s=0.5",), exported="ZETA_MAX_STALLED=2"
    ),
}


def begin(name: str, run: Run) -> None:
    scenario = SCENARIOS[name]
    run.submit(
        *SETTINGS,
        f"train.zero_stage={scenario.zero_stage}",
        *scenario.settings,
        flags=scenario.flags,
        seconds_per_step=scenario.seconds_per_step,
        exported=scenario.exported,
    )


class Ended(NamedTuple):
    run: Run
    record: dict[str, str]


def see_to_the_end(name: str, run: Run) -> Ended:
    SCENARIOS[name].happens(run)
    return Ended(run, run.wait_for_end())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running(lambda: Cluster(nodes=8, partitions=PARTITIONS)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def runs(cluster, request, tmp_path_factory) -> Iterator[dict[str, Future[Ended]]]:
    """The runs of the tests that were chosen, all on their way."""
    chosen = [
        name
        for name in SCENARIOS
        if any(name in getattr(item.obj, "needs", ()) for item in request.session.items)
    ]
    folder = tmp_path_factory.mktemp("runs")
    shards = make_shards(folder / "shards")
    with ThreadPoolExecutor(len(chosen)) as threads:
        ends = {}
        for number, name in enumerate(chosen):
            run = Run(cluster, folder / str(number), shards)
            begin(name, run)
            if SCENARIOS[name].first:
                run.wait_for_step(1)
            ends[name] = threads.submit(see_to_the_end, name, run)
        yield ends


def of(*names: str):
    """Mark a test with the runs that it looks at; an undisturbed one is always beside them."""

    def mark(test):
        test.needs = {*names, *(undisturbed(name) for name in names)}
        return test

    return mark


def undisturbed(name: str) -> str:
    """Return the run of the same ZeRO stage that nothing happened to."""
    return f"undisturbed, ZeRO-{SCENARIOS[name].zero_stage}"


def assert_to_its_end(ended: Ended, *before: str) -> None:
    """Check how the job ended, after ending in the states `before`; and the ledger."""
    record, run = ended.record, ended.run
    assert (record["JobState"], record["ExitCode"]) == ("COMPLETED", "0:0"), run.log
    assert record["Restarts"] == str(len(before)), run.log
    assert run.ends() == [(state, "0:0") for state in (*before, "COMPLETED")]
    assert run.files.finished.exists()
    audit = run.audit()
    assert audit.exact, audit.problems
    assert audit.uncommitted == 0
    assert [account.epoch for account in audit.epochs] == list(range(8))
    for account in audit.epochs:
        assert (account.planned, account.trained, account.open) == (80, 80, 0)


def recovered(
    runs: dict[str, Future[Ended]], name: str, state: str = REQUEUED, within: float = 0.0
) -> Run:
    """Check that one restart led to the same losses, and each sample trained on once."""
    ended, beside = runs[name].result(), runs[undisturbed(name)].result()
    assert_to_its_end(ended, state)
    assert ended.run.losses() == pytest.approx(beside.run.losses(), rel=within, abs=0)
    return ended.run


@of("undisturbed, ZeRO-2", "undisturbed, ZeRO-3")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_to_its_end(runs, stage):
    ended = runs[f"undisturbed, ZeRO-{stage}"].result()
    assert_to_its_end(ended)
    assert ended.record["NodeList"] == "n[1-2]"
    run = ended.run
    assert list(run.losses()) == list(range(1, len(run.losses()) + 1))
    assert run.checkpoint() == f"step_{run.step():08d}"
    logs = {path.name for path in run.files.logs.glob("rank_*.log")}
    assert logs == {"rank_00000.log", "rank_00001.log"}


@of("USR1")
def test_usr1_saves_and_requeues(runs):
    assert "saved; requeueing" in recovered(runs, "USR1").log


@of("time limit")
def test_the_time_limit_saves_and_requeues(runs):
    assert "saved; requeueing" in recovered(runs, "time limit").log


@of("preempted")
def test_a_preempted_run_saves_and_goes_on(runs):
    assert "saved; requeueing" in recovered(runs, "preempted").log


@of("requeued by an operator")
def test_a_run_that_is_requeued_without_grace_saves_between_sigterm_and_sigkill(runs):
    assert "continuing from step_" in recovered(runs, "requeued by an operator").log


@of("one rank killed")
def test_a_killed_rank_costs_the_steps_since_the_checkpoint_and_no_more(runs):
    log = recovered(runs, "one rank killed").log
    assert "ended with 137; requeueing" in log
    assert "continuing from step_00000010" in log


@of("first node lost", "second node lost")
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("first node lost", "n[5-6]", "n6"), ("second node lost", "n[7-8]", "n7")],
)
def test_a_run_that_loses_a_node_goes_on_with_the_other(runs, name, before, after):
    run = recovered(runs, name, "NODE_FAIL", within=1e-5)
    ends = run.cluster.completed(run.job)
    assert [(end["NodeList"], end["NodeCnt"]) for end in ends] == [(before, "2"), (after, "1")]


@of("one rank hangs")
def test_a_hang_ends_in_stacks_and_a_requeue(runs):
    run = recovered(runs, "one rank hangs")
    assert "so the rank is taken to hang" in run.log
    assert "all stacks" in run.files.rank_log(0).read_text()


@of("no progress")
def test_a_run_without_progress_stops_after_its_bound(runs):
    ended = runs["no progress"].result()
    record = ended.record
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "93:0"), ended.run.log
    assert record["Restarts"] == "2"
    assert "giving up after 2 restarts" in ended.run.log.splitlines()[-1]
    assert not ended.run.files.finished.exists()
