"""Judges the state of a run from one snapshot of its directory and of the queue.

Nothing is read here: `launch.status.snapshot` takes the snapshot, and `launch.status.view` prints
the status. A run counts as healthy only if it is seen to be; what cannot be seen is unknown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from launch.run.lock import Owner
from zeta import metric_names as names
from zeta.run.heartbeat import Heartbeat

State = Literal["pending", "running", "requeued", "finished", "failed", "stopped", "unknown"]

OVER = ("finished", "stopped")
"""States of a run that needs no more attention."""
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED"}
_RATE_ROWS = 20
"""Number of last log intervals that throughput and remaining time are computed from."""
_SILENT_BEATS = 6
_SHORTEST_SILENCE_S = 30.0


@dataclass(frozen=True)
class QueueEntry:
    """The entry of a job in Slurm's queue."""

    id: str
    state: str
    """PENDING, RUNNING, COMPLETING and so on."""
    reason: str = ""
    """Why the job waits."""


@dataclass(frozen=True)
class Limits:
    """The limits of a run, which ends at the first that it reaches."""

    steps: float | None = None
    images: float | None = None
    tokens: float | None = None
    epochs: float | None = None
    images_per_epoch: float | None = None
    """None: the shards cannot be read."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that could be seen of a run at one moment."""

    time: float
    """Seconds since 1970, by the clock of the reader."""
    name: str = ""
    rows: Sequence[Mapping[str, Any]] = ()
    """Last lines of metrics.jsonl, oldest first."""
    limits: Limits = field(default_factory=Limits)
    beats: Sequence[Heartbeat] = ()
    heartbeat_s: float = 5.0
    finished: str | None = None
    """Content of the file FINISHED."""
    checkpoint_step: int | None = None
    checkpoint_time: float | None = None
    owner: Owner | None = None
    """Process that trained here last."""
    owner_alive: bool | None = None
    """True if that process is running; None: unknown, because it is on another machine."""
    starts: int = 0
    stalled: int | None = None
    """Starts of the job in a row without a new checkpoint; None: not a Slurm job."""
    job: QueueEntry | None = None
    """The run's job in the queue; None: it is not there."""
    queue_known: bool = False
    """True if squeue answered."""
    quarantined: int = 0
    last_words: str | None = None
    """Line in which rank 0 logged how it ended."""
    error: str | None = None
    """The last error in the logs."""


@dataclass(frozen=True)
class StuckRank:
    """A rank that should have made progress."""

    rank: int
    host: str
    phase: str
    why: str


@dataclass(frozen=True)
class Status:
    """The status of a run; unknown values are None or empty."""

    name: str
    state: State
    why: str
    """Evidence for the state."""
    step: int | None
    of_steps: int | None
    """Last step of the run; an estimate if its limits are not in steps."""
    eta_s: float | None
    images_per_s: float | None
    tokens_per_s: float | None
    step_s: float | None
    loss: float | None
    best: float | None
    """Best score on held-out images so far."""
    checkpoint_step: int | None
    checkpoint_age_s: float | None
    slowest_rank: int | None
    slowest_host: str | None
    slowest_ratio: float | None
    ranks: int
    phases: Mapping[str, int]
    """Number of ranks in each phase."""
    stuck: tuple[StuckRank, ...]
    restarts: int
    stalled: int | None
    quarantined: int
    job: str | None
    error: str | None
    """Last error in the logs; None for a finished or stopped run, which got over it."""


