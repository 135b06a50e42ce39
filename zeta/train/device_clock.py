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


class DeviceClock:
    """Stopwatch for the part of a step that the device computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: deque[tuple[torch.Event, torch.Event]] = deque()
        self._device_s = self._waited_s = 0.0
        self._steps = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time the work of one step that is queued, or computed, inside."""
        if self._device.type == "cuda":
            begin, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._device_s += seconds
        self._waited_s += seconds
        self._steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a wait of the host for the device."""
        started = time.perf_counter()
        yield
        if self._device.type == "cuda":
            self._waited_s += time.perf_counter() - started

    def take(self) -> DeviceTime:
        """Return the seconds since the last call; it never waits for the device."""
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            self._device_s += begin.elapsed_time(end) / 1e3
            self._steps += 1
        taken = DeviceTime(self._device_s, self._steps, self._waited_s)
        self._device_s = self._waited_s = 0.0
        self._steps = 0
        return taken
