"""Sizes and drop rates follow NaViT's formulas."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from data_pipeline.config import DropConfig, ResolutionConfig
from data_pipeline.plan.sampling import (
    decode_scales,
    drop_rates,
    keep_counts,
    sample_sides,
    token_grids,
)

N = 100_000
U = (np.arange(N) + 0.5) / N  # every quantile once: moments without sampling noise


def sides(kind: str, low: int, high: int) -> np.ndarray:
    big = np.full(N, 1000)
    return sample_sides(ResolutionConfig(kind, low, high), big, big, U)


def test_side_is_uniform_and_area_is_uniform_in_area():
    assert sides("side", 64, 256).mean() == pytest.approx(160, rel=1e-3)
    assert (sides("area", 64, 256) ** 2).mean() == pytest.approx((64**2 + 256**2) / 2, rel=1e-3)


def test_side_normal_is_the_truncated_normal_of_the_paper():
    expected = stats.truncnorm(-0.5, 1.5, loc=-0.5)
    drawn = sides("side_normal", 64, 384)
    assert drawn.min() >= 64
    assert drawn.max() <= 384
    assert drawn.mean() == pytest.approx(64 + (expected.mean() + 1) / 2 * 320, rel=1e-3)
    assert drawn.std() == pytest.approx(expected.std() / 2 * 320, rel=1e-3)


def test_native_keeps_the_size_below_the_cap():
    config = ResolutionConfig("native", 1, 512)
    rows, columns, _ = token_grids(
        config, np.array([320, 2000]), np.array([160, 1000]), np.zeros(2), patch_size=16,
        max_tokens=10**6,
    )  # fmt: skip
    assert (rows[0], columns[0]) == (20, 10)
    assert rows[1] * columns[1] == pytest.approx((512 / 16) ** 2, rel=0.05)
    assert rows[1] / columns[1] == pytest.approx(2, rel=0.05)


def test_images_are_not_enlarged_beyond_max_upscale():
    small = np.array([32]), np.array([64]), np.array([0.5])
    for factor, expected in ((1.0, (2, 4)), (2.0, (4, 8))):
        config = ResolutionConfig("fixed", 256, 256, max_upscale=factor)
        rows, columns, _ = token_grids(config, *small, patch_size=16, max_tokens=4096)
        assert (rows[0], columns[0]) == expected


@pytest.mark.parametrize("kind", ["area", "side", "side_normal", "native"])
@pytest.mark.parametrize("fit", ["crop", "squash"])
def test_squares_are_not_enlarged_beyond_max_upscale_either(kind: str, fit: str):
    config = ResolutionConfig(kind, 200, 512, fit=fit, max_upscale=1.5)
    heights, widths = np.full(99, 96), np.full(99, 480)
    u = np.linspace(0.01, 0.99, 99)
    rows, columns, _ = token_grids(config, heights, widths, u, patch_size=16, max_tokens=4096)
    assert (rows == 9).all()  # 1.5 x 96 pixels
    assert (columns == 9).all()


@pytest.mark.parametrize(("height", "width"), [(4000, 3000), (16, 65_000), (65_000, 16), (1, 1)])
def test_an_image_above_the_budget_is_scaled_down_to_fit(height: int, width: int):
    config = ResolutionConfig("native", 1, 100_000)
    rows, columns, shrunk = token_grids(
        config, np.array([height]), np.array([width]), np.zeros(1), patch_size=16, max_tokens=256
    )
    assert 1 <= rows[0] * columns[0] <= 256
    assert shrunk[0] == (height * width > 16)
    if height == 4000:
        assert rows[0] * columns[0] > 220
        assert rows[0] / columns[0] == pytest.approx(4 / 3, rel=0.1)


def test_crop_and_squash_make_squares_of_the_drawn_side():
    config = ResolutionConfig("fixed", 1, 224, fit="crop")
    rows, columns, _ = token_grids(
        config,
        np.array([50, 3000]),
        np.array([80, 200]),
        np.zeros(2),
        patch_size=14,
        max_tokens=999,
    )
    assert rows.tolist() == columns.tolist() == [16, 16]


def test_beta_drop_has_the_paper_mean_and_variance():
    rates = drop_rates(
        DropConfig("beta", rate=0.5, max=0.8), ResolutionConfig(), np.full(N, 100), U, patch_size=16
    )
    mean = 0.5 / 0.8
    assert rates.mean() == pytest.approx(0.5, abs=1e-3)
    assert (rates / 0.8).var() == pytest.approx(0.3 * mean * (1 - mean), rel=1e-2)
    assert rates.min() >= 0
    assert rates.max() <= 0.8


def test_resolution_drop_rises_with_the_tokens_and_stays_within_two_sigma():
    config = DropConfig("resolution", min=0.1, max=0.9)
    resolution = ResolutionConfig("side", 64, 256)
    for tokens, mean in ((16, 0.1), (136, 0.5), (256, 0.9)):
        rates = drop_rates(config, resolution, np.full(N, tokens), U, patch_size=16)
        assert rates.mean() == pytest.approx(mean, abs=1e-3)
        assert np.abs(rates - mean).max() <= 0.04 + 1e-9


def test_at_least_one_patch_and_at_most_all_are_kept():
    tokens = np.arange(1, 200)
    kept = keep_counts(
        DropConfig("constant", rate=0.99), ResolutionConfig(), tokens, tokens * 0.0, patch_size=16
    )
    assert kept.min() == 1
    none = keep_counts(DropConfig(), ResolutionConfig(), tokens, tokens * 0.0, patch_size=16)
    assert (none == tokens).all()


def test_decode_scale_never_goes_below_the_target():
    heights, widths = np.array([1600, 1600, 300, 20]), np.array([1200, 170, 300, 20])
    scales = decode_scales(
        heights, widths, np.array([10, 10, 10, 2]), np.array([10, 10, 10, 2]), 16
    )
    assert scales.tolist() == [4, 1, 1, 1]
