"""Sampling of the token grid and the number of kept patches of an image, before any decode.

The distributions are NaViT's (Dehghani et al. 2023, arXiv 2307.06304, sections 2.1 and 3.2-3.4,
appendix B). Everything here is a pure function on arrays with one element for each image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
from scipy.special import betaincinv, expit, ndtr, ndtri

from data_pipeline.config import AugmentConfig, DropConfig, ResolutionConfig
from data_pipeline.plan.arrays import Bools, Floats, Ints

Drop = TypeVar("Drop", bound=DropConfig)

BETA_VARIANCE_SHARE = 0.3
"""sigma^2 = 0.3 mu (1 - mu) of the beta-distributed drop rate (NaViT, section 3.3)."""
RESOLUTION_DROP_SIGMA = 0.02
"""Spread of the resolution-dependent drop rate about its mean; rejected beyond 2 sigma."""


def sample_sides(
    config: ResolutionConfig, heights: Ints | Floats, widths: Ints | Floats, u: Floats
) -> Floats:
    """Return the side s of each image in pixels, [n]; it is resized to the area s * s.

    Args:
        config: the distribution of s.
        heights, widths: [n] sizes of the images, or of their crops, in pixels.
        u: [n] uniform draws in (0, 1).
    """
    low, high = float(config.min), float(config.max)
    if config.kind == "fixed":
        return np.full(len(u), high)
    if config.kind == "native":
        return np.minimum(np.sqrt(heights.astype(np.float64) * widths), high)
    if config.kind == "area":
        return np.sqrt(low**2 + u * (high**2 - low**2))
    if config.kind == "side":
        return low + u * (high - low)
    # N_t(-0.5, 1): a normal of mean -0.5 truncated to [-1, 1], rescaled to [min, max] (Fig. 7).
    below, above = ndtr(-1 + 0.5), ndtr(1 + 0.5)
    z = ndtri(below + u * (above - below)) - 0.5
    return np.asarray(low + (z + 1) / 2 * (high - low))


def token_grids(
    config: ResolutionConfig,
    heights: Ints | Floats,
    widths: Ints | Floats,
    u: Floats,
    *,
    patch_size: int,
    max_tokens: int,
) -> tuple[Ints, Ints, Bools]:
    """Return the grid (rows, columns) of patches each image is resized to.

    Both sides are rounded to whole patches, at least one, so each moves by at most half a patch. A
    grid above `max_tokens` is scaled down to fit, never truncated.

    Returns:
        rows [n], columns [n], and whether the image was scaled down to fit [n].
    """
    sides = sample_sides(config, heights, widths, u)
    if config.fit == "keep":
        scales = sides / np.sqrt(heights.astype(np.float64) * widths)
        scales = np.minimum(scales, config.max_upscale)
        rows = np.maximum(1, np.rint(heights * scales / patch_size)).astype(np.int64)
        columns = np.maximum(1, np.rint(widths * scales / patch_size)).astype(np.int64)
    else:
        if config.kind != "fixed":  # a model of one size needs that size for every image
            sides = np.minimum(sides, config.max_upscale * np.minimum(heights, widths))
        rows = np.maximum(1, np.rint(sides / patch_size)).astype(np.int64)
        columns = rows.copy()
    shrunk = rows * columns > max_tokens
    if shrunk.any():
        factor = np.sqrt(max_tokens / (rows[shrunk] * columns[shrunk]))
        small_rows = np.maximum(1, (rows[shrunk] * factor).astype(np.int64))
        small_columns = np.maximum(1, (columns[shrunk] * factor).astype(np.int64))
        # A side of one patch cannot shrink, so the other one does.
        rows[shrunk] = np.minimum(small_rows, max_tokens // np.minimum(small_columns, max_tokens))
        columns[shrunk] = np.minimum(small_columns, max_tokens // rows[shrunk])
    return rows, columns, shrunk


def keep_counts(
    config: DropConfig,
    resolution: ResolutionConfig,
    tokens: Ints,
    u: Floats,
    *,
    patch_size: int,
    seen: Ints | None = None,
) -> Ints:
    """Return the number of patches of each image that are kept, [n]: at least one, at most all.

    The rate becomes an integer here, once; packing and dropping both use this integer.

    Args:
        config: the distribution of the drop rate.
        resolution: the bounds of the side, which give the token range of kind `resolution`.
        tokens: [n] number of patches of each image.
        u: [n] uniform draws in (0, 1).
        patch_size: side of a patch in pixels.
        seen: [n] number of images dealt before each one, for a schedule (None: 0).
    """
    if config.kind == "none":
        return tokens.copy()
    rates = drop_rates(config, resolution, tokens, u, patch_size=patch_size, seen=seen)
    return np.clip(np.rint(tokens * (1 - rates)).astype(np.int64), 1, tokens)


def drop_rates(
    config: DropConfig,
    resolution: ResolutionConfig,
    tokens: Ints,
    u: Floats,
    *,
    patch_size: int,
    seen: Ints | None = None,
) -> Floats:
    """Return the share of patches to drop of each image, [n] in [0, 1) (NaViT, section 3.3).

    The arguments are those of `keep_counts`.
    """
    mean_rates = scheduled_rates(config, np.zeros_like(tokens) if seen is None else seen)
    if config.kind == "constant":
        return mean_rates
    if config.kind == "beta":
        # A mean of 0 (the low end of a schedule) is the limit in which nothing is dropped.
        mean = np.maximum(mean_rates / config.max, 1e-6)
        strength = 1 / BETA_VARIANCE_SHARE - 1
        return np.asarray(betaincinv(strength * mean, strength * (1 - mean), u)) * config.max
    fewest, most = ((side / patch_size) ** 2 for side in (resolution.min, resolution.max))
    position = np.clip((tokens - fewest) / max(most - fewest, 1.0), 0, 1)
    mean_rates = mean_rates + (position - 0.5) * (config.max - config.min)
    z = ndtri(ndtr(-2.0) + u * (ndtr(2.0) - ndtr(-2.0)))
    return np.asarray(np.clip(mean_rates + RESOLUTION_DROP_SIGMA * z, 0, 0.999))


def scheduled_rates(config: DropConfig, seen: Ints | Floats) -> Floats:
    """Return the mean drop rate at the n-th image of the run, n = `seen` ([n] each).

    Without a schedule it is `rate`; for kind resolution it is the middle of `min` and `max`.
    """
    schedule = config.schedule
    if schedule.kind == "none":
        still = (config.min + config.max) / 2 if config.kind == "resolution" else config.rate
        return np.full(len(seen), still)
    turned = expit((seen - schedule.middle) / schedule.width)
    return np.asarray(schedule.low + (schedule.high - schedule.low) * turned)


def at_highest_rate(config: Drop) -> Drop:
    """Return the drop config with the highest mean rate that its schedule gives in a run of any
    length, for all images alike."""
    schedule = config.schedule
    if schedule.kind == "none":
        return config
    falls = schedule.width < 0
    highest = float(scheduled_rates(config, np.zeros(1))[0]) if falls else schedule.high
    return replace(config, schedule=replace(schedule, low=highest, high=highest))


def crop_sides(config: AugmentConfig, u: Floats) -> Floats:
    """Return the share of each side that a crop keeps, [n]; its area is uniform in its range.

    `u` [n] are uniform draws in (0, 1).
    """
    return np.sqrt(config.crop_min_area + u * (config.crop_max_area - config.crop_min_area))


def decode_scales(
    heights: Ints | Floats, widths: Ints | Floats, rows: Ints, columns: Ints, patch_size: int
) -> Ints:
    """Return the largest JPEG reduction (1, 2, 4, 8) that covers the target on both sides, [n].

    libjpeg can decode at 1/2, 1/4 and 1/8 of the size, which is cheaper than decoding in full. The
    plan decides it, so that all code paths see the same pixels.

    Args:
        heights, widths: [n] sizes of the images, or of their crops, in pixels.
        rows, columns: [n] grids of patches to resize to.
        patch_size: side of a patch in pixels.
    """
    ratio = np.minimum(heights / (rows * patch_size), widths / (columns * patch_size))
    return np.select([ratio >= 8, ratio >= 4, ratio >= 2], [8, 4, 2], default=1).astype(np.int64)
