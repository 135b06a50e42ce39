"""Scores by class, aspect ratio and size: every image in one group, edges where they are said."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from launch.evaluate.groups import scores_by_aspect, scores_by_class, scores_by_side

SIZES = [(100, 40), (100, 50), (100, 60), (100, 75), (99, 99), (75, 100), (60, 100), (50, 100)]
SIZES += [(40, 100), (2000, 1000), (16, 16)]
"""(height, width)"""


@pytest.fixture
def manifest() -> SimpleNamespace:
    samples = np.zeros(len(SIZES), dtype=[("height", "u4"), ("width", "u4")])
    samples["height"], samples["width"] = zip(*SIZES, strict=True)
    return SimpleNamespace(samples=samples)


@pytest.fixture
def rows() -> dict[str, np.ndarray]:
    count = len(SIZES)
    hits = np.arange(count) % 2 == 0
    losses = np.arange(count, dtype=np.float32)
    labels = np.array([0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 3])
    return {"sample_id": np.arange(count), "label": labels, "top1": hits, "loss": losses}


def test_every_image_is_in_one_group_and_edges_belong_to_the_middle(manifest, rows):
    by_aspect = scores_by_aspect(rows, manifest)
    assert {name: group["images"] for name, group in by_aspect.items()} == {
        "below 1:2": 1,
        "1:2 to 3:4": 3,  # 1:2 itself is in it twice, 3:4 is not
        "3:4 to 4:3": 4,
        "4:3 to 2:1": 2,
        "above 2:1": 1,
    }
    by_side = scores_by_side(rows, manifest)
    assert {name: group["images"] for name, group in by_side.items()} == {
        "below 64": 3,
        "64 to 128": 7,
        "above 1024": 1,
    }
    for groups in (by_aspect, by_side, scores_by_class(rows, "abcd")):
        total = sum(group["images"] for group in groups.values())
        assert total == len(SIZES)
        mean = sum(group["images"] * group["loss"] for group in groups.values()) / total
        assert mean == pytest.approx(rows["loss"].mean())


def test_classes_without_images_are_left_out_and_the_others_have_their_names(rows):
    by_class = scores_by_class(rows, ["a", "b", "c", "d"])
    assert list(by_class) == ["a", "b", "d"]
    assert by_class["a"] == {"images": 2, "top1": 0.5, "loss": 0.5}
