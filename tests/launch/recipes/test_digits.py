from __future__ import annotations

import io
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from launch.recipes.digits import (
    CLASS_NAMES,
    MAX_ASPECT,
    MAX_SIDE,
    MIN_SIDE,
    render_split,
    split_scans,
)


def _scan_of(key: str) -> int:
    return int(key.removeprefix("scan").split("_")[0])


def test_no_scan_is_in_both_splits_and_none_is_left_out():
    train = {_scan_of(key) for key, _ in render_split("train", seed=3, renderings=2)}
    val = [_scan_of(key) for key, _ in render_split("val", seed=3)]
    assert not train & set(val)
    assert train | set(val) == set(range(1797))
    assert len(val) == len(set(val)), "a held-out scan counts more than once"


def test_the_same_share_of_every_class_is_held_out():
    train = Counter(scan.label for scan in split_scans("train", seed=0))
    val = Counter(scan.label for scan in split_scans("val", seed=0))
    for label in range(len(CLASS_NAMES)):
        assert val[label] / (val[label] + train[label]) == pytest.approx(0.2, abs=0.005)


def test_same_seed_same_bytes_and_another_seed_another_split():
    first = list(render_split("val", seed=1))
    assert first == list(render_split("val", seed=1))
    assert {key for key, _ in first} != {key for key, _ in render_split("val", seed=2)}


def test_every_scan_has_the_asked_renderings_and_all_differ():
    samples = list(render_split("train", seed=0, renderings=3))
    assert set(Counter(_scan_of(key) for key, _ in samples).values()) == {3}
    assert len({key for key, _ in samples}) == len(samples)
    assert len({members["jpg"] for _, members in samples}) == len(samples)


def test_labels_are_those_of_scikit_learn():
    target = load_digits().target
    for key, members in render_split("val", seed=0):
        assert members["cls"] == str(target[_scan_of(key)]).encode()


def test_sizes_fill_the_range_and_are_not_square_in_general():
    images = [
        Image.open(io.BytesIO(members["jpg"])) for _, members in render_split("train", seed=0)
    ]
    assert {image.format for image in images} == {"JPEG"}
    sides = np.array([image.size for image in images])
    assert sides.min() >= MIN_SIDE
    assert sides.max() <= MAX_SIDE
    assert sides.min() < 28
    assert sides.max() > 90
    aspect = sides[:, 0] / sides[:, 1]
    assert np.mean(np.abs(np.log(aspect)) > np.log(1.1)) > 0.7, "most should be far from square"
    assert aspect.max() <= MAX_ASPECT
    assert aspect.min() >= 1 / MAX_ASPECT


def test_a_rendering_shows_the_whole_digit():
    """Cut out where the ink is and shrunk back to cells, a rendering is the scan again."""
    scans = {scan.index: scan for scan in split_scans("val", seed=0)}
    for key, members in list(render_split("val", seed=0))[:100]:
        grey = np.asarray(Image.open(io.BytesIO(members["jpg"])).convert("L"), np.float64)
        ink = grey.max() - grey
        rows, columns = np.nonzero(ink > 0.35 * ink.max())
        cut = Image.fromarray(ink.astype(np.float32)).crop(
            (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        )
        cells = np.frombuffer(scans[_scan_of(key)].pixels, np.uint8).reshape(8, 8)
        rows, columns = np.nonzero(cells > 0.35 * 16)
        own = cells[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        read = np.asarray(cut.resize(own.shape[::-1], Image.Resampling.BOX))
        if own.size > own.shape[0]:  # a stroke one cell wide has no correlation to speak of
            assert np.corrcoef(read.ravel(), own.ravel())[0, 1] > 0.7, key


def test_consecutive_samples_mix_the_classes():
    labels = [members["cls"] for _, members in render_split("train", seed=0)]
    assert all(len(set(labels[i : i + 50])) >= 8 for i in range(0, 1400, 50))


@pytest.mark.parametrize(("split", "renderings"), [("test", 1), ("train", 0), ("val", 2)])
def test_bad_arguments_are_refused_by_name(split, renderings):
    with pytest.raises(ValueError, match=r"split is 'test'|renderings is"):
        list(render_split(split, seed=0, renderings=renderings))


def test_a_thousand_renderings_take_seconds_not_minutes():
    next(iter(render_split("train", seed=0)))  # loads the scans
    start = time.perf_counter()
    for _, _ in zip(range(1000), render_split("train", seed=0, renderings=1), strict=False):
        pass
    assert time.perf_counter() - start < 10
