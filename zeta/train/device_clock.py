"""The time of the device in each step, and the time for which the host waits for it.

On a CUDA device work is queued and the host runs ahead of it: the device's time is taken from
events on its stream, from the first kernel of a step to the last, and read when they have passed. A
host that binds shows as a wait of zero. On the CPU the host is the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceTime:
    """Seconds since the last reading."""

    device_s: float
    """Time of the device in the steps that it has ended."""
    steps: int
    """Number of these steps."""
    waited_s: float
    """Time for which the host waited for the device."""


class Stopwatch:
    """Stopwatch for work of a device: CUDA events on its stream, or the time of day on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: deque[tuple[torch.Event, torch.Event]] = deque()
        self._seconds, self._parts = 0.0, 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the work that is queued, or computed, inside."""
        if self._device.type == "cuda":
            begin, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started
        self._parts += 1

    def take(self) -> tuple[float, int]:
        """Return the seconds and the number of the parts that the device has ended since the last
        call; it never waits for the device."""
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3
            self._parts += 1
        taken = self._seconds, self._parts
        self._seconds, self._parts = 0.0, 0
        return taken


class DeviceClock:
    """The time of the device in each step, and of the host's waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._work = Stopwatch(device)
        self._waited_s = 0.0
        self.step = self._work.running
        """Context around the work of one step."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a wait of the host for the device."""
        started = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - started

    def take(self) -> DeviceTime:
        """Return the time since the last call; it never waits for the device."""
        device_s, steps = self._work.take()
        waited_s, self._waited_s = self._waited_s, 0.0
        return DeviceTime(device_s, steps, waited_s if self._on_cuda else device_s)
