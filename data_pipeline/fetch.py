"""Reading the samples of a pack ahead of their decoding, from local files, the cache or a URL."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from itertools import pairwise
from pathlib import Path

from data_pipeline.recipe import ImageRecipe
from data_pipeline.remote import is_remote, read_range
from data_pipeline.retry import PermanentError, with_retries
from data_pipeline.sample import Sample
from data_pipeline.shard_cache import failure_path
from data_pipeline.tar_reader import TarError, parse_sample, read_sample

_THREADS = 4
_POLL_S = 0.02
_SAMPLES_A_READ = 8


class SampleReader:
    """Reads by a few threads, so that latency of storage and decoding overlap.

    A read that fails is tried again; after `deadline_s` it fails for good, and so does one that
    does not return (a disk or mount that hangs).
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="read")

    def read(self, images: Sequence[ImageRecipe]) -> Iterator[tuple[Sample, float]]:
        """Yield the sample of each image in order, and the seconds that were waited for it.

        Raises:
            OSError: a shard cannot be read, changed, or does not answer; names shard and byte.
            TarError: the shard does not hold the sample where the index says.
        """
        # A few samples at a time: handing over each one alone would cost as much as reading it.
        # The first one alone, so that decoding begins at once.
        starts = [0, *range(1, len(images), _SAMPLES_A_READ), len(images)]
        parts = [images[start:end] for start, end in pairwise(starts) if start < end]
        futures = [self._threads.submit(_read_part, part, self._deadline_s) for part in parts]
        try:
            for part, future in zip(parts, futures, strict=True):
                start = time.perf_counter()
                samples = self._result(future, part[0])
                waited = time.perf_counter() - start
                for sample in samples:
                    yield sample, waited
                    waited = 0.0
        finally:
            for future in futures:
                future.cancel()

    def _result(self, future: Future[list[Sample]], first: ImageRecipe) -> list[Sample]:
        # Readers keep the deadline themselves, unless the system never returns to them.
        limit = None if first.cached else 2 * self._deadline_s
        try:
            return future.result(timeout=limit)
        except FutureTimeout as error:
            what = f"no answer for {limit:g} s, reading at byte {first.offset}"
            raise OSError(errno.ETIMEDOUT, what, first.shard) from error


def _read_part(images: Sequence[ImageRecipe], deadline_s: float) -> list[Sample]:
    return [read_image(image, deadline_s) for image in images]


def read_image(image: ImageRecipe, deadline_s: float) -> Sample:
    """Read the sample of one image, with retries; see `SampleReader.read`."""
    if image.cached is not None:
        path = image.cached
        _await_download(image, Path(path))
        return with_retries(lambda: _read_file(image, path), deadline_s)
    if is_remote(image.shard):
        data = read_range(image.shard, image.offset, image.nbytes, deadline_s)
        return parse_sample(data, shard=image.shard, offset=image.offset)
    return with_retries(lambda: _read_file(image, image.shard), deadline_s)


def _read_file(image: ImageRecipe, path: str) -> Sample:
    stamp = image.stamp if image.cached is None else None
    try:
        return read_sample(path, image.offset, image.nbytes, stamp)
    except TarError as error:
        raise TarError(image.shard, error.offset, error.what) from None
    except PermanentError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, image.shard) from error


def _await_download(image: ImageRecipe, path: Path) -> None:
    """Wait until the cache holds the shard; its download keeps deadlines and says if it fails."""
    while not path.exists():
        failure = failure_path(path)
        if failure.exists():
            what = f"{failure.read_text('utf-8')}; wanted for a sample at byte {image.offset}"
            raise PermanentError(errno.EIO, what, image.shard)
        time.sleep(_POLL_S)
