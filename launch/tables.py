"""Results as aligned lines for people; the machine-readable forms are the commands' --json."""

from __future__ import annotations

from typing import Any

from data_pipeline.bench import BenchResult
from data_pipeline.config import DataConfig
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.summary import PlanSummary
from zeta.packed import packs_per_rank

_NEARLY_FULL = 0.98
_COUNT_BINDS = 0.95
"""Share of data.max_images_per_pack above which that limit, not the token budget, ends packs."""

_ALONE = 1.02
"""Images of a pack up to which nearly all packs hold one: a mean may be an estimate."""


def plan_table(summary: PlanSummary, num_lanes: int, world_size: int) -> list[str]:
    """Return the lines of `zeta data plan`, of `num_lanes` packs a step on `world_size` ranks."""
    about = "~" if summary.approximate else ""
    rows = [
        ("images", f"{summary.images:,}"),
        *([("views of each", f"{summary.views}")] if summary.views > 1 else []),
        ("tokens", f"{about}{summary.tokens:,}"),
        ("packs", f"{about}{summary.packs:,}  ({summary.images_per_pack:.1f} images each)"),
        ("images a step", f"{about}{num_lanes * summary.images_per_pack:,.0f} (the batch size)"),
        ("steps an epoch", f"{about}{summary.steps_per_epoch:,}"),
        ("fill", f"{about}{summary.fill:.2%} of the token budget"),
        (
            "dropped patches",
            f"{about}{summary.drop_mean:.1%} on average, by data.drop",
        ),
        (
            "straggler ratio",
            f"{about}{summary.straggler_ratio:.3f} on {world_size} ranks (work of the slowest / "
            "mean: 1 is even)",
        ),
    ]
    rows += [
        ("source", f"{source.name}: {source.images:,} images, {about}{source.epochs:.3g} times")
        for source in summary.sources
    ]
    if summary.shrunk:
        rows.append(("shrunk", f"{about}{summary.shrunk:,} images, to fit into one pack"))
    rows += [("not used", f"{count:,} ({why})") for why, count in summary.rejected.items()]
    return [f"{label:<18}{value}" for label, value in rows]


def plan_warnings(summary: PlanSummary, plan: Plan, world_size: int) -> list[str]:
    """Return warnings about a plan that works but wastes something."""
    warnings, num_lanes, most = [], plan.num_lanes, plan.config.max_images_per_pack
    room = most // summary.views * summary.views  # all views of an image lie in one pack
    if summary.fill < _NEARLY_FULL and summary.images_per_pack > _COUNT_BINDS * room:
        warnings.append(
            f"packs are {summary.fill:.1%} full because they reach data.max_images_per_pack = "
            f"{most} images: raise it to {round(1.1 * most / summary.fill)}"
        )
    if summary.short_lanes:
        warnings.append(
            f"the data set is smaller than one step ({summary.short_lanes} of {num_lanes} packs "
            "are not filled by an epoch), so packs mix epochs: lower train.packs_per_step or "
            "data.token_budget"
        )
    if (unmixed := mix_warning(plan.config, summary.images_per_pack)) is not None:
        warnings.append(unmixed)
    slots = packs_per_rank(num_lanes, world_size) * world_size
    if slots - num_lanes > 0.1 * slots:
        warnings.append(
            f"{slots - num_lanes} of {slots} packs a step are empty on {world_size} ranks: choose "
            f"a world size that divides train.packs_per_step = {num_lanes}"
        )
    return warnings


def mix_warning(config: DataConfig, images_per_pack: float) -> str | None:
    """Return a warning if packs hold no other image for `data.mix` to mix in; else None.

    Args:
        config: `data.*`.
        images_per_pack: mean or most images of a pack, every view counted.
    """
    views = config.views_of_sample
    most = config.max_images_per_pack // views * views
    if not config.mix.mixes_any or min(images_per_pack, most) > _ALONE * views:
        return None
    larger = "data.token_budget"
    if config.max_images_per_pack < 2 * views:
        larger = f"data.max_images_per_pack = {config.max_images_per_pack} to {2 * views} or more"
    of_views = "" if views == 1 else f", in {views} views"
    return (
        f"data.mix mixes nothing: each image is mixed with the next one of its pack, and a pack "
        f"holds one{of_views}: raise {larger}"
    )


def accuracy_table(result: dict[str, Any]) -> list[str]:
    """Return the lines of `zeta eval`, from the result of `run_evaluation`."""
    sizes = dict(result["by_resolution"])
    sizes |= {f"{budget} tokens": row for budget, row in result.get("by_tokens", {}).items()}
    on_features = {"knn": "k-NN", "linear_probe": "linear probe"}
    rows = sizes | {label: result[name] for name, label in on_features.items() if name in result}
    groups = {"by_aspect_ratio": "width:height", "by_image_side": "side of"}
    for key, title in groups.items():
        if len(result.get(key, {})) > 1:
            rows |= {f"{title} {name}": row for name, row in result[key].items()}
    width = max(12, *(len(name) + 2 for name in rows))
    lines = [f"{'size':<{width}}{'images':>8}{'top-1':>9}{'top-5':>9}{'loss':>9}"]
    for name, row in rows.items():
        loss = f"{row['loss']:>9.4f}" if "loss" in row else ""
        lines.append(
            f"{name:<{width}}{row['images']:>8,}{row['top1']:>9.2%}{row['top5']:>9.2%}{loss}"
        )
    lines += [f"{name}: {words}" for name, words in result.get("sizes", {}).items()]
    rejected = next(iter(sizes.values()))["rejected"] if sizes else 0
    if rejected:
        lines.append(f"{rejected:,} images could not be used and are not counted")
    return lines


def bench_table(result: BenchResult) -> list[str]:
    """Return the lines of `zeta data bench`."""
    rows = [
        ("shards to packs", f"{result.images_per_s:,.0f} images/s, {result.workers} workers"),
        ("bare decoding", f"{result.decode_bound_images_per_s:,.0f} images/s, as many processes"),
        ("ratio", f"{result.efficiency:.1%}, by CPU time {result.cpu_efficiency:.1%}"),
        ("queue", f"{result.stages['queue_occupancy']:.0%} ready when a pack is asked for"),
    ]
    names = {"process": "training process", "plan": "planning", "wait": "waiting"}
    names |= {"read": "reading", "decode": "decoding", "pack": "packing"}
    for stage in names:
        time = f"{result.stages[f'{stage}_ms']:.3f} ms an image"
        rows.append((names[stage], time))
    return [f"{label:<18}{value}" for label, value in rows]
