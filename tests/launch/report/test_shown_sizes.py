from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from data_pipeline.config import DataConfig, DropConfig, ResolutionConfig
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.build import build_shards
from launch.report.shown_sizes import DROPS, SIDES, read_counts, shown_sizes
from tests.data_pipeline.shard_fixtures import jpeg


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    sizes = np.random.default_rng(0).integers(24, 120, (40, 2)).tolist()
    images = [(f"{n:03d}", {"jpg": jpeg(h, w, n), "cls": b"0"}) for n, (h, w) in enumerate(sizes)]
    return build_shards(images, tmp_path_factory.mktemp("shards"), class_names=["only"])


def _plan(manifest, resolution, drop) -> Plan:
    config = DataConfig(
        token_budget=512, resolution=resolution, drop=drop, patch_size=8, cost_dim=64
    )
    return Plan(manifest, config, 2)


def test_the_sizes_are_those_of_the_packs_that_the_run_trained_on(manifest):
    plan = _plan(manifest, ResolutionConfig("side", 16, 96), DropConfig("resolution", min=0.1))
    packs = [plan.lane(lane).next_pack() for lane in range(2)]
    seen = sum(len(pack.sample_ids) for pack in packs)
    assert 2 < seen < 40
    found = shown_sizes(plan, seen)
    sides, drops = Counter(), Counter()
    for pack in packs:
        patches = pack.rows * pack.columns
        sides.update(float(side) for side in np.rint(8 * np.sqrt(patches)))
        drops.update(float(rate) for rate in np.rint(100 * (1 - pack.keep / patches)))
    assert found["images"] == seen
    assert read_counts(found, SIDES) == sides
    assert read_counts(found, DROPS) == drops


def test_a_run_of_one_size_shows_one_size_whole(manifest):
    plan = _plan(manifest, ResolutionConfig("fixed", max=48, fit="squash"), DropConfig("none"))
    found = shown_sizes(plan, 5000)
    assert found[SIDES] == {"48": found["images"]}
    assert found[DROPS] == {"0": found["images"]}
    assert found["images"] == 5000
    assert shown_sizes(plan, 0)["images"] == 1


def test_what_is_no_count_in_the_file_is_left_out():
    sizes = json.loads('{"sides_px": {"48": 3, "x": 1, "64": "y", "80": -1}, "dropped_percent": 3}')
    assert read_counts(sizes, SIDES) == {48.0: 3}
    assert read_counts(sizes, DROPS) == {}
    assert read_counts({}, SIDES) == {}
