"""What an epoch of a plan looks like in numbers: the fill, the balance, how many steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.manifest import SampleFlag
from data_pipeline.packing import image_costs
from data_pipeline.plan import Plan

_CHUNK = 1 << 18


@dataclass(frozen=True)
class PlanSummary:
    """An epoch of a plan on W ranks."""

    images: int
    """Usable images of the shards: each is dealt once an epoch."""
    tokens: int
    """Tokens of those images in the first epoch, after dropping."""
    packs: int
    """Packs that an epoch fills, empty ones of missing lanes not counted."""
    steps_per_epoch: int
    fill: float
    """Tokens of images / budget, over the packs of all ranks: every padded token counts."""
    images_per_pack: float
    drop_mean: float
    """Mean over images of the share of patches dropped."""
    straggler_ratio: float
    """Mean over steps of the largest cost of a rank / the mean cost of the ranks."""


def summarise(plan: Plan, world_size: int = 1) -> PlanSummary:
    """Plan the first epoch of every lane and summarise it for `world_size` ranks.

    Raises:
        ValueError: more ranks than lanes.
    """
    if world_size > plan.num_lanes:
        raise ValueError(f"world size {world_size} is above packs per step = {plan.num_lanes}")
    images, tokens, drop_mean = _epoch_totals(plan)
    costs, packed_tokens, packed_images = [], 0, 0
    for index in range(plan.num_lanes):
        lane, lane_costs = plan.lane(index), list[float]()
        while lane.state.cursor.epoch == 0 and (pack := lane.next_pack()) is not None:
            lane_costs.append(float(image_costs(pack.lengths, plan.cost_dim).sum()))
            packed_tokens += int(pack.lengths.sum())
            packed_images += len(pack.lengths)
        costs.append(lane_costs)
    packs = sum(map(len, costs))
    lane_fill = packed_tokens / (packs * plan.limits.token_budget)
    slots = -(-plan.num_lanes // world_size) * world_size
    tokens_per_step = lane_fill * plan.limits.token_budget * plan.num_lanes
    return PlanSummary(
        images=images,
        tokens=tokens,
        packs=round(tokens / (lane_fill * plan.limits.token_budget)),
        steps_per_epoch=max(1, round(tokens / tokens_per_step)),
        fill=lane_fill * plan.num_lanes / slots,
        images_per_pack=packed_images / packs,
        drop_mean=drop_mean,
        straggler_ratio=_straggler_ratio(costs, world_size),
    )


def _epoch_totals(plan: Plan) -> tuple[int, int, float]:
    """Return usable images, their tokens and their mean drop rate in epoch 0, chunk by chunk."""
    samples = plan.manifest.samples
    images, tokens, dropped = 0, 0, 0.0
    for start in range(0, len(samples), _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, len(samples)))
        ids = ids[(samples["flags"][ids] & SampleFlag.BAD) == 0]
        sized = plan.size_images(ids, np.zeros(len(ids), dtype=np.int64))
        images += len(ids)
        tokens += int(sized.lengths.sum())
        dropped += float((1 - sized.keep / (sized.rows * sized.columns)).sum())
    return images, tokens, dropped / images


def _straggler_ratio(costs: list[list[float]], world_size: int) -> float:
    """Return mean over steps of max / mean of the ranks' costs; lane i is on rank i mod W."""
    steps = max(1, min(map(len, costs)))
    grid: NDArray[np.float64] = np.zeros((steps, len(costs)))
    for index, lane_costs in enumerate(costs):
        grid[: len(lane_costs), index] = lane_costs[:steps]
    ranks = np.stack([grid[:, rank::world_size].sum(axis=1) for rank in range(world_size)], axis=1)
    return float((ranks.max(axis=1) / ranks.mean(axis=1)).mean())
