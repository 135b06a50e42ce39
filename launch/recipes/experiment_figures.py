"""The figures of `zeta experiment`: accuracy against compute, and against test resolution."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from launch.config.load import ZetaConfig
from launch.report.size_charts import side_of
from launch.report.svg_charts import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#2463c4", "#b8540a", "#17734f", "#8a3fa8")
_TERA = 1e12


@dataclass(frozen=True)
class Arm:
    """One way to show the images, with one seed."""

    name: str
    seed: int
    config: ZetaConfig
    totals: tuple[float, ...]
    """Floating-point operations of training, up to and including each step."""

    @property
    def flops(self) -> float:
        """Floating-point operations of the whole run."""
        return self.totals[-1]

    @property
    def title(self) -> str:
        """Name in the figures."""
        resolution = self.config.data.resolution
        if resolution.kind == "fixed":
            return f"ViT, {resolution.max} x {resolution.max} pixels"
        return f"NaViT, {resolution.min} to {resolution.max} pixels, patches dropped"


@dataclass(frozen=True)
class TrainedArm:
    """An arm after training, with its scores."""

    arm: Arm
    images_seen: int
    tokens_seen: int
    train_seconds: float
    """Sum of the step times."""
    top1_by_flops: list[tuple[float, float]]
    """(operations so far, top-1 at the arm's own size) of each evaluation in training."""
    top1_by_resolution: dict[str, float]
    val_images: int

    def to_json(self) -> dict[str, Any]:
        """Return the row of result.json."""
        return {
            "arm": self.arm.name,
            "seed": self.arm.seed,
            "steps": len(self.arm.totals),
            "flops": self.arm.flops,
            "images_seen": self.images_seen,
            "tokens_seen": self.tokens_seen,
            "train_seconds": round(self.train_seconds, 1),
            "val_images": self.val_images,
            "top1_by_flops": [[flops, round(top1, 4)] for flops, top1 in self.top1_by_flops],
            "top1_by_resolution": {
                name: round(top1, 4) for name, top1 in self.top1_by_resolution.items()
            },
        }


def by_arm(trained: Sequence[TrainedArm]) -> list[list[TrainedArm]]:
    """Return the runs of each arm, in the order of their first ones."""
    order = list(dict.fromkeys(row.arm.name for row in trained))
    return [[row for row in trained if row.arm.name == name] for name in order]


def results_table(trained: Sequence[TrainedArm]) -> list[str]:
    """Return the table that the command prints last; values are means over seeds."""
    resolutions = list(trained[0].top1_by_resolution)
    head = "".join(f"{name:>8}" for name in resolutions)
    lines = [f"top-1 at{'':<24}{'TFLOP':>8}{'images':>9}{head}"]
    for runs in by_arm(trained):
        scores = "".join(
            f"{percent(mean(run.top1_by_resolution[name] for run in runs)):>8}"
            for name in resolutions
        )
        tera, images = runs[0].arm.flops / _TERA, round(mean(run.images_seen for run in runs))
        lines.append(f"{runs[0].arm.name:<32}{tera:>8.2f}{images:>9,}{scores}")
    return lines


def draw_experiment(trained: Sequence[TrainedArm]) -> bytes:
    """Return both charts as PNG: means over seeds as lines, each run as points."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9.0, "axes.spines.top": False}):
        figure = Figure(figsize=(9.0, 3.9), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=False)
        for runs, colour in zip(by_arm(trained), _COLOURS, strict=False):
            _draw_compute(left, runs, colour)
            _draw_resolution(right, runs, colour)
        left.set_title("At the size of training, as it trains", fontsize=10)
        left.set_xlabel("training compute, TFLOP")
        left.set_ylabel("top-1 on held-out images")
        right.set_title("At other sizes, after equal compute", fontsize=10)
        right.set_xlabel("side of the test image, pixels")
        for axes in (left, right):
            axes.spines["right"].set_visible(False)
            axes.grid(axis="y", color="#e3e8ee")
            axes.yaxis.set_major_formatter(lambda value, _: percent(value))
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        target = io.BytesIO()
        figure.savefig(target, dpi=110, format="png", metadata={"Software": None})
    return target.getvalue()


def _draw_compute(axes: Axes, runs: Sequence[TrainedArm], colour: str) -> None:
    """Draw top-1 over operations; the runs of an arm are evaluated at the same steps."""
    curves = [run.top1_by_flops for run in runs]
    points = min(map(len, curves))
    x = [mean(curve[point][0] for curve in curves) / _TERA for point in range(points)]
    y = [mean(curve[point][1] for curve in curves) for point in range(points)]
    axes.plot(x, y, color=colour)
    for curve in curves:
        axes.plot(*zip(*((flops / _TERA, top1) for flops, top1 in curve), strict=True),
                  ".", color=colour, markersize=4, alpha=0.5)  # fmt: skip


def _draw_resolution(axes: Axes, runs: Sequence[TrainedArm], colour: str) -> None:
    """Draw top-1 over the side of the test image."""
    names = [name for name in runs[0].top1_by_resolution if side_of(name) is not None]
    sides = [side_of(name) or 0.0 for name in names]
    scores = [[run.top1_by_resolution[name] for run in runs] for name in names]
    axes.plot(sides, [mean(each) for each in scores], color=colour, label=runs[0].arm.title)
    for side, each in zip(sides, scores, strict=True):
        axes.plot([side] * len(each), each, ".", color=colour, markersize=4, alpha=0.5)
    axes.set_xticks(sides)
