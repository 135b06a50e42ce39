"""What a snapshot of a run says: its state, what is left, who is slow or stuck."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.run.lock import Owner
from launch.status.state import Limits, QueueEntry, Snapshot, duration, judge
from launch.status.view import status_lines
from zeta.run.heartbeat import Heartbeat

NOW = 1_000_000.0
OWNER = Owner("n1", "boot", 7, "9", NOW - 500, 5.0)
JOB_OWNER = replace(OWNER, machine="elsewhere", job="12", restarts=2, cluster="c")
ROW = {
    "step": 40, "train/loss": 1.5, "time/step_s": 2.0, "throughput/images_per_s": 50.0,
    "throughput/tokens_per_s": 4000.0, "data/images_seen": 4000, "data/tokens_seen": 320_000,
    "balance/slowest_rank": 1, "balance/slowest_host": "n2", "balance/straggler_ratio": 1.5,
}  # fmt: skip


def beat(rank=0, ago=1.0, phase="train", phase_s=2.0, limit_s=60.0):
    return Heartbeat(phase, 40, phase_s, limit_s, NOW - ago, rank, f"n{rank}", 100 + rank)


def snapshot(**changes):
    usual = {"time": NOW, "name": "r", "rows": (ROW,), "owner": OWNER, "owner_alive": True}
    return Snapshot(**(usual | {"beats": (beat(0), beat(1))} | changes))


GONE = {"owner_alive": False, "beats": (beat(0, ago=500),)}
ENDED = {"owner": replace(OWNER, released=True), "owner_alive": False, "beats": ()}
ELSEWHERE = {"owner": JOB_OWNER, "owner_alive": None, "beats": (beat(0, ago=500),)}


@pytest.mark.parametrize(
    ("state", "changes"),
    [
        ("running", {}),
        ("running", {"owner": None, "owner_alive": None}),
        ("running", {"job": QueueEntry("12", "RUNNING"), "owner": JOB_OWNER, "owner_alive": None}),
        ("running", {"job": QueueEntry("12", "CONFIGURING"), "owner": None, "beats": ()}),
        ("running", {**ELSEWHERE, "beats": (beat(),)}),
        ("pending", {"job": QueueEntry("12", "PENDING", "Priority"), "owner": None, "rows": ()}),
        ("requeued", {**ELSEWHERE, "job": QueueEntry("12", "PENDING", "BeginTime")}),
        ("requeued", {**ENDED, "owner": replace(JOB_OWNER, released=True),
                      "job": QueueEntry("12", "PENDING"),
                      "last_words": "zeta: stopped as asked, saved"}),
        ("finished", {**ENDED, "finished": "step 40", "last_words": "zeta: finished at step 40"}),
        ("finished", {"finished": "step 40", "owner": None, "beats": ()}),
        ("stopped", {**ENDED, "last_words": "zeta: stopped as asked, saved at step 40"}),
        ("failed", {**ENDED, "last_words": "zeta: error: loss is not finite"}),
        ("failed", GONE),
        ("failed", {**ELSEWHERE, "queue_known": True}),
        ("unknown", ELSEWHERE),
        ("unknown", {**ELSEWHERE, "owner": replace(JOB_OWNER, job=None)}),
        ("unknown", {"owner": None, "owner_alive": None, "beats": (), "rows": ()}),
    ],
)  # fmt: skip
def test_the_state_of_a_run(state, changes):
    status = judge(snapshot(**changes))
    assert status.state == state
    assert status.why


@pytest.mark.parametrize(
    ("limits", "steps", "eta_s"),
    [
        (Limits(steps=100), 100, 120.0),
        (Limits(images=10_000), 100, 120.0),
        (Limits(tokens=480_000), 60, 40.0),
        (Limits(epochs=5, images_per_epoch=1000), 50, 20.0),
        (Limits(steps=100, tokens=480_000), 60, 40.0),
        (Limits(steps=30), 40, 0.0),
        (Limits(epochs=5), None, None),
        (Limits(), None, None),
    ],
)
def test_what_is_left_is_told_for_every_kind_of_end(limits, steps, eta_s):
    status = judge(snapshot(limits=limits))
    assert (status.of_steps, status.eta_s) == (steps, eta_s)


def test_rates_are_means_over_the_last_log_intervals_and_nan_is_none():
    rows = [{"step": 1, "time/step_s": 99.0}]
    rows += [{"step": 2 + i, "time/step_s": 1.0 + i % 2, "train/loss": 3.0} for i in range(20)]
    rows += [{"step": 30, "train/loss": float("nan")}]
    status = judge(snapshot(rows=rows))
    assert status.step_s == 1.5
    assert status.step == 30
    assert status.loss is None
    assert status.images_per_s is None


def test_a_rate_is_all_images_over_all_seconds_not_a_mean_of_rates():
    # 11 steps of 4 s with 80 images each, then 5 of 0.5 s with as many: 1,280 images in 46.5 s.
    rows = [
        {"step": step, "time/step_s": seconds, "throughput/images_per_s": 80 / seconds}
        for step, seconds in ((1, 4.0), (11, 4.0), (16, 0.5))
    ]
    status = judge(snapshot(rows=rows))
    assert status.images_per_s == pytest.approx(16 * 80 / (11 * 4 + 5 * 0.5))
    assert status.step_s == pytest.approx((11 * 4 + 5 * 0.5) / 16)
    assert status.images_per_s * status.step_s == pytest.approx(80)


def test_a_rank_past_the_limit_of_its_phase_or_silent_is_stuck():
    beats = (beat(0), beat(1, phase="data", phase_s=70), beat(2, ago=40), beat(3, phase="ended"))
    slow = (beat(4, phase_s=1e6, limit_s=None), beat(5, ago=9, phase_s=55))
    status = judge(snapshot(beats=(*beats, *slow)))
    assert [(s.rank, s.phase) for s in status.stuck] == [(1, "data"), (2, "train"), (5, "train")]
    assert "above its limit of 60 s" in status.stuck[0].why
    assert status.stuck[1].why == "no heartbeat for 40 s"
    assert status.phases == {"data": 1, "train": 4}
    assert judge(snapshot(**GONE)).stuck == ()


def test_the_other_figures():
    best = {"step": 40, "val/best_top1": 0.75, "val/best_step": 30}
    seen = snapshot(
        rows=(ROW, best), checkpoint_step=32, checkpoint_time=NOW - 100, starts=3, stalled=1,
        quarantined=7, error="rank_00001.log: ValueError: no", owner=JOB_OWNER,
        job=QueueEntry("12", "RUNNING"),
    )  # fmt: skip
    status = judge(seen)
    assert (status.checkpoint_step, status.checkpoint_age_s) == (32, 100.0)
    assert (status.slowest_rank, status.slowest_host, status.slowest_ratio) == (1, "n2", 1.5)
    assert (status.restarts, status.stalled, status.quarantined) == (2, 1, 7)
    assert (status.best, status.loss) == (0.75, 1.5)
    assert (status.job, status.error) == ("12 (running)", "rank_00001.log: ValueError: no")


def test_trouble_that_a_run_got_over_is_not_shown_at_its_end():
    trouble = {"stalled": 1, "error": "rank_00001.log: ended with 1; requeueing"}
    ends = {"finished": "step 32", "last_words": "zeta: finished at step 32"}
    status = judge(snapshot(**ENDED, **ends, **trouble))
    assert (status.state, status.stalled, status.error) == ("finished", None, None)
    stopped = judge(snapshot(**ENDED, last_words="zeta: stopped as asked", **trouble))
    assert (stopped.state, stopped.eta_s, stopped.error) == ("stopped", None, None)
    lines = status_lines(stopped)
    assert not any(line.startswith(("left", "last error")) for line in lines)


def test_time_spans_read_as_people_say_them():
    spans = [5, 100, 3600 * 1.7, 3600 * 30.5, 3600 * 24 * 3.2]
    assert [duration(s) for s in spans] == ["5 s", "2 min", "1 h 42 min", "30 h 30 min", "3 d 5 h"]


def test_after_a_clock_was_set_back_only_ranks_that_beat_again_are_well():
    owner = replace(OWNER, host="n0")
    late = replace(beat(1), host="n0", time=NOW + 3600)
    view = judge(snapshot(owner=owner, beats=(beat(0), late)))
    (stuck,) = view.stuck
    assert (stuck.rank, "the clock was set back (the last is 60 min ahead)" in stuck.why) == (
        1,
        True,
    )
    elsewhere = replace(late, host="n7")  # whose clock may be another
    assert not judge(snapshot(owner=owner, beats=(beat(0), elsewhere))).stuck
