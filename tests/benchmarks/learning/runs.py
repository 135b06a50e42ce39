"""Parts of every comparison: shards of photos, runs in processes of their own, means over seeds."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.shards.build import build_shards


def write_photo_shards(photos: Path, out: Path) -> None:
    """Write the shards `out/train` and `out/val` of photos in folders `train` and `test`."""
    for split, source in (("train", "train"), ("val", "test")):
        build_shards(str(photos / source), out / split)


def run_zeta(words: Sequence[str], what: str) -> float:
    """Run `zeta` in a process of its own, and return its CPU seconds.

    Args:
        words: the command line after `zeta`.
        what: what it is, for the message if it fails, which ends this program.
    """
    before = _children_s()
    status = subprocess.run([sys.executable, "-m", "launch", *words]).returncode
    if status:
        sys.exit(f"{what} ended with {status}")
    return _children_s() - before


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Return mean and deviation in words; `form` is that of a number, "+" for a difference."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{form}} ± {deviation:{form.lstrip('+')}}"
