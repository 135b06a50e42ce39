"""Statistics of indexed shards from the manifest alone: counts, sizes, histograms."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.manifest import ImageFormat, Manifest, SampleFlag

_CHUNK = 1 << 20
SIDE_EDGES = (0, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 65536)
ASPECT_EDGES = (0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0, 1.143, 1.333, 1.6, 2.0, 4.0, 1e9)
TOKEN_EDGES = (0, 16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 16384, 2**40)


@dataclass(frozen=True)
class Histogram:
    """Counts of images by a quantity; bin i has the values in [edges[i], edges[i + 1])."""

    name: str
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class ShardStats:
    """The statistics of the shards of a spec."""

    shards: int
    nbytes: int
    images: int
    """Number of usable images."""
    rejected: int
    rejected_reasons: dict[str, int]
    """Number of samples by reason, for the most frequent reasons."""
    labelled: int
    """Number of usable images with a label, or with a list of labels."""
    captioned: int
    """Number of usable images with a caption."""
    classes: int | None
    """Number of named classes; None without a class map."""
    formats: dict[str, int]
    """Number of usable images by format."""
    sample_bytes: dict[str, float]
    """Quantiles (min, p05, median, p95, max) and mean of the bytes of a sample."""
    height: dict[str, float]
    """Quantiles and mean of the height in pixels."""
    width: dict[str, float]
    """Quantiles and mean of the width in pixels."""
    tokens: dict[str, float]
    """Quantiles and mean of the tokens of whole images at native size (patches of `patch_size`)."""
    patch_size: int
    histograms: tuple[Histogram, ...]
    """Histograms of side (square root of the area), aspect ratio (width / height) and tokens."""


def shard_stats(manifest: Manifest, patch_size: int = 16) -> ShardStats:
    """Return the statistics of a manifest; images are not read.

    Args:
        manifest: a manifest with at least one usable image.
        patch_size: side in pixels of the patches that are counted as tokens.
    """
    columns = _columns(manifest, patch_size)
    flags = columns["flags"]
    usable = (flags & SampleFlag.BAD) == 0
    of_usable = {name: values[usable] for name, values in columns.items()}
    reasons = Counter(rejection.reason for rejection in manifest.rejections())
    heights, widths = of_usable["height"].astype(float), of_usable["width"].astype(float)
    formats = np.bincount(of_usable["format"], minlength=len(ImageFormat))
    return ShardStats(
        shards=len(manifest.shards),
        nbytes=sum(shard.nbytes for shard in manifest.shards),
        images=int(usable.sum()),
        rejected=int((~usable).sum()),
        rejected_reasons=dict(reasons.most_common(10)),
        labelled=int(((of_usable["flags"] & SampleFlag.LABELLED) != 0).sum()),
        captioned=int(((of_usable["flags"] & SampleFlag.CAPTIONED) != 0).sum()),
        classes=None if manifest.class_names is None else len(manifest.class_names),
        formats={f.name.lower(): int(formats[f]) for f in ImageFormat if formats[f]},
        sample_bytes=_quantiles(of_usable["nbytes"]),
        height=_quantiles(heights),
        width=_quantiles(widths),
        tokens=_quantiles(of_usable["tokens"]),
        patch_size=patch_size,
        histograms=(
            _histogram("side in pixels", np.sqrt(heights * widths), SIDE_EDGES),
            _histogram("width / height", widths / heights, ASPECT_EDGES),
            _histogram(f"tokens of {patch_size} x {patch_size}", of_usable["tokens"], TOKEN_EDGES),
        ),
    )


def _columns(manifest: Manifest, patch_size: int) -> dict[str, NDArray[np.int64]]:
    """Return the needed columns, read from the mapped file in chunks."""
    names = ("nbytes", "height", "width", "format", "flags")
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in (*names, "tokens")}
    for start in range(0, len(manifest.samples), _CHUNK):
        rows = manifest.samples[start : start + _CHUNK]
        for name in names:
            parts[name].append(rows[name].astype(np.int64))
        sides = (np.maximum(1, np.rint(rows[side] / patch_size)) for side in ("height", "width"))
        parts["tokens"].append(np.multiply(*sides).astype(np.int64))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _quantiles(values: NDArray[np.int64] | NDArray[np.float64]) -> dict[str, float]:
    points = np.quantile(values, (0, 0.05, 0.5, 0.95, 1)).tolist()
    names = ("min", "p05", "median", "p95", "max")
    return dict(zip(names, points, strict=True)) | {"mean": float(values.mean())}


def _histogram(
    name: str, values: NDArray[np.int64] | NDArray[np.float64], edges: tuple[float, ...]
) -> Histogram:
    counts = np.histogram(values, edges)[0]
    return Histogram(name, edges, tuple(counts.tolist()))
