"""The step source of a run: worker processes execute the lanes of the plan in exact order."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import joblib
from torch.utils.data import DataLoader, Dataset

from data_pipeline.config import DataConfig
from data_pipeline.loading.executor import ExecutedPack, Executor
from data_pipeline.loading.pack_buffers import PackBuffers
from data_pipeline.loading.prefetch import Prefetcher
from data_pipeline.loading.recipe import PackOrder
from data_pipeline.plan.plan import LaneState, PackPlan, Plan
from data_pipeline.shards.remote import is_remote
from zeta.config_field import AUTO
from zeta.packed import StepPacks, check_world_size, lanes_of_rank
from zeta.run.cpu_tuning import keep_freed_memory

_LEAST_PREFETCH = 4
_MOST_BUFFER_BYTES = 4 * 2**30
"""Memory for packs that wait, beyond the least prefetch: a step of the shipped recipes takes 0.7
GiB on one rank."""
SETTLE_S = 0.02 if sys.version_info < (3, 11, 8) else 0.0
"""Seconds to wait before a fork. In older Pythons the child hangs if another thread is just
entering or leaving Python (python/cpython#112275); this was seen once, right after a collective.
The other threads get their work from this one, so they come to rest while it waits."""


class _Executors(Dataset["ExecutedPack | Exception"]):
    """A map-style dataset indexed by (order, buffer slot), so that workers keep no state.

    Without a slot all of a pack comes back by a pipe, which is slower. Errors come back as values,
    so that the training process raises them with their own type.
    """

    def __init__(self, plan: Plan, buffers: PackBuffers | None) -> None:
        self._plan, self._buffers = plan, buffers
        self._executor: Executor | None = None

    def __getitem__(self, index: tuple[PackOrder, int | None]) -> ExecutedPack | Exception:
        order, slot = index
        if self._executor is None:  # in the worker process, not before the fork
            class_names = self._plan.manifest.class_names
            self._executor = Executor(class_names, self._plan.config.read_deadline_s)
        try:
            recipe = order.recipe(self._plan)
            if self._buffers is None or slot is None:
                return self._executor.execute(recipe)
            made = self._executor.execute(recipe, self._buffers.patches(slot))
            return self._buffers.strip(slot, made)
        except (OSError, ValueError) as error:
            return error


class PackLoader:
    """The source of the packs of each optimizer step of one rank (`zeta.packed.StepSource`).

    Lane i belongs to rank i mod W. Every rank yields ceil(P / W) packs a step; a pack is empty if
    there is no lane for it, or if the stream of its lane has ended. The number of workers and the
    prefetch change nothing: orders go out and packs come back in the order of the plan.

    Args:
        plan: the plan of the run, the same on every rank.
        rank: index of this rank.
        world_size: W.

    Raises:
        ValueError: there are more ranks than lanes, or the cache is too small for the lanes here.
    """

    def __init__(self, plan: Plan, *, rank: int = 0, world_size: int = 1) -> None:
        check_world_size(world_size, plan.num_lanes)
        self._plan = plan
        self._slots = lanes_of_rank(rank, world_size, plan.num_lanes)
        self._lanes = [lane for lane in self._slots if lane < plan.num_lanes]
        self._states: dict[int, dict[int, LaneState]] = {}
        self._more: dict[int, bool] = {}
        self._prefetcher: Prefetcher | None = None
        if any(is_remote(shard.path) for shard in plan.manifest.shards):
            self._prefetcher = Prefetcher(plan, self._lanes, rank)

    @property
    def prefetch(self) -> int:
        """Packs that each worker is asked for ahead.

        Together they are a whole step, except of remote shards: the packs of a step are taken at
        once, and the workers make those of the next one while the device computes.
        """
        if self._prefetcher is not None:  # more would keep more shards in the cache
            return _LEAST_PREFETCH
        config, workers = self._plan.config, max(1, num_workers(self._plan.config))
        pack_bytes = config.token_budget * 3 * self._plan.patch_size**2
        wanted = -(-len(self._slots) // workers) + 1
        room = _MOST_BUFFER_BYTES // (pack_bytes * workers)
        return max(_LEAST_PREFETCH, min(wanted, room))

    def steps(self, state: Mapping[str, Any] | None) -> Iterator[StepPacks]:
        """Yield the packs of each step, from `state` on (None: from the beginning of the run).

        Raises:
            ValueError: `state` belongs to other shards or another number of lanes.
        """
        first_step = check_state(self._plan, state)
        with self._prefetcher or nullcontext():
            yield from self._steps(state, first_step)

    def _steps(self, state: Mapping[str, Any] | None, first_step: int) -> Iterator[StepPacks]:
        step = first_step
        packs: list[ExecutedPack] = []
        for executed in self.executed(self._orders(state, first_step)):
            packs.append(executed)
            if len(packs) == len(self._slots):
                yield _step_packs(step, packs, self._slots, more=self._more.pop(step))
                self._states.pop(step - 1, None)  # the trainer has committed it by now
                packs, step = [], step + 1

    def executed(
        self, orders: Iterator[PackOrder], prefetch: int | None = None
    ) -> Iterator[ExecutedPack]:
        """Yield the packs of `orders` one by one, made by `data.workers` processes.

        Args:
            orders: the planned packs.
            prefetch: packs that each worker is asked for ahead; None: see `prefetch`.

        Raises:
            OSError, TarError: see `Executor.execute`.
        """
        config, workers = self._plan.config, num_workers(self._plan.config)
        prefetch = prefetch or self.prefetch
        keep_freed_memory()  # a step's packs are as large as those of the step before
        buffers = None
        if workers:
            # For each pack asked for ahead, and those of the step that is received and the one
            # before it, which training still holds. Who holds more gets them by a slower way.
            slots = prefetch * workers + 2 * len(self._slots) + 1
            buffers = PackBuffers(slots, config.token_budget, 3 * self._plan.patch_size**2)
        sent: deque[int | None] = deque()
        loader = DataLoader(
            _Executors(self._plan, buffers),
            batch_size=None,
            sampler=_with_slots(orders, buffers, sent),
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=begin_worker,
            multiprocessing_context="fork" if workers else None,  # they share the buffers
        )
        if workers:
            time.sleep(SETTLE_S)
        for executed in loader:
            slot = sent.popleft()
            if isinstance(executed, Exception):
                raise executed
            if self._prefetcher is not None:
                self._prefetcher.received()
            if buffers is not None and slot is not None:
                executed = buffers.join(slot, executed)
            yield executed

    def state_after(self, step: int) -> Mapping[str, Any]:
        """Return the state of this rank's lanes once `step` is committed, as JSON-able values.

        Raises:
            KeyError: `step` is neither the last step yielded nor the one before it.
        """
        return {
            "fingerprint": self._plan.manifest.fingerprint,
            "contents": self._plan.manifest.content_digest,
            "num_lanes": self._plan.num_lanes,
            "step": step,
            "lanes": {str(lane): state.to_json() for lane, state in self._states[step].items()},
        }

    def _orders(self, state: Mapping[str, Any] | None, first_step: int) -> Iterator[PackOrder]:
        """Yield the orders of this rank's packs without end, noting the state after each step."""
        saved = {} if state is None else state["lanes"]
        lanes = {
            lane: self._plan.lane(
                lane, LaneState.from_json(saved[str(lane)]) if str(lane) in saved else None
            )
            for lane in self._lanes
        }
        for step in itertools.count(first_step):
            if self._prefetcher is not None:
                self._prefetcher.look_ahead(lanes)
            orders = []
            for number, lane in enumerate(lanes.values(), start=1):
                pack = lane.next_pack()
                orders.append(PackOrder(pack, lane.epoch, self._cached(pack)))
                lane.plan_ahead(number / (len(lanes) + 1))  # each lane at another step
            for _ in range(len(self._slots) - len(lanes)):
                orders.append(PackOrder(None, orders[0].epoch))
            # Noted before the first order goes out: the step may come back at any time after.
            self._states[step] = {index: lane.state for index, lane in lanes.items()}
            self._more[step] = any(lane.has_more() for lane in lanes.values())
            if self._prefetcher is not None:
                for order in orders:
                    self._prefetcher.sent(list(order.cached.values()))
            yield from orders

    def _cached(self, pack: PackPlan | None) -> dict[str, str]:
        """Return the files in the cache that have the shards of a pack."""
        if self._prefetcher is None or pack is None:
            return {}
        manifest, locate = self._plan.manifest, self._prefetcher.locate
        numbers = set(manifest.shard_of(pack.sample_ids).tolist())
        found = {shard.path: locate(shard) for shard in map(manifest.shards.__getitem__, numbers)}
        return {path: file for path, file in found.items() if file is not None}


def _with_slots(
    orders: Iterator[PackOrder], buffers: PackBuffers | None, sent: deque[int | None]
) -> Iterator[tuple[PackOrder, int | None]]:
    """Yield each order with a slot for its pack, and note the slot: packs return in this order."""
    for order in orders:
        sent.append(None if buffers is None else buffers.take())
        yield order, sent[-1]


def num_workers(config: DataConfig) -> int:
    """Return `data.workers`; auto is all cores of this process but the one that it trains with.

    `zeta train` has set the share of its rank by then; several ranks of a loop of your own that
    share a machine need a number.
    """
    return int(max(1, joblib.cpu_count() - 1) if config.workers == AUTO else config.workers)


def check_state(plan: Plan, state: Mapping[str, Any] | None) -> int:
    """Return the step at which `plan` continues from a saved state of the data.

    Raises:
        ValueError: `state` belongs to other shards or another number of lanes.
    """
    if state is None:
        return 0
    manifest = plan.manifest
    if state["fingerprint"] not in (manifest.fingerprint, manifest.older_fingerprint):
        raise ValueError(
            "data.shards are not the shards that this run was started on (their fingerprint, of "
            "names, sizes and samples, differs): give those, at any place, or start a new run in "
            "another run.dir"
        )
    contents = state.get("contents")
    if contents and manifest.content_digest and contents != manifest.content_digest:
        raise ValueError(
            "data.shards hold other bytes than those that this run was started on (their checksums "
            "differ, though names, sizes and labels do not): restore them, or start a new run in "
            "another run.dir"
        )
    if state["num_lanes"] != plan.num_lanes:
        raise ValueError(
            f"train.packs_per_step is {plan.num_lanes}, but this run was started with "
            f"{state['num_lanes']}"
        )
    return int(state["step"]) + 1


def begin_worker(_worker: int) -> None:
    """Let a process that decodes for a rank outlive the signals that let the rank stop."""
    keep_freed_memory()
    # A terminal or Slurm signals the rank and its workers; the rank saves, then ends its workers.
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where no Slurm is either
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_rank_asks, args=[os.getppid()], daemon=True).start()


def _end_when_rank_asks(rank: int) -> None:
    """Wait for SIGTERM from the process `rank`, then end this one; ignore SIGTERM from others.

    Slurm sends it to all processes of a preempted job, but the current step of the ranks still
    needs its data.
    """
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
        pass
    os._exit(0)


def _step_packs(
    step: int, packs: Sequence[ExecutedPack], lanes: Sequence[int], *, more: bool
) -> StepPacks:
    batches = tuple(pack.batch for pack in packs)
    return StepPacks(
        step=step,
        packs=batches,
        lanes=tuple(lanes),
        num_images=sum(batch.num_images for batch in batches),
        num_tokens=sum(map(_trained_tokens, packs)),
        epoch=min(pack.epoch for pack in packs),
        more=more,
        rejected=tuple(rejected for pack in packs for rejected in pack.rejected),
    )


def _trained_tokens(pack: ExecutedPack) -> int:
    """Return the tokens of the images that count in the loss; undecoded ones keep their slots."""
    batch = pack.batch
    if not pack.rejected:
        return batch.num_tokens
    weights = batch.weights.tolist()
    return sum(n for n, weight in zip(batch.lengths, weights, strict=False) if weight > 0)
