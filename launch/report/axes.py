"""What the charts of a report run along: the step, tokens or images seen, or time."""

from __future__ import annotations

import numpy as np

from launch.report.record import Floats, RunRecord, Series
from zeta import metric_names as names

AXES = {
    "step": "step",
    "tokens": "tokens seen",
    "images": "images seen",
    "time": "seconds in training steps",
}
"""What each is called below a chart."""
_COUNTED = {"tokens": names.TOKENS_SEEN, "images": names.IMAGES_SEEN, "time": names.STEP_S}


def along(run: RunRecord, axis: str, steps: Floats) -> Floats:
    """Return where steps of a run lie on an axis.

    Args:
        run: whose steps they are.
        axis: one of AXES; between two logged steps the others grow evenly.
        steps: committed steps.

    Raises:
        ValueError: no such axis, or the run did not log what it takes.
    """
    if axis not in AXES:
        raise ValueError(f"the axis is {axis!r}; choose one of {', '.join(AXES)}")
    if axis == "step":
        return steps
    metric = _COUNTED[axis]
    logged = run.series.get(metric, Series(np.zeros(0), np.zeros(0))).finite
    if not len(logged.steps):
        raise ValueError(f"{run.path} logged no {metric}: draw along another axis than {axis}")
    reached = logged.values
    if axis == "time":
        reached = np.cumsum(np.diff(logged.steps, prepend=0.0) * logged.values)
    at: Floats = np.interp(steps, np.append(0.0, logged.steps), np.append(0.0, reached))
    return at