def judge(seen: Snapshot) -> Status:
    """Return the status of a run as seen in a snapshot."""
    state, why = _state(seen)
    last = _latest(seen.rows)
    step = last.get("step")
    ends = sorted(_steps_left(seen, last, step)) if step is not None else []
    left = ends[0] if ends else None
    step_s = _step_s(seen.rows)
    running, over = state == "running", state in OVER
    return Status(
        name=seen.name,
        state=state,
        why=why,
        step=step,
        of_steps=None if step is None or left is None else step + math.ceil(left),
        eta_s=None if left is None or step_s is None or over else left * step_s,
        images_per_s=_per_second(seen.rows, names.IMAGES_PER_S),
        tokens_per_s=_per_second(seen.rows, names.TOKENS_PER_S),
        step_s=step_s,
        loss=_number(last.get(names.TRAIN_LOSS)),
        best=next((_number(v) for name, v in last.items() if _is_best(name)), None),
        checkpoint_step=seen.checkpoint_step,
        checkpoint_age_s=(
            None if seen.checkpoint_time is None else max(0.0, seen.time - seen.checkpoint_time)
        ),
        slowest_rank=_whole(last.get(names.SLOWEST_RANK)),
        slowest_host=last.get(names.SLOWEST_HOST),
        slowest_ratio=_number(last.get(names.STRAGGLER_RATIO)),
        ranks=len(seen.beats),
        phases=dict(sorted(Counter(b.phase for b in seen.beats if b.phase != "ended").items())),
        stuck=tuple(_stuck(seen)) if running else (),
        restarts=max(seen.starts - 1, 0 if seen.owner is None else seen.owner.restarts),
        stalled=None if over else seen.stalled,
        quarantined=seen.quarantined,
        job=_job_text(seen),
        error=None if over else seen.error,
    )


def _state(seen: Snapshot) -> tuple[State, str]:
    """Return the state and the evidence: from the queue, else the process, else the files."""
    began = seen.owner is not None or bool(seen.rows)
    job = seen.job
    if job is not None and job.state in _WAITING:
        reason = f" ({job.reason})" if job.reason not in ("", "None") else ""
        text = f"job {job.id} is {job.state.lower()}{reason}"
        return ("requeued", text) if began else ("pending", text)
    if job is not None and job.state not in ("COMPLETING", "COMPLETED"):
        return "running", f"job {job.id} is {job.state.lower()}"
    owner = seen.owner
    released = owner is not None and owner.released
    if owner is not None and not released and seen.owner_alive:
        return "running", f"process {owner.pid} on {owner.host}"
    if seen.finished is not None and (owner is None or released or seen.owner_alive is False):
        return "finished", seen.finished
    if not released and any(_is_fresh(seen, beat) for beat in seen.beats):
        return "running", "its heartbeats are fresh"
    return _how_it_ended(seen, began, released)


def _how_it_ended(seen: Snapshot, began: bool, released: bool) -> tuple[State, str]:
    """Return the state of a run that is not running, as far as can be seen."""
    owner = seen.owner
    words = seen.last_words or ""
    if owner is None:
        return "unknown", "nothing has trained here yet" if not began else "owner not recorded"
    if released and "stopped as asked" in words:
        return "stopped", words
    if released and "error" in words:
        return "failed", words
    if released:
        return "stopped", "its process ended in order"
    if seen.owner_alive is False:
        return "failed", f"process {owner.pid} on {owner.host} died without an error message"
    if owner.job is not None and seen.queue_known and seen.job is None:
        return "failed", f"job {owner.job} is not in the queue any more"
    age = _age(max((beat.time for beat in seen.beats), default=owner.time), seen.time)
    queue = "" if seen.queue_known or owner.job is None else ", and squeue does not answer"
    return "unknown", f"no heartbeat for {age}{queue}"


def _stuck(seen: Snapshot) -> Iterator[StuckRank]:
    """Yield the ranks that exceed the time limit of their phase, or sent no heartbeat."""
    for beat in seen.beats:
        silent_s = seen.time - beat.time
        if beat.phase == "ended":
            continue
        if not _is_fresh(seen, beat):
            why = f"no heartbeat for {_age(beat.time, seen.time)}"
            if silent_s < 0:
                ahead = duration(-silent_s)
                why = f"no heartbeat since the clock was set back (the last is {ahead} ahead)"
        elif beat.limit_s is not None and beat.phase_s + max(silent_s, 0) > beat.limit_s:
            why = f"in this phase for {beat.phase_s:.0f} s, above its limit of {beat.limit_s:.0f} s"
        else:
            continue
        yield StuckRank(beat.rank, beat.host, beat.phase, why)


