"""Storage that changes, disappears, fails for a while or hangs, under a loader that reads it."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.loading import fetch
from data_pipeline.loading.fetch import SampleReader
from data_pipeline.loading.loader import PackLoader
from data_pipeline.loading.recipe import ImageRecipe, pack_recipe
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.retry import PermanentError, with_retries
from data_pipeline.shards.sample import Sample
from data_pipeline.shards.tar_reader import TarError
from tests.data_pipeline.shard_fixtures import encode, jpeg, photo, write_shard
from tests.data_pipeline.synthetic import config, write_shards
from zeta.packed import Rejected

LANES = 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards = write_shards(tmp_path / "shards", [30, 30, 30])
    index_shards(shards)
    return shards


def plan(folder: Path, **changes: object) -> Plan:
    return Plan(Manifest.open(folder), config(**{"read_deadline_s": 0.5} | changes), LANES)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_deleted_under_a_run_is_retried_and_then_fails_with_shard_and_byte(folder, workers):
    loader = PackLoader(plan(folder, workers=workers))
    (folder / "shard-001.tar").unlink()
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"reading at byte \d+") as error:
        list(itertools.islice(loader.steps(None), 20))
    assert error.value.filename == str(folder / "shard-001.tar")
    assert time.monotonic() - start >= 0.15  # the first two pauses, at the least


def test_a_shard_that_comes_back_within_the_deadline_costs_nothing(folder):
    reference = [s.packs for s in itertools.islice(PackLoader(plan(folder)).steps(None), 4)]
    loader = PackLoader(plan(folder, read_deadline_s=20))
    shutil.move(folder / "shard-001.tar", folder / "away")
    threading.Timer(0.5, shutil.move, (folder / "away", folder / "shard-001.tar")).start()
    for packs, step in zip(reference, loader.steps(None), strict=False):
        for pack, other in zip(packs, step.packs, strict=True):
            assert (pack.patches == other.patches).all()
            assert (pack.weights == other.weights).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_replaced_under_a_run_is_refused_by_name(folder, workers):
    loader = PackLoader(plan(folder, workers=workers))
    shard = folder / "shard-001.tar"
    write_shards(folder / "other", [30], seed=9)
    (folder / "other" / "shard-000.tar").replace(shard)
    with pytest.raises(TarError, match=r"shard-001\.tar: the shard changed since it was indexed"):
        list(itertools.islice(loader.steps(None), 20))


def images(folder: Path) -> tuple[ImageRecipe, ...]:
    whole = plan(folder)
    return pack_recipe(whole, whole.lane(0).next_pack(), 0).images


def read_all(recipes: tuple[ImageRecipe, ...]) -> list[Sample]:
    return [sample for samples, _ in SampleReader(10).read(recipes, 8) for sample in samples]


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a shard is in memory: every read waits for storage."""
    monkeypatch.setattr(fetch, "read_cached_sample", lambda *_: None)


