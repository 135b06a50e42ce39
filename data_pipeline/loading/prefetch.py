"""Prefetching: it fills the cache with the remote shards that a rank reads next."""

from __future__ import annotations

import itertools
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.loading.shard_cache import ShardCache, check_cache_size
from data_pipeline.plan.lane_packer import LanePacker
from data_pipeline.plan.lanes import Cursor, LaneStream
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.remote import is_remote

_GROUPS_AHEAD = 2


class Prefetcher:
    """The prefetcher of one rank: it fills the cache by the plan of its lanes.

    Args:
        plan: the plan of the run.
        lanes: the lanes of this rank.
        rank: index of this rank, which has its own folder in the cache.

    Raises:
        ValueError: the cache cannot hold what the lanes read at the same time.
    """

    def __init__(self, plan: Plan, lanes: Sequence[int], rank: int) -> None:
        self._plan, self._rank = plan, rank
        self._shards = plan.manifest.shards
        config = plan.config
        far = [shard for shard in self._shards if is_remote(shard.path)]
        sources = len(plan.sources)
        check_cache_size(far, len(lanes) * sources, config.window_shards, config.cache_gb)
        self._streams = {lane: plan.lane_mix(lane).streams for lane in lanes}
        self._cache: ShardCache | None = None
        self._in_flight: deque[list[Path]] = deque()
        self._known: tuple[object, ...] | None = None

    def __enter__(self) -> Prefetcher:
        config = self._plan.config
        root = Path(config.cache_dir or Path(tempfile.gettempdir()) / "zeta-cache").expanduser()
        limit = int(config.cache_gb * 1e9)
        self._cache = ShardCache(root / f"rank_{self._rank}", limit, config.read_deadline_s)
        return self

    def __exit__(self, *error: object) -> None:
        if self._cache is not None:
            self._cache.close()

    def look_ahead(self, lanes: Mapping[int, LanePacker]) -> None:
        """Fetch the shards that the next packs are read from, in order of need."""
        assert self._cache is not None, "used as a context"
        places = tuple((packer.state.origin, packer.cursors) for packer in lanes.values())
        if places == self._known:
            return
        self._known = places
        upcoming = [
            groups
            for lane, packer in lanes.items()
            for groups in self._upcoming(self._streams[lane], packer)
        ]
        # First the current shuffle group of each lane, then the one after it, and so on.
        by_need = itertools.chain.from_iterable(itertools.zip_longest(*upcoming, fillvalue=()))
        ids = np.array([sample for group in by_need for sample in group], dtype=np.int64)
        indices = dict.fromkeys(self._plan.manifest.shard_of(ids).tolist())
        wanted = (self._shards[index] for index in indices)
        self._cache.want(shard for shard in wanted if is_remote(shard.path))

    def _upcoming(
        self, streams: Sequence[LaneStream], packer: LanePacker
    ) -> Iterator[list[Sequence[int]]]:
        """Yield for each source its shuffle groups, from the oldest sample not yet packed on."""
        fresh = (Cursor(),) * len(streams)
        for stream, first, last in zip(
            streams, packer.state.origin or fresh, packer.cursors or fresh, strict=True
        ):
            groups = _groups(stream, first, self._plan.config.window_shards)
            found = []
            for place, group in groups:
                found.append(group)
                if place >= last[:2]:
                    break
            found += [group for _, group in itertools.islice(groups, _GROUPS_AHEAD)]
            yield found

    def locate(self, shard: Shard) -> str | None:
        """Return the cached file of a remote shard; None if the shard is read in place."""
        if self._cache is None or not is_remote(shard.path):
            return None
        path = self._cache.locate(shard)
        return None if path is None else str(path)

    def sent(self, cached: Sequence[str]) -> None:
        """Keep the files of a pack that was sent to the executors until it comes back."""
        assert self._cache is not None, "used as a context"
        paths = [Path(path) for path in cached]
        self._cache.pin(paths)
        self._in_flight.append(paths)

    def received(self) -> None:
        """Release the files of the pack sent first: it came back."""
        assert self._cache is not None, "used as a context"
        self._cache.unpin(self._in_flight.popleft())


def _groups(
    stream: LaneStream, cursor: Cursor, group_shards: int
) -> Iterator[tuple[tuple[int, int], Sequence[int]]]:
    """Yield (epoch, group) and the first sample of each shard of the group, from `cursor` on."""
    epoch, first = cursor.epoch, cursor.group
    while stream.max_epochs is None or epoch < stream.max_epochs:
        starts = [segment.start for segment in stream.deal.segments(epoch, stream.lane)]
        count = -(-len(starts) // group_shards)
        for number in range(first, count):
            yield (epoch, number), starts[number * group_shards : (number + 1) * group_shards]
        epoch, first = epoch + 1, 0
