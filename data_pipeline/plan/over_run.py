"""Estimate tokens and packs over a long run whose drop rate moves, from windows spread over it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.plan.arrays import Ints
from data_pipeline.plan.lane_packer import PackPlan
from data_pipeline.plan.lanes import Cursor
from data_pipeline.plan.packing import image_costs, pack_window
from data_pipeline.plan.plan import Plan

_STRETCHES = 64
"""Equal stretches of a run, of each of which one window is packed."""
_LEAST_WINDOW = 256


@dataclass(frozen=True)
class RunMeans:
    """Means over the images of a run, every view counted."""

    tokens_per_image: float
    images_per_pack: float


def drop_rate_moves(plan: Plan) -> bool:
    """Return whether an image has more or fewer tokens later in the run: a drop schedule is set."""
    config = plan.config
    rules = [config.drop, *([config.local.drop] if config.local.views else [])]
    return any(drop.schedule.kind != "none" for drop in rules)


def means_over_run(plan: Plan, images: float, *, num_images: int = 100_000) -> RunMeans:
    """Estimate the means over the first images of a run, within a few per cent.

    A pure function of the plan, and so the same on any number of ranks and at every start.

    Args:
        plan: the plan.
        images: number of images of the run over all ranks, views counted.
        num_images: number of images to plan for it, about.
    """
    views = plan.config.views_of_sample
    most = max(_LEAST_WINDOW, num_images // (_STRETCHES * views))
    tokens = packs = 0.0
    for stretch in range(_STRETCHES):
        start, stop = (images * end / _STRETCHES for end in (stretch, stretch + 1))
        of_image = _window(plan, stretch, start, stop, min(plan.config.pack_window, most))
        tokens += of_image.tokens_per_image / _STRETCHES
        packs += 1 / of_image.images_per_pack / _STRETCHES
    return RunMeans(tokens, 1 / packs)


def _window(plan: Plan, stretch: int, start: float, stop: float, most: int) -> RunMeans:
    """Pack a window of at most `most` samples, drawn as if they lay from `start` to `stop`.

    The samples are those with which a lane begins an epoch of the stretch's own number: sizes are
    drawn alike in all epochs, and draws of many are closer to the mean than those of one.
    """
    rules, mix = plan.rules, plan.lane_mix(stretch % plan.num_lanes).until(None)
    cursors = (Cursor(epoch=stretch),) * len(plan.sources)
    parts, packs = list[PackPlan](), list[Ints]()
    while not packs:  # a lane may have less than a pack of an epoch
        dealt, cursors = mix.deal(cursors, most)
        places = (np.arange(len(dealt.sample_ids)) + 0.5) / max(len(dealt.sample_ids), 1)
        seen = (start + (stop - start) * places).astype(np.int64)
        parts.append(plan.size_images(dealt.sample_ids, dealt.epochs, seen))
        images = PackPlan.concatenate(parts)
        lengths = rules.by_sample(images.lengths)
        costs = rules.by_sample(image_costs(images.lengths, rules.cost_dim))
        packs, left = pack_window(lengths, costs, rules.sample_limits, num_first=0, flush=False)
    total, packed = int(lengths.sum()), int(lengths.sum() - lengths[left].sum())
    # What is left over goes into packs that are as full as these.
    return RunMeans(total / len(images.lengths), len(images.lengths) / len(packs) * packed / total)
