"""Results as aligned lines for people; the machine-readable forms are the commands' --json."""

from __future__ import annotations

from typing import Any

from data_pipeline.plan_summary import PlanSummary


def plan_table(summary: PlanSummary, world_size: int) -> list[str]:
    """Return the lines of `zeta data plan`."""
    rows = (
        ("images", f"{summary.images:,}"),
        ("tokens", f"{summary.tokens:,}"),
        ("packs", f"{summary.packs:,}  ({summary.images_per_pack:.1f} images each)"),
        ("steps an epoch", f"{summary.steps_per_epoch:,}"),
        ("fill", f"{summary.fill:.2%} of the token budget"),
        ("dropped patches", f"{summary.drop_mean:.1%} on average"),
        ("straggler ratio", f"{summary.straggler_ratio:.3f} on {world_size} ranks"),
    )
    return [f"{label:<18}{value}" for label, value in rows]


def accuracy_table(result: dict[str, Any]) -> list[str]:
    """Return the lines of `zeta eval`, from the result of `launch.evaluate.evaluate_export`."""
    lines = [f"{'resolution':<12}{'images':>8}{'top-1':>9}{'top-5':>9}"]
    for name, row in result["by_resolution"].items():
        lines.append(f"{name:<12}{row['images']:>8,}{row['top1']:>9.2%}{row['top5']:>9.2%}")
    rejected = next(iter(result["by_resolution"].values()))["rejected"]
    if rejected:
        lines.append(f"{rejected:,} images could not be decoded and are not counted")
    return lines
