"""Reading the samples of a pack: directly from the page cache, or ahead of decoding by threads."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from data_pipeline.loading.recipe import ImageRecipe
from data_pipeline.loading.shard_cache import failure_path
from data_pipeline.shards.checksum import DamagedSample
from data_pipeline.shards.remote import is_remote, read_range
from data_pipeline.shards.retry import PermanentError, with_retries
from data_pipeline.shards.sample import Sample
from data_pipeline.shards.tar_reader import (
    ShardFile,
    TarError,
    parse_sample,
    read_cached_sample,
    read_sample,
)

_THREADS = 4
_POLL_S = 0.02
_SAMPLES_A_READ = 8
"""Samples that a thread reads at a time: few, so that the next ones are read during decoding."""
_LARGEST_AT_ONCE = 2**22


class SampleReader:
    """A reader of samples in order; waiting for storage overlaps with decoding.

    Samples in the page cache are read directly: passing them between threads would cost more than
    reading them. From the first sample that is not cached, a few threads read ahead. A read that
    fails is retried until `deadline_s` seconds are over; then it fails for good, as does a read
    that does not return (a disk that hangs). A mount that hangs when a file is opened is left to
    the watchdog of training.
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._buffer = memoryview(bytearray(_LARGEST_AT_ONCE))
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="read")

    def read(
        self, images: Sequence[ImageRecipe], at_once: int
    ) -> Iterator[tuple[list[Sample], float]]:
        """Yield the samples of the next images, `at_once` at most, and the seconds spent waiting.

        Raises:
            OSError: a shard cannot be read or does not answer; the error names shard and byte.
            TarError: the shard changed, or does not hold the sample where the index says.
        """
        for start in range(0, len(images), at_once):
            part = images[start : start + at_once]
            before = time.perf_counter()
            samples = _read_cached(part, self._buffer)
            if samples:
                yield samples, time.perf_counter() - before
            if len(samples) < len(part):
                yield from self._read_ahead(images[start + len(samples) :], at_once)
                return

    def _read_ahead(
        self, images: Sequence[ImageRecipe], at_once: int
    ) -> Iterator[tuple[list[Sample], float]]:
        # A few samples at a time, for passing one between threads costs as much as reading it; but
        # the first one alone, so that decoding begins at once.
        starts = [0, *range(1, len(images), min(_SAMPLES_A_READ, at_once)), len(images)]
        parts = [images[start:end] for start, end in pairwise(starts) if start < end]
        futures = [self._threads.submit(_read_part, part, self._deadline_s) for part in parts]
        try:
            for part, future in zip(parts, futures, strict=True):
                start = time.perf_counter()
                samples = self._result(future, part[0])
                yield samples, time.perf_counter() - start
        finally:
            for future in futures:
                future.cancel()

    def _result(self, future: Future[list[Sample]], first: ImageRecipe) -> list[Sample]:
        # Readers keep the deadline themselves, unless a system call never returns.
        limit = None if first.cached else 2 * self._deadline_s
        try:
            return future.result(timeout=limit)
        except FutureTimeout as error:
            what = f"no answer for {limit:g} s, reading at byte {first.offset}"
            raise OSError(errno.ETIMEDOUT, what, first.shard) from error


def _read_part(images: Sequence[ImageRecipe], deadline_s: float) -> list[Sample]:
    return [read_image(image, deadline_s) for image in images]


def read_image(image: ImageRecipe, deadline_s: float) -> Sample:
    """Read the sample of one image, with retries; see `SampleReader.read`.

    Bytes that are not those that were indexed are read once more: from the shard itself if the
    first ones were of the cache, else from storage in the place of memory. If those are wrong too,
    the sample has a `fault` and no members: it costs its own slot, as an image that cannot be
    decoded.
    """
    try:
        return _read(image, deadline_s)
    except (DamagedSample, TarError) as error:
        if isinstance(error, TarError) and image.cached is None:
            raise
    try:
        return _read_shard(image, deadline_s, again=True)
    except DamagedSample as error:
        return Sample(error.key, {}, fault=str(error))


def _read(image: ImageRecipe, deadline_s: float) -> Sample:
    if image.cached is not None:
        path = image.cached
        _await_download(image, Path(path))
        return with_retries(lambda: _read_file(image, path), deadline_s)
    return _read_shard(image, deadline_s)


def _read_shard(image: ImageRecipe, deadline_s: float, *, again: bool = False) -> Sample:
    """Read a sample from its shard, not from the cache of remote ones."""
    if is_remote(image.shard):
        data = read_range(image.shard, image.offset, image.nbytes, deadline_s)
        return parse_sample(data, shard=image.shard, offset=image.offset, known=image.checksum)
    return with_retries(lambda: _read_file(image, image.shard, again), deadline_s)


def _read_cached(images: Sequence[ImageRecipe], buffer: memoryview) -> list[Sample]:
    """Return the samples of the first images, as long as the page cache has all of each.

    Several at a time, because decoding empties the caches of the processor: the first sample after
    it takes twice as long as the next ones.
    """
    samples: list[Sample] = []
    shards: dict[str, ShardFile] = {}
    with ExitStack() as opened:
        for image in images:
            path = image.cached or image.shard
            if is_remote(path) or image.nbytes > len(buffer):
                break
            try:
                if path not in shards:
                    shards[path] = opened.enter_context(ShardFile(path))
                part = buffer[: image.nbytes]
                place = (shards[path], image.offset, part)
                sample = read_cached_sample(*place, _stamp(image), image.checksum)
            except (OSError, TarError, DamagedSample):
                break  # `read_image` reports the failure, or reads again
            if sample is None:
                break
            samples.append(sample)
    return samples


def _stamp(image: ImageRecipe) -> tuple[int, int] | None:
    return image.stamp if image.cached is None else None  # the cache checked what it downloaded


def _read_file(image: ImageRecipe, path: str, again: bool = False) -> Sample:
    place = (path, image.offset, image.nbytes)
    try:
        return read_sample(*place, _stamp(image), image.checksum, again)
    except TarError as error:
        raise TarError(image.shard, error.offset, error.what) from None
    except PermanentError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, image.shard) from error


def _await_download(image: ImageRecipe, path: Path) -> None:
    """Wait until the cache holds the shard; a failed download leaves its reason in a file."""
    while not path.exists():
        failure = failure_path(path)
        if failure.exists():
            what = f"{failure.read_text('utf-8')}; wanted for a sample at byte {image.offset}"
            raise PermanentError(errno.EIO, what, image.shard)
        time.sleep(_POLL_S)
