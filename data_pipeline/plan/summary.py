"""The summary of an epoch of a plan in numbers: its steps, fill and balance."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from data_pipeline.plan.arrays import Floats
from data_pipeline.plan.lane_packer import LanePacker, PackPlan
from data_pipeline.plan.packing import image_costs
from data_pipeline.plan.plan import Plan
from zeta.packed import packs_per_rank

EXACT_UP_TO = 20_000_000
"""Number of images up to which a whole epoch is planned; above it, some windows of every lane."""
_SAMPLED_WINDOWS = 2


@dataclass(frozen=True)
class SourceSummary:
    """The summary of one weighted source."""

    name: str
    images: int
    weight: float
    epochs: float
    """Number of passes over this source while as many images are dealt as all sources hold."""


@dataclass(frozen=True)
class PlanSummary:
    """The summary of an epoch on W ranks: as many images as the shards hold."""

    images: int
    """Number of usable images, views not counted."""
    views: int
    """Number of views of each, local ones included; the numbers of images below count them."""
    tokens: int
    """Tokens of those images in the first epoch, after dropping."""
    packs: int
    """Number of packs that an epoch fills, without the empty packs of missing lanes."""
    steps_per_epoch: int
    fill: float
    """Tokens of images / budget, over the packs of all ranks, empty packs included."""
    images_per_pack: float
    drop_mean: float
    """Mean share of patches dropped, over images."""
    straggler_ratio: float
    """Largest cost of a rank / mean cost of the ranks, as a mean over steps."""
    approximate: bool
    """True if these numbers were estimated from some windows of every lane."""
    shrunk: int
    """Number of images made smaller than drawn because a pack cannot hold them."""
    rejected: dict[str, int]
    """Number of samples that are not planned, by reason."""
    short_lanes: int
    """Number of lanes whose epoch is smaller than one pack, so that their packs mix epochs."""
    sources: tuple[SourceSummary, ...]
    """The weighted sources; empty without weights."""


@dataclass
class _Totals:
    """Sums over the lanes that were planned."""

    images: int = 0
    """Images dealt, all views counted."""
    tokens: int = 0
    dropped: float = 0.0
    shrunk: int = 0
    packs: int = 0
    packed_tokens: int = 0
    costs: list[list[float]] = field(default_factory=list)
    """Costs of the packs, by lane."""
    lane_tokens: list[int] = field(default_factory=list)
    """Tokens dealt to each lane."""
    by_source: dict[int, int] = field(default_factory=dict)

    def add_dealt(self, plan: Plan, images: PackPlan) -> None:
        self.images += len(images.lengths)
        self.tokens += int(images.lengths.sum())
        self.dropped += float((1 - images.keep / (images.rows * images.columns)).sum())
        self.shrunk += int(images.shrunk.sum())
        if len(plan.sources) > 1:
            counts = np.bincount(plan.source_of(images.sample_ids))
            for source in np.flatnonzero(counts).tolist():
                self.by_source[source] = self.by_source.get(source, 0) + int(counts[source])

    def add_pack(self, plan: Plan, pack: PackPlan) -> None:
        self.packs += 1
        self.packed_tokens += int(pack.lengths.sum())
        self.costs[-1].append(float(image_costs(pack.lengths, plan.cost_dim).sum()))


def summarise(plan: Plan, world_size: int = 1, *, exact_up_to: int = EXACT_UP_TO) -> PlanSummary:
    """Plan the first epoch of every lane and summarise it for `world_size` ranks.

    Raises:
        ValueError: there are more ranks than lanes.
    """
    if world_size > plan.num_lanes:
        raise ValueError(f"world size {world_size} is above packs per step = {plan.num_lanes}")
    approximate = plan.num_images > exact_up_to
    totals = _Totals()
    for index in range(plan.num_lanes):
        _plan_lane(plan, plan.lane(index), totals, approximate)
    budget, images = plan.limits.token_budget, plan.num_images
    shown = images * plan.config.views_of_sample
    scale = shown / max(totals.images, 1)
    tokens = totals.tokens if scale == 1 else round(totals.tokens * scale)
    lane_fill = totals.packed_tokens / (totals.packs * budget)
    slots = packs_per_rank(plan.num_lanes, world_size) * world_size
    packs = tokens / (lane_fill * budget)
    # Lanes have equal shares of the tokens, so a lane with few tokens has a short epoch.
    lane_tokens = np.array(totals.lane_tokens) * (scale if approximate else 1)
    return PlanSummary(
        images=images,
        views=plan.config.views_of_sample,
        tokens=tokens,
        packs=max(1, round(packs)),
        steps_per_epoch=max(1, round(packs / plan.num_lanes)),
        fill=lane_fill * plan.num_lanes / slots,
        images_per_pack=shown / packs,
        drop_mean=totals.dropped / totals.images,
        straggler_ratio=_straggler_ratio(totals.costs, world_size),
        approximate=approximate,
        shrunk=round(totals.shrunk * scale),
        rejected=rejected_by_reason(plan),
        short_lanes=int((lane_tokens < budget).sum()),
        sources=_sources(plan, totals),
    )


def rejected_by_reason(plan: Plan, shards: slice = slice(None)) -> dict[str, int]:
    """Return the number of samples of some shards that are never planned, by reason."""
    missing = "no caption" if plan.config.require_captions else "no label"
    counts = {
        "unusable, see manifest_rejected.jsonl": plan.masses.bad[shards].sum(),
        missing: plan.masses.unlabelled[shards].sum(),
    }
    return {reason: int(count) for reason, count in counts.items() if count}


def _plan_lane(plan: Plan, lane: LanePacker, totals: _Totals, approximate: bool) -> None:
    """Plan the lane's share of an epoch; if `approximate`, only its first windows."""
    totals.costs.append([])
    before = totals.tokens
    share = -(-plan.num_images // plan.num_lanes)
    limit = min(share, _SAMPLED_WINDOWS * plan.config.pack_window) if approximate else share
    single = len(plan.sources) == 1

    def inside() -> bool:
        cursors = lane.cursors
        if single and (cursors[0].epoch or not approximate):
            return cursors[0].epoch == 0
        return sum(cursor.images for cursor in cursors) < limit

    while inside() and (pack := lane.next_pack()) is not None:
        totals.add_pack(plan, pack)
        totals.add_dealt(plan, pack.select(np.flatnonzero(pack.epochs == 0)) if single else pack)
    if lane.carry is not None:
        left = lane.carry
        totals.add_dealt(plan, left.select(np.flatnonzero(left.epochs == 0)) if single else left)
    totals.lane_tokens.append(totals.tokens - before)


def _sources(plan: Plan, totals: _Totals) -> tuple[SourceSummary, ...]:
    if len(plan.sources) == 1:
        return ()
    # Both counts of a source hold every view, so these cancel.
    scale = plan.num_images / totals.images
    result = []
    for index, source in enumerate(plan.sources):
        images = int(plan.masses.usable[source.first_shard : source.stop_shard].sum())
        epochs = totals.by_source.get(index, 0) * scale / images
        result.append(SourceSummary(source.name, images, source.weight, epochs))
    return tuple(result)


def _straggler_ratio(costs: list[list[float]], world_size: int) -> float:
    """Return max / mean of the ranks' costs, averaged over steps; lane i is on rank i mod W."""
    steps = max(1, min(map(len, costs)))
    grid: Floats = np.zeros((steps, len(costs)))
    for index, lane_costs in enumerate(costs):
        grid[: len(lane_costs), index] = lane_costs[:steps]
    ranks = np.stack([grid[:, rank::world_size].sum(axis=1) for rank in range(world_size)], axis=1)
    return float((ranks.max(axis=1) / ranks.mean(axis=1)).mean())
