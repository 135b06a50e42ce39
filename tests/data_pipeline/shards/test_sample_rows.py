"""Rows over several arrays read like one array."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shards.manifest import SAMPLE_DTYPE
from data_pipeline.shards.sample_rows import SampleRows, join_rows, release_pages


def rows(count: int, first: int) -> np.ndarray:
    made = np.zeros(count, dtype=SAMPLE_DTYPE)
    made["offset"] = np.arange(first, first + count)
    return made


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    data=st.data(),
)
def test_rows_of_parts_are_the_rows_of_one_array(counts, data):
    ends = np.cumsum([0, *counts])
    parts = [rows(count, first) for count, first in zip(counts, ends, strict=False)]
    whole, joined = np.concatenate(parts), join_rows([join_rows(parts[:2]), *parts[2:]])
    index = st.integers(0, len(whole) - 1)
    ids = np.array(data.draw(st.lists(index, max_size=30)), dtype=np.int64)
    low, high = data.draw(index), data.draw(st.integers(0, len(whole) + 3))
    assert len(joined) == len(whole)
    assert (joined[ids] == whole[ids]).all()
    assert (joined[low:high] == whole[low:high]).all()
    assert joined[low] == whole[low]
    assert (joined["offset"] == whole["offset"]).all()


def test_mapped_parts_are_not_copied_and_read_the_same_after_a_release(tmp_path: Path):
    parts = []
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", rows(1000, number * 1000))
        parts.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r")[100:])
    joined = join_rows(parts)
    assert isinstance(joined, SampleRows)
    assert all(np.shares_memory(a, b) for a, b in zip(joined.parts, parts, strict=True))
    before = joined[np.arange(0, 1800, 7)]
    release_pages(joined)
    assert (joined[np.arange(0, 1800, 7)] == before).all()