def test_what_is_in_memory_is_read_without_a_thread_and_is_the_same(folder, monkeypatch):
    recipes = images(folder)
    with monkeypatch.context() as without:
        without.setattr(fetch, "read_sample", None)
        at_once = read_all(recipes)
    for path in folder.glob("*.tar"):
        with path.open("rb") as shard:
            os.fsync(shard.fileno())
            os.posix_fadvise(shard.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert read_all(recipes) == at_once
    monkeypatch.setattr(fetch, "_LARGEST_AT_ONCE", min(recipe.nbytes for recipe in recipes))
    assert read_all(recipes) == at_once


def test_a_shard_is_opened_once_for_several_samples_in_memory(folder, monkeypatch):
    opened: list[str] = []

    class Counted(fetch.ShardFile):
        def __init__(self, path: str) -> None:
            super().__init__(path)
            opened.append(path)

    monkeypatch.setattr(fetch, "ShardFile", Counted)
    recipes = images(folder)
    read_all(recipes)
    groups = [recipes[start : start + 8] for start in range(0, len(recipes), 8)]
    assert opened == [path for group in groups for path in dict.fromkeys(i.shard for i in group)]
    assert len(opened) < len(recipes)


def test_samples_stay_in_order_where_the_first_that_is_not_in_memory_comes_amid_others(
    folder, monkeypatch
):
    recipes, real = images(folder), fetch.read_cached_sample
    whole = read_all(recipes)
    for missing in (0, 3, 8, len(recipes) - 1):
        asked = itertools.count()
        monkeypatch.setattr(
            fetch,
            "read_cached_sample",
            lambda *place, asked=asked, missing=missing: (
                None if next(asked) == missing else real(*place)
            ),
        )
        assert read_all(recipes) == whole


@pytest.mark.usefixtures("cold")
def test_a_read_that_fails_for_a_while_is_tried_again(folder, monkeypatch):
    real, failures = fetch.read_sample, itertools.count()

    def flaky(*arguments: object) -> Sample:
        if next(failures) < 3:
            raise OSError(errno.EIO, "input/output error")
        return real(*arguments)

    monkeypatch.setattr(fetch, "read_sample", flaky)
    recipes = images(folder)
    samples = read_all(recipes)
    assert len(samples) == len(recipes)
    assert next(failures) == len(recipes) + 3


@pytest.mark.usefixtures("cold")
def test_a_disk_that_hangs_fails_with_shard_and_byte(folder, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(fetch, "read_sample", lambda *_: release.wait(30))
    recipes = images(folder)
    with pytest.raises(TimeoutError, match=rf"reading at byte {recipes[0].offset}") as error:
        list(SampleReader(0.2).read(recipes, 8))
    release.set()
    assert error.value.filename == recipes[0].shard


@pytest.mark.usefixtures("cold")
def test_a_slow_disk_is_waited_for(folder, monkeypatch):
    real = fetch.read_sample

    def slow(*arguments: object) -> Sample:
        time.sleep(0.02)
        return real(*arguments)

    monkeypatch.setattr(fetch, "read_sample", slow)
    recipes = images(folder)
    start = time.monotonic()
    assert len(read_all(recipes)) == len(recipes)
    # Several reads are on their way at a time.
    assert time.monotonic() - start < 0.02 * len(recipes)


def test_pauses_grow_and_what_cannot_pass_is_not_tried_again():
    times = []

    def fail() -> None:
        times.append(time.monotonic())
        raise OSError("passing")

    with pytest.raises(OSError, match="passing"):
        with_retries(fail, deadline_s=1)
    assert 3 <= len(times) <= 6
    assert times[-1] - times[-2] > times[1] - times[0]
    assert times[-1] - times[0] <= 1
    times.clear()

    def fail_for_good() -> None:
        times.append(time.monotonic())
        raise PermanentError("lasting")

    with pytest.raises(PermanentError):
        with_retries(fail_for_good, deadline_s=1)
    assert len(times) == 1


def test_every_kind_of_bad_sample_costs_its_own_slot_alike_on_every_replay(tmp_path):
    image, members = jpeg(48, 64), []
    at = image.index(b"\xff\xc0") + 5
    bad = {
        "truncated": image[: len(image) // 2],
        "zero": b"",
        "text": b"this is no image",
        "bomb": image[:at] + b"\xea\x60\xea\x60" + image[at + 4 :],  # 60,000 x 60,000
    }
    for number in range(12):
        members.append((f"good{number:02d}.jpg", image))
    members.append(("extension.gif", encode(photo(48, 64), "PNG")))
    frames = [photo(48, 64, seed) for seed in range(3)]
    members.append(("moving.gif", encode(frames[0], "GIF", save_all=True, append_images=frames)))
    members += [(f"{name}.jpg", content) for name, content in bad.items()]
    write_shard(tmp_path / "0.tar", members)
    manifest = index_shards(tmp_path)
    # What the header shows is known before the plan; a cut picture only when it is decoded.
    assert {r.key for r in manifest.rejections()} == {"zero", "text", "bomb"}

    def rejected() -> list[Rejected]:
        whole = Plan(manifest, config(), 1, max_epochs=1)
        seen, lost = [], []
        for step in PackLoader(whole).steps(None):
            for pack in step.packs:
                seen += pack.sample_ids[pack.weights > 0].tolist()
            lost += step.rejected
            if not step.more:
                break
        assert len(seen) == 14
        return lost

    first = rejected()
    assert [(line.key, "truncated" in line.reason) for line in first] == [("truncated", True)]
    assert rejected() == first
