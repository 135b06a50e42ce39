"""Prints the statistics of shards as lines with bars, and draws their histograms to a PNG."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.shards.stats import Histogram, ShardStats

_BAR = 40
_UNBOUNDED = 60_000
"""Upper edges above this are printed as "and more"."""


def stats_lines(stats: ShardStats) -> list[str]:
    """Return the lines that `zeta shards stats` prints."""
    classes = "no class map" if stats.classes is None else f"{stats.classes:,} classes"
    rows = [
        ("images", f"{stats.images:,} in {stats.shards:,} shards, {stats.nbytes / 1e9:,.3g} GB"),
        ("labelled", f"{stats.labelled:,} ({classes})"),
        ("with a caption", f"{stats.captioned:,}"),
        ("formats", ", ".join(f"{count:,} {name}" for name, count in stats.formats.items())),
        ("rejected", f"{stats.rejected:,}"),
        *(("", f"{count:,} x {reason}") for reason, count in stats.rejected_reasons.items()),
    ]
    lines = [f"{label:<18}{value}".rstrip() for label, value in rows]
    names = ("min", "p05", "median", "mean", "p95", "max")
    lines += ["", f"{'':<18}" + "".join(f"{name:>11}" for name in names)]
    for label, values in (
        ("bytes a sample", stats.sample_bytes),
        ("height", stats.height),
        ("width", stats.width),
        (f"tokens at {stats.patch_size}", stats.tokens),
    ):
        lines.append(f"{label:<18}" + "".join(f"{values[name]:>11,.0f}" for name in names))
    for histogram in stats.histograms:
        lines += ["", histogram.name, *_bars(histogram)]
    return lines


def _bars(histogram: Histogram) -> Iterator[str]:
    """Yield a line for each bin, leaving out empty bins at both ends."""
    most, total = max(histogram.counts), sum(histogram.counts)
    for label, count in _bins(histogram):
        bar = "#" * max(1, round(_BAR * count / most)) if count else ""
        yield f"  {label:>16}{count:>12,}{count / total:>8.1%}  {bar}".rstrip()


def _bins(histogram: Histogram) -> list[tuple[str, int]]:
    filled = [number for number, count in enumerate(histogram.counts) if count]
    bins = []
    for number in range(filled[0], filled[-1] + 1):
        low, high = histogram.edges[number : number + 2]
        label = f"{low:g} and more" if high > _UNBOUNDED else f"{low:g} to {high:g}"
        bins.append((label, histogram.counts[number]))
    return bins


def draw_histograms(stats: ShardStats, path: str) -> None:
    """Draw the histograms side by side to a PNG.

    Raises:
        ValueError: `path` does not end in .png.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    if not path.lower().endswith(".png"):
        raise ValueError(f"--png is {path!r}: give the name of a .png file")
    figure = Figure(figsize=(5 * len(stats.histograms), 4), layout="constrained")
    for axes, histogram in zip(
        figure.subplots(1, len(stats.histograms)), stats.histograms, strict=True
    ):
        labels, counts = zip(*_bins(histogram), strict=True)
        axes.barh(range(len(labels)), counts, color="#3b6ea8")
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("images")
        axes.set_title(histogram.name)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, format="png")
