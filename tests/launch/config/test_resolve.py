"""Model and shards are checked against each other before anything is trained."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from data_pipeline.config import AugmentConfig, MixConfig, RandAugmentConfig, ResolutionConfig
from data_pipeline.plan.summary import summarise
from launch.config.load import load_config
from launch.config.resolve import resolve_with_shards, training_plan, with_targets
from launch.run.evaluation_plan import View, held_out_plan
from launch.tables import mix_warning, plan_table, plan_warnings
from tests.data_pipeline.synthetic import config, synthetic_manifest
from zeta.objectives.config import ObjectiveConfig


def demo(*overrides: str):
    return load_config("demo", ["data.shards=unused", *overrides])


def test_a_label_beyond_the_head_is_refused_where_there_is_no_class_map():
    manifest = replace(synthetic_manifest([50]), class_names=None, highest_label=12)
    with pytest.raises(ValueError, match=r"model\.num_classes is 12, .* class index 12.* least 13"):
        resolve_with_shards(demo("model.num_classes=12"), manifest)
    resolved = resolve_with_shards(demo("model.num_classes=13"), manifest)
    assert resolved.model.num_classes == 13
    with pytest.raises(ValueError, match="no class map"):
        resolve_with_shards(demo(), manifest)


def test_the_plan_warns_of_lanes_that_hold_less_than_a_pack_and_of_empty_packs():
    manifest = synthetic_manifest([60])
    config = resolve_with_shards(demo("train.packs_per_step=10"), manifest)
    plan = training_plan(config, manifest)
    first, second = plan_warnings(summarise(plan, 4), plan, 4)
    assert "of 10 packs are not filled by an epoch" in first
    assert "2 of 12 packs a step are empty on 4 ranks" in second
    large = synthetic_manifest([3000])
    config = resolve_with_shards(demo("train.packs_per_step=4"), large)
    plan = training_plan(config, large)
    assert plan_warnings(summarise(plan, 4), plan, 4) == []


def test_the_plan_warns_where_the_limit_of_images_leaves_packs_unfilled():
    manifest = synthetic_manifest([3000])
    few = demo("train.packs_per_step=4", "data.max_images_per_pack=3")
    plan = training_plan(resolve_with_shards(few, manifest), manifest)
    (warning,) = plan_warnings(summarise(plan, 4), plan, 4)
    raised = int(re.search(r"max_images_per_pack = 3 images: raise it to (\d+)", warning)[1])
    enough = demo("train.packs_per_step=4", f"data.max_images_per_pack={raised}")
    plan = training_plan(resolve_with_shards(enough, manifest), manifest)
    assert plan_warnings(summarise(plan, 4), plan, 4) == []


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (["data.max_images_per_pack=1"], r"holds one: raise data.max_images_per_pack = 1 to 2 or"),
        (
            ["data.max_images_per_pack=3", "data.views=2"],
            r"holds one, in 2 views: raise data.max_images_per_pack = 3 to 4 or more",
        ),
        (["data.token_budget=150", "data.drop.kind=none"], "holds one: raise data.token_budget"),
    ],
)
def test_the_plan_warns_of_packs_in_which_nothing_can_be_mixed(settings, remedy):
    manifest = synthetic_manifest([200])
    manifest.samples["height"] = manifest.samples["width"] = 96
    settings = [*settings, "data.resolution.min=96"]  # 144 patches of 8 x 8 pixels
    for mix, said in ((["data.mix.mixup_alpha=0.2"], [remedy]), ([], [])):
        config = resolve_with_shards(demo("train.packs_per_step=4", *settings, *mix), manifest)
        plan = training_plan(config, manifest)
        found = [
            w for w in plan_warnings(summarise(plan), plan, 1) if "data.mix mixes nothing" in w
        ]
        assert len(found) == len(said)
        assert all(re.search(text, warning) for text, warning in zip(said, found, strict=True))
        at_start = mix_warning(config.data, config.data.max_images_per_pack)
        assert at_start == (found[0] if found and "max_images" in remedy else None)
    usual = resolve_with_shards(demo("data.mix.mixup_alpha=0.2"), manifest)
    assert mix_warning(usual.data, usual.data.max_images_per_pack) is None


def test_an_estimate_is_marked_and_what_is_not_used_is_listed():
    manifest = synthetic_manifest([3000])
    manifest.samples["label"][:5] = -1
    config = resolve_with_shards(demo("train.packs_per_step=4"), manifest)
    plan = training_plan(config, manifest)
    exact = "\n".join(plan_table(summarise(plan, 1), plan.num_lanes, 1))
    estimate = "\n".join(plan_table(summarise(plan, 1, exact_up_to=100), plan.num_lanes, 1))
    assert "~" not in exact
    assert estimate.count("~") >= 6
    assert "not used          5 (no label)" in exact


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.pool=max", r"model\.pool is 'max'; choose one of attention, cls, mean"),
        ("model.position=sine", r"model\.position is 'sine'; choose one of absolute, fractional"),
        (
            "model.image_size=wide",
            r"model\.image_size is .wide.: give a side, or",
        ),
        ("model.image_size=[96,30]", r"model\.image_size is .*96, 30.*multiples of patch_size=8"),
        ("model.layer_scale=nan", r"model\.layer_scale is nan"),
    ],
)
def test_what_the_model_refuses_is_refused_before_a_job_waits_for_its_machines(setting, message):
    with pytest.raises(ValueError, match=message):
        resolve_with_shards(demo(setting), synthetic_manifest([50]))


def test_views_are_refused_where_they_would_be_wrong_partners_of_their_own_caption():
    siglip = replace(demo("data.views=2"), objective=ObjectiveConfig(kind="siglip"))
    with pytest.raises(ValueError, match=r"has 2 views, but objective\.kind siglip .*views=1"):
        with_targets(siglip, synthetic_manifest([50]))
    assert with_targets(demo("data.views=2"), synthetic_manifest([50])).data.views == 2


def test_mixed_images_are_refused_where_the_objective_cannot_learn_from_them():
    mixing = demo("data.mix.mixup_alpha=0.2")
    for kind in ("lejepa", "siglip", "tests.zeta.foreign_objective:Brightness"):
        other = replace(mixing, objective=ObjectiveConfig(kind=kind))
        other = replace(other, data=replace(other.data, views=2))
        named = rf"data\.mix mixes images and their classes, but objective\.kind {kind} does not"
        with pytest.raises(ValueError, match=named):
            with_targets(other, synthetic_manifest([50]))
    assert with_targets(mixing, synthetic_manifest([50])).data.mix.mixup_alpha == 0.2
    never = replace(mixing.data, mix=MixConfig(0.2, probability=0), views=2)
    lejepa = replace(mixing, data=never, objective=ObjectiveConfig(kind="lejepa"))
    assert with_targets(lejepa, synthetic_manifest([50])).data.mix == never.mix


def test_held_out_images_are_seen_in_one_view_as_they_are():
    changes = AugmentConfig(flip=True, rand_augment=RandAugmentConfig(layers=2))
    data = config(views=4, augment=changes, mix=MixConfig(mixup_alpha=1))
    shown = held_out_plan(synthetic_manifest([50]), data, View(ResolutionConfig("native", max=64)))
    assert shown.config.augment == AugmentConfig()
    assert not shown.config.mix.mixes_any
    assert shown.config.views == 1
    pack = shown.lane(0).next_pack()
    assert pack is not None
    assert len(set(pack.sample_ids.tolist())) == len(pack.sample_ids)
