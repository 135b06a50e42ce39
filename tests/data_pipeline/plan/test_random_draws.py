"""Draws depend on what they are for, and on nothing else."""

from __future__ import annotations

import numpy as np

from data_pipeline.plan.random_draws import Draw, mix64, sample_uniforms, stream_key


def test_a_draw_does_not_depend_on_which_other_samples_are_asked_for():
    ids = np.arange(1000)
    epochs = np.repeat([0, 3], 500)
    together = sample_uniforms(Draw.RESOLUTION, 7, epochs, ids)
    alone = sample_uniforms(Draw.RESOLUTION, 7, epochs[[612]], ids[[612]])
    assert together[612] == alone[0]


def test_purposes_seeds_and_epochs_draw_independently():
    ids, epoch = np.arange(20_000), np.zeros(20_000, dtype=np.int64)
    base = sample_uniforms(Draw.RESOLUTION, 0, epoch, ids)
    for other in (
        sample_uniforms(Draw.DROP_RATE, 0, epoch, ids),
        sample_uniforms(Draw.RESOLUTION, 1, epoch, ids),
        sample_uniforms(Draw.RESOLUTION, 0, epoch + 1, ids),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.03


def test_draws_are_uniform():
    draws = sample_uniforms(
        Draw.RESOLUTION, 5, np.zeros(100_000, dtype=np.int64), np.arange(100_000)
    )
    assert draws.min() > 0
    assert draws.max() < 1
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert np.abs(counts - 5000).max() < 5 * np.sqrt(5000)


def test_stream_keys_tell_the_order_of_their_parts():
    assert stream_key(Draw.SAMPLE_ORDER, 1, 2) != stream_key(Draw.SAMPLE_ORDER, 2, 1)


def test_the_key_of_a_stream_is_mixed_as_arrays_of_keys_are():
    key = np.array([int(Draw.MIX)], dtype=np.uint64)
    for part in (3, 2**64 - 1, -1):
        key = mix64(key ^ np.array([part % 2**64], dtype=np.uint64))
    assert stream_key(Draw.MIX, 3, 2**64 - 1, -1) == key[0]
