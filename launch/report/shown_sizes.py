"""Computes the sizes at which a run trains on images, and their drop rates, from its plan."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.plan.lane_packer import PackPlan
from data_pipeline.plan.plan import Plan
from launch.report.logged_run import finite_number
from zeta.run.directory import RunDir

SIDES, DROPS = "sides_px", "dropped_percent"
_IMAGES = 8192
"""Most images counted: enough for a histogram, and quick."""


def shown_sizes(plan: Plan, images_seen: int) -> dict[str, Any]:
    """Return {`images`, SIDES, DROPS}: the number of images, and counts by side and drop rate.

    The side of an image is the square root of its area as the model sees it, rounded to a pixel;
    the drop rate is in per cent. The images are the first of the plan, but with sizes as if they
    were spread evenly over the run, because schedules change the sizes.

    Args:
        plan: plan of the run.
        images_seen: images that the run has trained on; at least one image is counted.
    """
    lanes = [plan.lane(number) for number in range(plan.num_lanes)]
    wanted = max(1, min(_IMAGES, images_seen))
    drawn: list[PackPlan] = []
    while sum(len(pack.sample_ids) for pack in drawn) < wanted:
        packs = [pack for lane in lanes if (pack := lane.next_pack()) is not None]
        if not packs:
            break
        drawn += packs
    first = PackPlan.concatenate(drawn).select(slice(wanted))
    first = first.select(np.flatnonzero(first.views == 0))
    seen = np.linspace(0, max(images_seen - 1, 0), len(first.sample_ids)).astype(np.int64)
    epochs = first.epochs + seen // (plan.config.views_of_sample * plan.num_images)
    shown = plan.size_images(first.sample_ids, epochs, seen)
    patches = shown.rows * shown.columns
    sides = np.rint(np.sqrt(patches) * plan.patch_size).astype(np.int64)
    drops = np.rint(100 * (1 - shown.keep / patches)).astype(np.int64)
    return {"images": len(sides), SIDES: _counts(sides), DROPS: _counts(drops)}


def write_shown_sizes(run_dir: RunDir, plan: Plan, images_seen: int) -> Path:
    """Write sizes.json, and return its path."""
    run_dir.sizes.write_text(json.dumps(shown_sizes(plan, images_seen)) + "\n")
    return run_dir.sizes


def read_counts(sizes: Mapping[str, Any], what: str) -> dict[float, int]:
    """Return counts from sizes.json by value, leaving out what is not a number."""
    table = sizes.get(what)
    counts = {}
    for value, count in table.items() if isinstance(table, Mapping) else ():
        number = finite_number(count)
        if value.isdecimal() and number is not None and number > 0:
            counts[float(value)] = int(number)
    return counts


def _counts(values: NDArray[np.int64]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values.tolist()).items())}
