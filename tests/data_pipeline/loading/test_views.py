"""Views of an image are made from one decode, and lie together through ranks, kills and rejects."""

from __future__ import annotations

import itertools
import json
import tarfile

import numpy as np
import pytest
import torch

from data_pipeline.config import AugmentConfig, DropConfig
from data_pipeline.loading import executor as executor_module
from data_pipeline.loading.decode import decode
from data_pipeline.loading.executor import ExecutedPack, Executor
from data_pipeline.loading.layout import kept_patches
from data_pipeline.loading.loader import PackLoader
from data_pipeline.loading.recipe import pack_recipe
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from tests.data_pipeline.synthetic import add_member, config, write_shards
from zeta.packed import PackedBatch, StepPacks, join_packs, merge_states
from zeta.run.ledger import Streaks, used_sample_ids, used_samples

LANES, STEPS, VIEWS = 4, 7, 3
BROKEN = 30
BATCH_FIELDS = ("patches", "coords", "grids", "weights", "sample_ids", "labels", "view_of")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = write_shards(tmp_path_factory.mktemp("data") / "shards", [50, 41])
    index_shards([str(folder)], workers=1, progress=False)
    return Manifest.open(str(folder))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Return the same images, of which one breaks off in the middle of its pixels."""
    folder = write_shards(tmp_path_factory.mktemp("damaged") / "shards", [50, 41])
    shard = folder / "shard-000.tar"
    with tarfile.open(shard) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]
    with tarfile.open(shard, "w") as tar:
        for name, data in members:
            broken = name == f"s{BROKEN:05d}.jpg"
            add_member(tar, name, data[: data.index(b"\xff\xda") + 40] if broken else data)
    index_shards([str(folder)], workers=1, progress=False)
    return Manifest.open(str(folder))


def plan(manifest: Manifest, views: int = VIEWS, **changes: object) -> Plan:
    settings = {"token_budget": 512, "max_images_per_pack": 48, "pack_window": 24} | changes
    augment = AugmentConfig(flip=True, crop_min_area=0.3)
    return Plan(manifest, config(views=views, augment=augment, **settings), LANES)


def content(pack: PackedBatch) -> list[bytes]:
    return [getattr(pack, name).numpy().tobytes() for name in BATCH_FIELDS]


def read(
    manifest: Manifest, world_size: int, steps: int, state: dict | None = None, workers: int = 0
) -> tuple[list[list[list[bytes]]], dict]:
    """Return the packs of each step in the order of lanes, and the state after them."""
    ranks, states = list[list[StepPacks]](), []
    for rank in range(world_size):
        loader = PackLoader(plan(manifest, workers=workers), rank=rank, world_size=world_size)
        ranks.append(list(itertools.islice(loader.steps(state), steps)))
        states.append(loader.state_after(ranks[-1][-1].step))
    result = []
    for of_ranks in zip(*ranks, strict=True):
        by_lane = zip(*(step.packs for step in of_ranks), strict=True)
        result.append([content(pack) for row in by_lane for pack in row][:LANES])
    return result, json.loads(json.dumps(merge_states(states)))


def first_pack(manifest: Manifest, **changes: object) -> ExecutedPack:
    whole = plan(manifest, **changes)
    recipe = pack_recipe(whole, whole.lane(0).next_pack(), 0)
    return Executor(manifest.class_names, 10).execute(recipe)


@pytest.fixture(scope="module")
def reference(manifest: Manifest) -> list[list[list[bytes]]]:
    return read(manifest, 1, STEPS)[0]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_world_size_makes_the_same_views(manifest, reference, world_size):
    assert read(manifest, world_size, STEPS)[0] == reference


@pytest.mark.slow
def test_worker_processes_make_the_same_views(manifest, reference):
    assert read(manifest, 1, STEPS, workers=2)[0] == reference


@pytest.mark.parametrize(("before", "after", "killed_at"), [(1, 2, 1), (3, 1, 4), (2, 4, 6)])
def test_a_run_restored_at_any_world_size_makes_the_same_views(
    manifest, reference, before, after, killed_at
):
    _, state = read(manifest, before, killed_at)
    assert read(manifest, after, STEPS - killed_at, state)[0] == reference[killed_at:]


def test_view_of_names_the_first_row_of_the_image_of_each_row(manifest):
    batch = first_pack(manifest).batch
    used = int((batch.sample_ids >= 0).sum())
    assert batch.view_of.tolist() == [
        *(VIEWS * (row // VIEWS) for row in range(used)),
        *[-1] * (48 - used),
    ]
    same_image = batch.sample_ids[:used, None] == batch.sample_ids[:used]
    assert (same_image == (batch.view_of[:used, None] == batch.view_of[:used])).all()
    assert batch.first_views.sum() == used // VIEWS
    assert (batch.labels[:used] == batch.sample_ids[:used] % 2).all()
    assert batch.weights[:used].tolist() == [1.0] * used


def test_a_sample_that_comes_twice_in_a_pack_is_two_images(manifest):
    """A small source may give a sample of two epochs to one pack."""
    whole = plan(manifest)
    twice = whole.size_images(np.array([4, 4]), np.array([0, 1]))
    batch = Executor(manifest.class_names, 10).execute(pack_recipe(whole, twice, 0)).batch
    assert batch.sample_ids[:6].tolist() == [4] * 6
    assert batch.view_of[:6].tolist() == [0, 0, 0, 3, 3, 3]


def test_rows_of_joined_packs_still_name_their_images(manifest):
    loader = PackLoader(plan(manifest))
    packs = next(iter(loader.steps(None))).packs
    joined = join_packs(packs, "cpu")
    for number, pack in enumerate(packs):
        own = joined.view_of[48 * number : 48 * (number + 1)]
        assert (own[pack.view_of >= 0] == pack.view_of[pack.view_of >= 0] + 48 * number).all()
        assert (own[pack.view_of < 0] == -1).all()
    assert joined.first_views.sum() == sum(int(pack.first_views.sum()) for pack in packs)
    assert (joined.sample_ids[joined.view_of[joined.view_of >= 0]] == joined.sample_ids[
        joined.view_of >= 0
    ]).all()  # fmt: skip


def test_packs_of_single_views_have_no_view_of(manifest):
    assert first_pack(manifest, views=1).batch.view_of is None


def test_an_image_is_read_and_decoded_once_for_all_its_views(manifest, monkeypatch):
    decoded, read_images = [], []

    def counted(data: bytes, **options: object):
        decoded.append(len(data))
        return decode(data, **options)

    monkeypatch.setattr(executor_module, "decode", counted)
    whole = plan(manifest)
    recipe = pack_recipe(whole, whole.lane(0).next_pack(), 0)
    executor = Executor(manifest.class_names, 10)
    inner = executor._reader.read

    def noted(images, at_once):
        read_images.extend(images)
        return inner(images, at_once)

    monkeypatch.setattr(executor._reader, "read", noted)
    batch = executor.execute(recipe).batch
    assert len(decoded) == len(read_images) == len(recipe.images)
    assert batch.num_images == VIEWS * len(recipe.images)


def test_the_pixels_of_a_view_are_its_own_part_of_the_image(manifest):
    """Each view equals its recipe applied alone to the decoded image."""
    whole = plan(manifest, drop=DropConfig("constant", 0.4))
    recipe = pack_recipe(whole, whole.lane(0).next_pack(), 0)
    executor = Executor(manifest.class_names, 10)
    batch = executor.execute(recipe).batch
    row = index = 0
    read = executor._reader.read(recipe.images, 8)
    samples = [sample for some, _ in read for sample in some]
    for image, sample in zip(recipe.images, samples, strict=True):
        pixels = decode(sample.image, scale=image.scale).pixels
        for view in image.views:
            height, width = pixels.shape[:2]
            top, left = round(view.box.top * height), round(view.box.left * width)
            bottom = round((view.box.top + view.box.side) * height)
            right = round((view.box.left + view.box.side) * width)
            part = torch.from_numpy(pixels[top:bottom, left:right].copy()).permute(2, 0, 1)[None]
            size = (view.grid[0] * 8, view.grid[1] * 8)
            shown = torch.nn.functional.interpolate(
                part.float(), size=size, mode="bicubic", antialias=True
            )[0].clamp(0, 255)
            shown = shown.flip(2) if view.flip else shown
            cells = shown.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 3, 4, 0).flatten(0, 1)
            expected = cells.flatten(1)[torch.from_numpy(kept_patches([view])[0])]
            found = batch.patches[row : row + view.keep].float()
            assert (found - expected).abs().mean() < 1
            assert batch.lengths[index] == view.keep
            row, index = row + view.keep, index + 1


def test_an_image_that_cannot_be_decoded_costs_all_its_views_and_nothing_else(manifest, damaged):
    whole, sick = plan(manifest), plan(damaged)
    for lane in range(LANES):
        packs = list(itertools.islice(whole.lane(lane), 8))
        hit = [pack for pack in packs if BROKEN in pack.sample_ids]
        if hit:
            break
    healthy = Executor(manifest.class_names, 10).execute(pack_recipe(whole, hit[0], 0))
    made = Executor(damaged.class_names, 10).execute(pack_recipe(sick, hit[0], 0))
    assert [rejected.sample_id for rejected in made.rejected] == [BROKEN]
    lost = made.batch.sample_ids == BROKEN
    assert lost.sum() == VIEWS
    assert (made.batch.weights[lost] == 0).all()
    assert (made.batch.labels[lost] == -1).all()
    assert made.batch.num_images == healthy.batch.num_images - VIEWS
    bounds = made.batch.cu_seqlens.tolist()
    for index in range(healthy.batch.num_images):
        rows = slice(bounds[index], bounds[index + 1])
        expected = torch.zeros(1, dtype=torch.uint8) if lost[index] else healthy.batch.patches[rows]
        assert (made.batch.patches[rows] == expected).all()
    step = StepPacks(0, (made.batch,), (0,), 0, 0, 0, True, made.rejected)
    assert step.num_rejected == VIEWS
    assert Streaks().update(step) == 1


def test_the_ledger_counts_samples_once_and_views_as_often_as_they_are_seen(manifest):
    batch = first_pack(manifest).batch
    samples = used_samples(batch)
    assert used_sample_ids(batch) == [i for i in samples for _ in range(VIEWS)]
    assert len(samples) == len(set(samples))


def test_an_epoch_shows_every_image_once_in_every_view(manifest):
    whole = Plan(manifest, config(views=VIEWS), LANES, max_epochs=1)
    seen: list[int] = []
    for step in PackLoader(whole).steps(None):
        for pack in step.packs:
            seen += used_sample_ids(pack)
        if not step.more:
            break
    assert sorted(seen) == [i for i in range(91) for _ in range(VIEWS)]
