"""Writes the two files of a report that training does not: a picture of a pack, and image sizes.

Both are derived from the run's config and shards, and are kept in its directory, because a run may
outlive its shards.
"""

from __future__ import annotations

from launch.report.first_pack import draw_first_pack, plan_of
from launch.report.headlines import last_value
from launch.report.logged_run import read_run
from launch.report.shown_sizes import write_shown_sizes
from zeta import metric_names as names
from zeta.run.directory import RunDir


def write_derived_files(run_dir: RunDir) -> None:
    """Write sizes.json, and pack.svg unless it exists.

    Raises:
        ValueError: the run has logged nothing, or its config or shards are gone or have changed.
        OSError: its shards or its directory cannot be reached.
    """
    seen = last_value(read_run(run_dir.path), names.IMAGES_SEEN)
    plan = plan_of(run_dir)
    write_shown_sizes(run_dir, plan, int(seen or 0))
    if not run_dir.pack_picture.exists():
        draw_first_pack(run_dir, plan)
