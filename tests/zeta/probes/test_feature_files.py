"""Features on disk: rows in order of sample, in little memory, keys beside them."""

import resource
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.zeta.training import lane_pack
from zeta.distributed import RankInfo, World
from zeta.probes.feature_files import FEATURES_NAME, KEYS_NAME, LABELS_NAME, FeatureFiles

WORLD = World(RankInfo(), torch.device("cpu"))


def _pack(ids, weights, labels=None):
    pack = lane_pack(1, 0, images=4)
    labels = [-1] * 4 if labels is None else labels
    return replace(
        pack,
        sample_ids=torch.tensor(ids),
        weights=torch.tensor(weights, dtype=torch.float32),
        labels=torch.tensor(labels),
        keys=tuple(f"key\n{i}" for i in ids if i >= 0),
    )


def _features(ids):
    return torch.tensor(ids, dtype=torch.float32)[:, None] * torch.tensor([1.0, 10.0, 100.0])


def test_rows_are_in_order_and_what_failed_leaves_no_gap(tmp_path):
    files = FeatureFiles(tmp_path, WORLD)
    for ids, weights in (([7, 2, 9, -1], [1, 1, 0, 0]), ([3, 0, 8, 4], [1, 1, 1, 0])):
        files.add(_features(ids), _pack(ids, weights, [i + 100 for i in ids]))
    assert files.metrics() == {"images": 5}
    expected = [0, 2, 3, 7, 8]
    features = np.load(tmp_path / FEATURES_NAME)
    assert features.dtype == np.float32
    assert np.array_equal(features, _features(expected).numpy())
    assert np.load(tmp_path / LABELS_NAME).tolist() == [i + 100 for i in expected]
    keys = (tmp_path / KEYS_NAME).read_text().splitlines()
    assert keys == [f"key\\n{i}" for i in expected]  # a key is a line
    assert {path.name for path in tmp_path.iterdir()} == {FEATURES_NAME, LABELS_NAME, KEYS_NAME}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_features(tmp_path):
    """200 MB of features pass through; the process grows by far less."""
    width, packs = 65536, 200
    files = FeatureFiles(tmp_path, WORLD)
    block = torch.arange(width, dtype=torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(packs):
        ids = [4 * number + i for i in range(4)]
        files.add(block + torch.tensor(ids)[:, None], _pack(ids, [1, 1, 1, 1]))
    files.metrics()
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    features = np.load(tmp_path / FEATURES_NAME, mmap_mode="r")
    assert features.shape == (4 * packs, width)
    assert features[-1, 5] == 4 * packs - 1 + 5
    assert grown_mb < 80
