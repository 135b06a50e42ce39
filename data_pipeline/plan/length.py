"""The length of a run that ends with its data, after `train.max_epochs`."""

from __future__ import annotations

from data_pipeline.plan.over_run import drop_rate_moves, means_over_run
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.summary import summarise

_EXACT_UP_TO = 100_000
"""Images up to which all epochs are planned, views counted: about a second."""


def planned_length(plan: Plan, unit: str, *, exact_up_to: int = _EXACT_UP_TO) -> int:
    """Return the length of a run by epochs, in steps, images or tokens over all ranks.

    Images that turn out not to decode are counted. Steps and tokens of a long run are estimated
    within a few per cent: from its first epoch, or, where a schedule moves the drop rate, from
    windows spread over the run. All of it is a pure function of the plan, and so the same on any
    number of ranks and at every start.

    Args:
        plan: the plan, with `max_epochs`.
        unit: one of "steps", "images" and "tokens".
        exact_up_to: number of images up to which steps and tokens are counted.
    """
    epochs = plan.max_epochs
    assert epochs is not None, "a plan without an end has no length"
    images = epochs * plan.num_images * plan.config.views_of_sample
    if unit == "images":
        return images
    if images > exact_up_to and drop_rate_moves(plan):
        means = means_over_run(plan, images, num_images=exact_up_to)
        if unit == "tokens":
            return round(images * means.tokens_per_image)
        return max(1, round(images / means.images_per_pack / plan.num_lanes))
    if images > exact_up_to:
        summary = summarise(plan, exact_up_to=exact_up_to)
        if unit == "tokens":
            return epochs * summary.tokens
        packs = summary.images * summary.views / summary.images_per_pack
        return max(1, round(epochs * packs / plan.num_lanes))
    steps = tokens = 0
    for index in range(plan.num_lanes):
        lane, packs_of_lane = plan.lane(index), 0
        while (pack := lane.next_pack()) is not None:
            packs_of_lane += 1
            tokens += int(pack.lengths.sum())
        steps = max(steps, packs_of_lane)
    return tokens if unit == "tokens" else steps
