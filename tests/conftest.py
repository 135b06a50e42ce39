"""Which tests run where."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def environment_stays() -> Iterator[None]:
    """Undo what a test leaves in the environment: what starts next would take it for its own."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
    """Skip GPU tests, and say so, where there is no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; see `make test-gpu`"))


def pytest_configure() -> None:
    """Take Ctrl-C even where the suite was started in the background of a shell.

    Such a shell has its jobs ignore SIGINT, and so would every process that a test interrupts.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
