"""Mixup and CutMix on packs: what an image shows and learns is a pure function of the plan."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from data_pipeline.config import AugmentConfig, MixConfig
from data_pipeline.loading.executor import Executor, decode_views
from data_pipeline.loading.fetch import read_image
from data_pipeline.loading.loader import PackLoader
from data_pipeline.loading.mix import Mix, draw_mixes, mix_rows, mixed, own_share
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from tests.data_pipeline.synthetic import config, write_shards
from zeta.packed import merge_states

LANES = 3
BOTH = MixConfig(mixup_alpha=0.8, cutmix_alpha=1.0, probability=0.8)
BROKEN = 4


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = write_shards(tmp_path_factory.mktemp("mix") / "shards", [40, 30])
    index_shards([str(folder)], workers=1, progress=False)
    return Manifest.open(str(folder))


@pytest.fixture(scope="module")
def damaged(manifest, tmp_path_factory) -> Manifest:
    """The same shards, in one of which an image has lost its bytes since it was indexed."""
    folder = tmp_path_factory.mktemp("damaged") / "shards"
    shutil.copytree(manifest.shards[0].path.rpartition("/")[0], folder)
    shard = folder / "shard-000.tar"
    sample = manifest.samples[BROKEN]
    content = bytearray(shard.read_bytes())
    start = int(sample["offset"]) + 512
    content[start + 2 : start + 200] = bytes(198)
    shard.write_bytes(content)
    index_shards([str(folder)], workers=1, progress=False)
    return Manifest.open(str(folder))


def plan(manifest: Manifest, mix: MixConfig = BOTH, **changes) -> Plan:
    augment = AugmentConfig(flip=True, crop_min_area=0.5)
    data = config(augment=augment, mix=mix, pack_window=16, require_labels=True, **changes)
    return Plan(manifest, data, LANES)


def executed(whole: Plan, pack=None):
    recipe = pack_recipe(whole, whole.lane(0).next_pack() if pack is None else pack, 0)
    return recipe, Executor(whole.manifest.class_names, 5).execute(recipe)


def read(manifest, world_size, workers, steps, state=None):
    """Return patches, partners and shares of each lane at each step, and the state after them."""
    found, states = {}, []
    for rank in range(world_size):
        loader = PackLoader(plan(manifest, workers=workers), rank=rank, world_size=world_size)
        for step in itertools.islice(loader.steps(state), steps):
            for lane, pack in zip(step.lanes, step.packs, strict=True):
                if lane < LANES:
                    found[step.step, lane] = pack.patches, pack.mixed_with, pack.own_shares
        states.append(loader.state_after(step.step))
    return found, json.loads(json.dumps(merge_states(states)))


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (2, 0), (3, 0)])
def test_any_ranks_workers_and_stops_mix_the_same_images_into_the_same_pixels(
    manifest, world_size, workers
):
    expected, _ = read(manifest, 1, 0, 6)
    first, state = read(manifest, world_size, workers, 2)
    rest, _ = read(manifest, 1, 0, 4, state)
    made = first | rest
    assert made.keys() == expected.keys()
    for place, values in expected.items():
        assert all(map(torch.equal, made[place], values)), place
    assert sum(int((partner >= 0).sum()) for _, partner, _ in expected.values()) > 40


def test_each_image_is_mixed_with_the_next_one_of_its_pack_as_its_share_says(manifest):
    whole = plan(manifest)
    recipe, made = executed(whole)
    batch, side = made.batch, whole.patch_size
    views = [
        next(decode_views(read_image(image, 5).image, image, side, "keep"))
        for image in recipe.images
    ]
    kinds = set()
    for row, image in enumerate(recipe.images):
        (view,) = image.views
        kinds.add(None if view.mix is None else view.mix.pastes)
        partner = int(batch.mixed_with[row])
        rows = slice(int(batch.cu_seqlens[row]), int(batch.cu_seqlens[row + 1]))
        y, x = batch.coords[rows].numpy().T
        shown = views[row]
        if view.mix is None:
            assert partner == -1
            assert batch.own_shares[row] == 1
        else:
            assert partner == (row + 1) % len(recipe.images)
            shown = mixed(views[row], views[partner], view.mix)
        cells = shown.reshape(view.grid[0], side, view.grid[1], side, 3).swapaxes(1, 2)
        expected = cells[y, x].reshape(len(y), -1)
        assert np.array_equal(batch.patches[rows].numpy(), expected)
    assert kinds == {None, True, False}
    used = len(recipe.images)
    assert (batch.mixed_with[used:] == -1).all()
    assert (batch.own_shares[used:] == 1).all()


def test_mixup_blends_and_cutmix_pastes_a_box_of_images_of_one_size():
    own, other = (np.full((8, 12, 3), value, np.uint8) for value in (200, 100))
    assert (mixed(own, other, Mix(False, 0.75)) == 175).all()
    mix = Mix(True, 0.75, top=1.0, left=0.0)
    expected = own.copy()
    expected[4:, :6] = 100
    assert np.array_equal(mixed(own, other, mix), expected)
    assert (own == 200).all()


def test_the_middle_of_another_shape_is_mixed_without_stretching():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 90
    shown = mixed(np.zeros((40, 40, 3), np.uint8), wide, Mix(False, 1e-9))
    assert (shown == 90).all()


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_the_share_of_a_class_is_that_of_its_pixels_in_the_kept_patches(keep):
    rng = np.random.default_rng(0)
    for number in range(50):
        rows, columns, side = *rng.integers(1, 9, 2), 8
        mix = Mix(True, *rng.random(3))
        chosen = rng.permutation(rows * columns)[: max(1, int(keep * rows * columns))]
        y, x = np.divmod(chosen, columns)
        own = np.ones((rows * side, columns * side, 3), np.uint8)
        shown = mixed(own, 0 * own, mix)[:, :, 0]
        cells = shown.reshape(rows, side, columns, side).swapaxes(1, 2)[y, x]
        found = own_share(mix, shown.shape, y, x, side)
        assert found == pytest.approx(cells.mean()), number
    assert own_share(Mix(False, 0.3), (8, 8), y, x, side) == 0.3


def test_an_image_is_shown_alone_if_its_partner_cannot_be_decoded(manifest, damaged):
    whole, sick = plan(manifest, MixConfig(0.8)), plan(damaged, MixConfig(0.8))
    alone = plan(manifest, MixConfig())
    lanes = [whole.lane(lane) for lane in range(LANES)]
    packs = (lane.next_pack() for lane in itertools.cycle(lanes))
    pack = next(pack for pack in packs if BROKEN in pack.sample_ids)
    healthy, unmixed = (executed(each, pack)[1].batch for each in (whole, alone))
    recipe, made = executed(sick, pack)
    assert [each.sample_id for each in made.rejected] == [BROKEN]
    lost = [image.sample_id for image in recipe.images].index(BROKEN)
    before = (lost - 1) % len(recipe.images)
    assert made.batch.mixed_with[[lost, before]].tolist() == [-1, -1]
    assert made.batch.own_shares[[lost, before]].tolist() == [1, 1]
    assert healthy.mixed_with[before] == lost
    bounds = made.batch.cu_seqlens.tolist()
    for row in range(len(recipe.images)):
        rows = slice(bounds[row], bounds[row + 1])
        expected = unmixed if row == before else healthy
        wanted = expected.patches[rows]
        assert torch.equal(made.batch.patches[rows], 0 * wanted if row == lost else wanted), row


def test_without_an_alpha_or_a_probability_a_pack_is_as_ever(manifest):
    _, plain = executed(plan(manifest, MixConfig()))
    _, never = executed(plan(manifest, MixConfig(1.0, 1.0, probability=0)))
    assert plain.batch.mixed_with is plain.batch.own_shares is None
    assert never.batch.mixed_with is never.batch.own_shares is None
    assert torch.equal(plain.batch.patches, never.batch.patches)
    _, mixing = executed(plan(manifest))
    for name, tensor in plain.batch.tensors().items():
        assert (name != "patches") == torch.equal(tensor, mixing.batch.tensors()[name]), name


def test_views_are_mixed_with_the_same_view_of_the_next_image(manifest):
    whole = plan(manifest, MixConfig(1.0), views=2)
    recipe, made = executed(whole)
    rows = 2 * len(recipe.images)
    partners = [(row + 2) % rows for row in range(rows)]
    assert made.batch.mixed_with[:rows].tolist() == partners
    shares = made.batch.own_shares[:rows].tolist()
    assert len(set(shares)) == rows  # each view by a draw of its own


def test_the_only_image_of_a_pack_and_an_empty_pack_are_not_mixed(manifest):
    picture, mix = np.zeros((8, 8, 3), np.uint8), Mix(False, 0.5)
    assert [partner for _, partner in mix_rows([picture], [mix], 1)] == [-1]
    assert [partner for _, partner in mix_rows([picture] * 2, [mix] * 2, 2)] == [-1, -1]
    empty = Executor(manifest.class_names, 5).execute(pack_recipe(plan(manifest), None, 0)).batch
    assert (empty.mixed_with == -1).all()
    assert (empty.own_shares == 1).all()


def test_shares_kinds_and_how_often_follow_the_settings():
    keys = np.arange(20_000, dtype=np.uint64)
    drawn = draw_mixes(MixConfig(0.2, 1.0, probability=0.6, switch_probability=0.3), keys)
    mixes = [mix for mix in drawn if mix is not None]
    assert len(mixes) / len(keys) == pytest.approx(0.6, abs=0.02)
    assert np.mean([mix.pastes for mix in mixes]) == pytest.approx(0.3, abs=0.02)
    for pastes, alpha in ((False, 0.2), (True, 1.0)):
        shares = [mix.share for mix in mixes if mix.pastes == pastes]
        assert np.mean(shares) == pytest.approx(0.5, abs=0.02)
        assert np.var(shares) == pytest.approx(0.25 / (2 * alpha + 1), rel=0.05)
    assert drawn == draw_mixes(MixConfig(0.2, 1.0, 0.6, 0.3), keys)
    assert not any(mix.pastes for mix in draw_mixes(MixConfig(0.2), keys) if mix)
    assert all(mix.pastes for mix in draw_mixes(MixConfig(0, 0.2), keys) if mix)


@pytest.mark.parametrize("share", [0.0, 0.003, 0.5, 1.0])
def test_a_box_lies_inside_the_image_and_has_its_share(share):
    for top, left, size in itertools.product((0.0, 0.3, 1.0), (0.0, 0.7, 1.0), (8, 65)):
        first, second, last, end = Mix(True, share, top, left).box(size, 2 * size)
        assert 0 <= first <= last <= size
        assert 0 <= second <= end <= 2 * size
        assert abs((last - first) / size - (1 - share) ** 0.5) <= 0.5 / size


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: MixConfig(mixup_alpha=-1), r"data\.mix\.mixup_alpha is -1"),
        (lambda: MixConfig(cutmix_alpha=1e-9), r"data\.mix\.cutmix_alpha is 1e-09, by which"),
        (lambda: MixConfig(cutmix_alpha=float("nan")), r"data\.mix\.cutmix_alpha is nan"),
        (lambda: MixConfig(mixup_alpha=float("inf")), r"data\.mix\.mixup_alpha is inf"),
        (lambda: MixConfig(probability=1.1), r"data\.mix\.probability is 1\.1"),
        (lambda: MixConfig(switch_probability=-0.1), r"data\.mix\.switch_probability is -0\.1"),
    ],
)
def test_a_value_that_cannot_be_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()
