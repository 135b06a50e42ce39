"""A bounded local cache of whole remote shards, filled ahead in the order of the plan.

The plan knows which shards a rank reads next, so nothing is guessed: the shard that is needed
soonest is fetched first, and shards needed last, or never again, make room. Downloads run in
separate processes; executors wait for the file to appear under its name.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from data_pipeline.loading.claims import claim_folder, release
from data_pipeline.shards.atomic_file import remove_leftovers, write_atomically
from data_pipeline.shards.manifest import Shard
from data_pipeline.shards.parallel import SpawnPool
from data_pipeline.shards.remote import download

_FETCHERS = 2


def failure_path(path: Path) -> Path:
    """Return the file with the reason why the download to `path` failed."""
    return path.with_suffix(".failed")


def check_cache_size(shards: Sequence[Shard], lanes: int, group_shards: int, gb: float) -> None:
    """Check that a cache of `gb` (1e9 bytes) holds the shards that `lanes` read at the same time.

    Each lane shuffles the samples of `group_shards` shards together, so the cache must hold all of
    them.

    Raises:
        ValueError: the cache is too small; names the size needed and the size given.
    """
    sizes = sorted((shard.nbytes for shard in shards), reverse=True)
    needed = sum(sizes) if lanes * group_shards >= len(sizes) else lanes * group_shards * sizes[0]
    if needed > gb * 1e9:
        raise ValueError(
            f"data.cache_gb is {gb:g}, but {lanes} lanes here x {group_shards} shards (data."
            f"window_shards) x {sizes[0] / 1e9:.3g} GB need {needed / 1e9:.3g} GB: raise "
            "data.cache_gb, start more ranks, or make smaller shards"
        )


class ShardCache:
    """The cache of one rank.

    Args:
        folder: folder of the files. Whole shards of an earlier process are used again. While
            another process uses it (an evaluation beside a run), a numbered folder is taken.
        limit_bytes: most bytes of the files, downloads in progress included.
        deadline_s: seconds that a download may last without progress.
    """

    def __init__(self, folder: Path, limit_bytes: int, deadline_s: float) -> None:
        self._limit, self._deadline_s = limit_bytes, deadline_s
        self._folder, self._lock = claim_folder(folder)
        folder = self._folder
        remove_leftovers(folder)
        for path in folder.glob("*.failed"):
            path.unlink(missing_ok=True)
        self._sizes = {path: path.stat().st_size for path in folder.glob("*.tar")}
        """Bytes of every file, complete or in progress."""
        self._downloads: dict[Path, Future[None]] = {}
        self._pins: Counter[Path] = Counter()
        self._pool = SpawnPool(_FETCHERS)
        self._evict(keep=frozenset(), room=0)

    def want(self, shards: Iterable[Shard]) -> None:
        """Fetch shards in order, as far as the limit allows; the first is the one read soonest.

        Files that are neither in the list nor pinned may be deleted to make room.
        """
        ordered = {self.path(shard): shard for shard in shards}
        ahead: set[Path] = set()
        for path, shard in ordered.items():
            ahead.add(path)
            if path in self._sizes:
                continue
            if not self._evict(keep=ahead, room=shard.nbytes):
                return  # later shards must not take the room of earlier ones
            self._sizes[path] = shard.nbytes
            failure_path(path).unlink(missing_ok=True)
            future = self._pool.submit(download, shard.path, path, shard.nbytes, self._deadline_s)
            self._downloads[path] = future
            future.add_done_callback(partial(_note_failure, path))

    def locate(self, shard: Shard) -> Path | None:
        """Return the file of a shard, complete or in progress; None if there was no room for it."""
        path = self.path(shard)
        return path if path in self._sizes else None

    def path(self, shard: Shard) -> Path:
        """Return the file name for a shard; other contents of the same URL have another name."""
        facts = f"{shard.path} {shard.nbytes} {shard.mtime_ns}"
        return self._folder / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.tar"

    def pin(self, paths: Iterable[Path]) -> None:
        """Keep files until `unpin`, for a pack in progress that reads them."""
        self._pins.update(paths)

    def unpin(self, paths: Iterable[Path]) -> None:
        """Undo one `pin`."""
        self._pins.subtract(paths)

    @property
    def nbytes(self) -> int:
        """Bytes of the files; downloads in progress count as whole files."""
        return sum(self._sizes.values())

    def close(self) -> None:
        """Stop the downloads; whole files stay for the next process."""
        self._pool.end()
        release(self._lock)

    def _evict(self, keep: set[Path] | frozenset[Path], room: int) -> bool:
        """Delete files until `room` bytes are free; return False if that is not possible."""
        for path in list(self._sizes):
            if self.nbytes + room <= self._limit:
                break
            in_progress = path in self._downloads and not self._downloads[path].done()
            if path in keep or self._pins[path] > 0 or in_progress:
                continue
            path.unlink(missing_ok=True)
            failure_path(path).unlink(missing_ok=True)
            del self._sizes[path]
            self._downloads.pop(path, None)
        return self.nbytes + room <= self._limit


def _note_failure(path: Path, done: Future[None]) -> None:
    """Write why a download failed, for the executors that wait for its file."""
    if done.cancelled() or (error := done.exception()) is None:
        return
    with write_atomically(failure_path(path)) as stream:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        stream.write(f"{text} ({type(error).__name__})".encode())
