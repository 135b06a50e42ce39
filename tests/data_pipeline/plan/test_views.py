"""Several views of an image: planned as one sample, and each drawn by itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace

import numpy as np
import pytest

from data_pipeline.config import AugmentConfig, DataConfig, DropConfig, DropScheduleConfig
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.lane_packer import LaneState, PackPlan
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.summary import summarise
from data_pipeline.shards.manifest import ImageFormat, WeightedSource
from tests.data_pipeline.synthetic import config, synthetic_manifest

LANES, VIEWS = 3, 4
FIELDS = [field.name for field in fields(PackPlan)]


def plan(views: int = VIEWS, max_epochs: int | None = 2, **changes: object) -> Plan:
    changes = {"token_budget": 512, "max_images_per_pack": 45, "pack_window": 40} | changes
    data = config(views=views, augment=AugmentConfig(flip=True, crop_min_area=0.3), **changes)
    return Plan(synthetic_manifest([60, 40, 50]), data, LANES, max_epochs)


def packs_of(whole: Plan, lane: int = 0) -> list[PackPlan]:
    return list(whole.lane(lane))


def test_one_view_is_bit_for_bit_the_plan_before_there_were_views():
    digest = hashlib.sha256()
    whole = plan(views=1, drop=DropConfig("constant", 0.5))
    lane = whole.lane(1)
    for pack in lane:
        for name in FIELDS[:-1]:
            digest.update(getattr(pack, name).tobytes())
        digest.update(json.dumps(lane.state.to_json()).encode())
        digest.update(str([
            (image.sample_id, image.scale, *image.views[0][:5])
            for image in pack_recipe(whole, pack, 0).images
        ]).encode())  # fmt: skip
    assert digest.hexdigest()[:16] == "9b7d51fb78c63a37"


def test_the_views_of_an_image_lie_in_one_pack_and_every_image_has_all_of_them():
    whole = plan()
    dealt: list[int] = []
    for lane in range(LANES):
        for pack in packs_of(whole, lane):
            assert pack.views.tolist() == list(range(VIEWS)) * pack.num_samples
            assert (pack.sample_ids.reshape(-1, VIEWS) == pack.sample_ids[::VIEWS, None]).all()
            assert pack.lengths.sum() <= 512
            assert len(pack.lengths) <= 45
            dealt += pack.sample_ids[::VIEWS].tolist()
    assert sorted(dealt) == sorted(list(range(150)) * 2)


def test_packs_of_views_are_full_and_cost_the_same():
    summary = summarise(replace(plan(max_images_per_pack=128, pack_window=2048), max_epochs=None))
    assert summary.images == 150
    assert summary.views == VIEWS
    assert summary.fill > 0.97
    assert summary.straggler_ratio < 1.02
    packs = packs_of(plan(max_epochs=1, max_images_per_pack=128), 0)
    assert summary.images_per_pack == pytest.approx(
        np.mean([len(pack.lengths) for pack in packs[:-1]]), rel=0.2
    )


def test_a_view_is_a_function_of_seed_epoch_sample_and_view_alone():
    """Whatever is drawn with it: neighbours, other views, and their number."""
    whole, ids = plan(), np.array([5, 90, 17])
    epochs = np.array([0, 1, 1])
    drawn = whole.size_images(ids, epochs)
    for number in range(3):
        alone = whole.size_images(ids[[number]], epochs[[number]])
        part = drawn.select(slice(VIEWS * number, VIEWS * (number + 1)))
        assert all((getattr(alone, name) == getattr(part, name)).all() for name in FIELDS)
    fewer = plan(views=2).size_images(ids, epochs)
    first_two = drawn.select(np.flatnonzero(drawn.views < 2))
    single = plan(views=1).size_images(ids, epochs)
    first = drawn.select(np.flatnonzero(drawn.views == 0))
    for name in ("sample_ids", "crops", "rows", "columns", "keep"):
        assert (getattr(fewer, name) == getattr(first_two, name)).all()
        assert (getattr(single, name) == getattr(first, name)).all()
    other = plan(seed=1).size_images(ids, epochs)
    assert (other.crops != drawn.crops).all()


def test_the_views_of_an_image_differ_in_size_crop_flip_and_kept_patches():
    whole = plan(drop=DropConfig("constant", 0.5))
    recipes = pack_recipe(whole, whole.size_images(np.arange(60), np.zeros(60, np.int64)), 0).images
    for one, another in ((0, 1), (1, 2), (2, 3)):
        pairs = [(image.views[one], image.views[another]) for image in recipes]
        assert np.mean([a.grid != b.grid for a, b in pairs]) > 0.8
        assert all(a.box != b.box for a, b in pairs)
        assert all(a.keep_key != b.keep_key for a, b in pairs)
        assert 0.3 < np.mean([a.flip != b.flip for a, b in pairs]) < 0.7
    assert len({view.keep_key for image in recipes for view in image.views}) == 60 * VIEWS


def test_an_image_is_decoded_once_at_the_scale_of_its_largest_view():
    manifest = synthetic_manifest([40])
    manifest.samples["format"] = ImageFormat.JPEG
    manifest.samples["height"] *= 10
    manifest.samples["width"] *= 10
    sizes = [Plan(manifest, config(views=views, token_budget=1024), 1) for views in (1, 4)]
    alone, together = (
        pack_recipe(each, each.size_images(np.arange(40), np.zeros(40, np.int64)), 0).images
        for each in sizes
    )
    for one, several in zip(alone, together, strict=True):
        assert several.scale <= one.scale
        height, width = several.stored_size
        needed = [
            min(height / (8 * view.grid[0]), width / (8 * view.grid[1])) for view in several.views
        ]
        assert several.scale == max(s for s in (1, 2, 4, 8) if s <= max(min(needed), 1))


def test_a_lane_restored_after_any_pack_goes_on_with_the_same_views():
    whole = plan()
    lane, states = whole.lane(1), [LaneState()]
    packs = []
    while (pack := lane.next_pack()) is not None:
        packs.append(pack)
        states.append(LaneState.from_json(json.loads(json.dumps(lane.state.to_json()))))
    assert any(state.carry for state in states)
    for number, state in enumerate(states[:-1]):
        following = whole.lane(1, state).next_pack()
        assert following is not None
        for name in FIELDS:
            assert (getattr(following, name) == getattr(packs[number], name)).all()


def test_sources_mixed_by_tokens_get_their_share_of_the_tokens_of_all_views():
    manifest = synthetic_manifest([80, 80])
    manifest.samples["height"][80:] *= 3
    sources = (WeightedSource("small", 0, 1, 1.0), WeightedSource("large", 1, 2, 1.0))
    whole = Plan(
        replace(manifest, sources=sources),
        config(views=3, mix_by="tokens", token_budget=1024, max_images_per_pack=120),
        2,
    )
    lane, tokens = whole.lane(0), np.zeros(2)
    for _ in range(12):
        pack = lane.next_pack()
        assert pack is not None
        tokens += np.bincount(whole.source_of(pack.sample_ids), weights=pack.lengths, minlength=2)
    assert tokens[0] / tokens.sum() == pytest.approx(0.5, abs=0.03)


def test_the_schedule_of_the_drop_rate_counts_every_view():
    schedule = DropScheduleConfig("sigmoid", 0.1, 0.6, middle=600, width=-100)
    whole = plan(drop=DropConfig("constant", schedule=schedule))
    for pack in packs_of(whole)[:3]:
        samples = pack.seen[::VIEWS] // (LANES * VIEWS)
        assert (pack.seen.reshape(-1, VIEWS) == pack.seen[::VIEWS, None]).all()
        assert samples.max() < 40 + 40
    single = packs_of(plan(views=1, drop=DropConfig("constant", schedule=schedule)))
    assert np.concatenate([p.seen for p in packs_of(whole)]).max() > 3.9 * max(
        p.seen.max() for p in single
    )


def test_views_that_cannot_share_a_pack_are_refused_with_the_numbers_to_type():
    with pytest.raises(ValueError, match=r"data\.views is 0; it must be at least 1"):
        DataConfig(views=0)
    with pytest.raises(ValueError, match=r"set data\.max_images_per_pack to at least 200"):
        DataConfig(views=200, max_images_per_pack=128)
    with pytest.raises(ValueError, match=r"40 views of an image it must be at least 120"):
        plan(views=40, token_budget=119, prefix_tokens=2)
    assert plan(views=40, token_budget=120, prefix_tokens=2).max_tokens == 1


def test_a_view_larger_than_its_part_of_a_pack_is_made_smaller_and_counted():
    whole = plan(views=4, token_budget=128)
    summary = summarise(whole)
    assert summary.shrunk > 0
    assert max(int((p.rows * p.columns).max()) for p in packs_of(whole)) <= 32
