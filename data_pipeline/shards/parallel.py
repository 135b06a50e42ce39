"""Independent tasks in worker processes that end with their parent, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.synchronize import Semaphore
from types import FrameType
from typing import TypeVar

SMALL_BYTES = 2**26
"""Bytes of data below which worker processes do not pay off."""
_WATCH_S = 0.2
_GRACE_S = 5.0
"""Time that a worker has to end in good order."""

Task = TypeVar("Task")
Result = TypeVar("Result")


class SpawnPool(ProcessPoolExecutor):
    """A pool of worker processes that leave Ctrl-C to this process and end with it."""

    def __init__(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, self._count = context.Semaphore(0), workers
        super().__init__(
            workers, mp_context=context, initializer=_begin_worker, initargs=(self._end,)
        )

    def end(self) -> None:
        """Drop tasks that have not begun, and end the workers at once."""
        self.shutdown(wait=False, cancel_futures=True)
        for _ in range(self._count):
            self._end.release()


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, nbytes: int
) -> Iterator[Result]:
    """Yield ``function(task)`` for all tasks, in the order in which they finish.

    With `workers` below 2, one task, or less than `SMALL_BYTES` of data over all tasks (`nbytes`),
    everything runs in this process, because a worker takes a second to start. If a task raises or
    the consumer stops (Ctrl-C), tasks that have not begun are dropped and the workers end.
    """
    if workers < 2 or len(tasks) < 2 or nbytes < SMALL_BYTES:
        yield from map(function, tasks)
        return
    executor = SpawnPool(min(workers, len(tasks)))
    finished = False
    try:
        for future in as_completed([executor.submit(_run, function, task) for task in tasks]):
            yield future.result()
        finished = True
    finally:
        if not finished:
            executor.end()
        executor.shutdown(wait=True)


def _run(function: Callable[[Task], Result], task: Task) -> Result:
    try:
        return function(task)
    except SystemExit as error:  # SIGTERM: the executor would continue with the next task
        status = error.code if isinstance(error.code, int) else 1
    os._exit(status)  # only now are all frames of the task closed


def _begin_worker(end: Semaphore) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    signal.signal(signal.SIGTERM, _exit)
    threading.Thread(target=_watch, args=(end,), daemon=True).start()


def _watch(end: Semaphore) -> None:
    """End this process when its parent ends, or in good order when `end` is released."""
    parent = multiprocessing.parent_process()
    while not end.acquire(timeout=_WATCH_S):
        if parent is not None and not parent.is_alive():
            os._exit(1)
    os.kill(os.getpid(), signal.SIGTERM)  # the main thread removes its temporary files
    # The signal is lost if it arrives just before the main thread begins to wait for a task, or in
    # code that catches every exception: the parent would wait for ever.
    time.sleep(_GRACE_S)
    os._exit(128 + signal.SIGTERM)


def _exit(signum: int, frame: FrameType | None) -> None:
    # An executor that misses one worker also sends SIGTERM to the others: perhaps again, and while
    # they remove a file.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not threading.main_thread().is_alive():
        return  # it is leaving already, and would only print a traceback
    sys.exit(128 + signum)  # an exception, so that temporary files are removed
