"""Layouts of packs: rows, places and kept patches of all views at once."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from data_pipeline.loading.decode import mirrored
from data_pipeline.loading.layout import kept_patches
from data_pipeline.loading.recipe import ViewRecipe
from data_pipeline.plan.random_draws import hashes

VIEWS = [
    ViewRecipe(grid=(3, 4), keep=5, keep_key=2**64 - 1),
    ViewRecipe(grid=(2, 2), keep=4, keep_key=7),  # drops nothing
    ViewRecipe(grid=(9, 7), keep=1, keep_key=11),
    ViewRecipe(grid=(1, 6), keep=3, keep_key=11),
]


def test_a_view_keeps_the_same_patches_among_others_as_alone():
    together = kept_patches(VIEWS)
    for view, kept in zip(VIEWS, together, strict=True):
        (alone,) = kept_patches([view])
        assert kept.tolist() == alone.tolist()
        assert len(set(kept.tolist())) == view.keep


def test_the_kept_patches_are_those_of_the_lowest_words_of_the_key():
    for view, kept in zip(VIEWS, kept_patches(VIEWS), strict=True):
        words = hashes(np.uint64(view.keep_key), np.arange(view.grid[0] * view.grid[1]))
        assert kept.tolist() == sorted(np.argsort(words)[: view.keep].tolist())


@pytest.mark.parametrize("turned", [False, True])
def test_mirroring_reverses_the_columns_of_any_array_and_leaves_it_as_it_was(turned):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = image.swapaxes(0, 1) if turned else image
    before = image.copy()
    image.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(mirrored(image), before[:, ::-1])
    assert np.array_equal(image, before)
