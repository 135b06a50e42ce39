"""X-axes of a report's charts: the step, tokens or images seen, or time."""

from __future__ import annotations

import numpy as np

from launch.report.logged_run import Floats, LoggedRun, Series
from zeta import metric_names as names

AXES = {
    "step": "step",
    "tokens": "tokens seen",
    "images": "images seen",
    "time": "seconds in training steps",
}
"""Label of each below a chart."""
_COUNTED = {"tokens": names.TOKENS_SEEN, "images": names.IMAGES_SEEN, "time": names.STEP_S}


def along(run: LoggedRun, axis: str, steps: Floats) -> Floats:
    """Return the positions of steps on an axis.

    Args:
        run: the run that the steps belong to.
        axis: one of AXES; all but `step` are interpolated between logged steps.
        steps: committed steps.

    Raises:
        ValueError: unknown axis, or the run did not log the metric of the axis.
    """
    if axis not in AXES:
        raise ValueError(f"the axis is {axis!r}; choose one of {', '.join(AXES)}")
    if axis == "step":
        return steps
    metric = _COUNTED[axis]
    logged = run.series.get(metric, Series(np.zeros(0), np.zeros(0))).finite
    if not len(logged.steps):
        raise ValueError(f"{run.path} did not log {metric}: choose another --axis than {axis}")
    reached = logged.values
    if axis == "time":
        reached = np.cumsum(np.diff(logged.steps, prepend=0.0) * logged.values)
    at: Floats = np.interp(steps, np.append(0.0, logged.steps), np.append(0.0, reached))
    return at