def _is_fresh(seen: Snapshot, beat: Heartbeat) -> bool:
    limit_s, age_s = silence_s(seen.heartbeat_s), seen.time - beat.time
    if beat.phase == "ended":
        return False
    if age_s <= -limit_s and seen.owner is not None and seen.owner_alive is not None:
        # By one clock a heartbeat of the future is from before the clock was set back.
        return beat.host != seen.owner.host
    return age_s < limit_s


def silence_s(heartbeat_s: float) -> float:
    """Return the seconds without a heartbeat from which on a rank counts as silent."""
    return max(_SHORTEST_SILENCE_S, _SILENT_BEATS * heartbeat_s)


def _steps_left(seen: Snapshot, last: Mapping[str, Any], step: int) -> Iterator[float]:
    """Yield the number of steps to each limit of the run, at the current rate."""
    limits = seen.limits
    if limits.steps is not None:
        yield max(0.0, limits.steps - step)
    step_s = _step_s(seen.rows)
    images = limits.images
    if limits.epochs is not None and limits.images_per_epoch:
        by_epochs = limits.epochs * limits.images_per_epoch
        images = by_epochs if images is None else min(images, by_epochs)
    for end, done, rate in (
        (images, names.IMAGES_SEEN, names.IMAGES_PER_S),
        (limits.tokens, names.TOKENS_SEEN, names.TOKENS_PER_S),
    ):
        seen_so_far, per_s = _number(last.get(done)), _per_second(seen.rows, rate)
        if None not in (end, seen_so_far, per_s, step_s) and per_s and step_s:
            assert end is not None
            assert seen_so_far is not None
            yield max(0.0, end - seen_so_far) / (per_s * step_s)


def _latest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last value of each metric."""
    latest: dict[str, Any] = {}
    for row in rows:
        latest |= row
    return latest


def _step_s(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the seconds of a step over the last log intervals: their seconds over their steps."""
    timed = _intervals(rows)
    steps = sum(steps for steps, _, _ in timed)
    return sum(seconds for _, seconds, _ in timed) / steps if steps else None


def _per_second(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return a rate over the last log intervals: what they hold in all, over their seconds in all.

    The mean of the rates would be another number: a fast interval would count as much as a slow
    one, which holds most of the time.
    """
    rated = [
        (seconds, rate)
        for _, seconds, row in _intervals(rows)
        if (rate := _number(row.get(name))) is not None
    ]
    total = sum(seconds for seconds, _ in rated)
    return sum(seconds * rate for seconds, rate in rated) / total if total else None


def _intervals(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, Mapping[str, Any]]]:
    """Return (steps, seconds, row) of the last log intervals that were timed."""
    found, before = list[tuple[int, float, Mapping[str, Any]]](), 0
    for row in rows:
        step_s, step = _number(row.get(names.STEP_S)), _whole(row.get("step"))
        if step_s is None or step is None:
            continue
        # After a restart steps come again; of the first row what is before it is not known.
        steps = step - before if 0 < before < step else 1
        found.append((steps, steps * step_s, row))
        before = step
    return found[-_RATE_ROWS:]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _whole(value: object) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _is_best(name: str) -> bool:
    return name.startswith(names.val_best("")) and name != names.VAL_BEST_STEP


def _job_text(seen: Snapshot) -> str | None:
    if seen.job is not None:
        return f"{seen.job.id} ({seen.job.state.lower()})"
    if seen.owner is None or seen.owner.job is None:
        return None
    return (
        f"{seen.owner.job} ({'not in the queue' if seen.queue_known else 'squeue does not answer'})"
    )


def _age(then: float, now: float) -> str:
    return duration(max(0.0, now - then))


def duration(seconds: float) -> str:
    """Write a time span for people: 45 s, 12 min, 3 h 5 min, 2 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
