"""What a report shows besides what the run wrote: a picture of a pack, and the sizes of images.

Both follow from the run's config and shards, and stay in its directory for when the shards are
gone.
"""

from __future__ import annotations

from launch.report.first_pack import draw_first_pack, plan_of
from launch.report.record import read_run
from launch.report.summary import last_value
from launch.report.view_sizes import write_shown_sizes
from zeta import metric_names as names
from zeta.run.directory import RunDir


def write_report_inputs(run_dir: RunDir) -> None:
    """Write pack.svg, unless it is there, and sizes.json.

    Raises:
        ValueError: not a run that has logged anything, or its config or shards are gone or changed.
        OSError: its shards, or its directory, cannot be reached.
    """
    seen = last_value(read_run(run_dir.path), names.IMAGES_SEEN)
    plan = plan_of(run_dir)
    write_shown_sizes(run_dir, plan, int(seen or 0))
    if not run_dir.pack_picture.exists():
        draw_first_pack(run_dir, plan)
