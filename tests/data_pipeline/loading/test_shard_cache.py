"""The cache of remote shards: bounded, filled in order, and never in the way of a pack."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.loading.loader import PackLoader
from data_pipeline.loading.shard_cache import ShardCache, check_cache_size, failure_path
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest, Shard
from tests.data_pipeline.loading.test_loader import content
from tests.data_pipeline.shard_server import ShardServer, serve
from tests.data_pipeline.synthetic import config, write_shards
from zeta.packed import StepPacks

SHARD_BYTES = 50_000


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    folder = tmp_path / "remote"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.tar").write_bytes(bytes([number]) * SHARD_BYTES)
    monkeypatch.setenv("ZETA_INDEX_DIR", str(tmp_path / "index"))
    with serve(folder) as running:
        yield running


def shard(server: ShardServer, number: int) -> Shard:
    return Shard(f"{server.url}/{number}.tar", SHARD_BYTES, 0, 10 * number, 10)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def open_cache(tmp_path: Path, shards: int, deadline_s: float = 5) -> ShardCache:
    return ShardCache(tmp_path / "cache", shards * SHARD_BYTES, deadline_s)


def test_shards_are_fetched_soonest_first_as_far_as_there_is_room(server, tmp_path):
    cache = open_cache(tmp_path, 2)
    shards = [shard(server, number) for number in range(5)]
    cache.want(shards)
    assert [cache.locate(s) is not None for s in shards] == [True, True, False, False, False]
    for s in shards[:2]:
        wait_for(cache.path(s).exists)
    pinned = cache.path(shards[0])
    cache.pin([pinned])
    cache.want(shards[2:])  # 1 makes room; 0 is being read by a pack
    wait_for(cache.path(shards[2]).exists)
    assert pinned.exists()
    assert not cache.path(shards[1]).exists()
    assert cache.nbytes <= 2 * SHARD_BYTES
    cache.unpin([pinned])
    cache.want(shards[2:])
    wait_for(cache.path(shards[3]).exists)
    assert cache.path(shards[3]).read_bytes() == bytes([3]) * SHARD_BYTES
    assert not pinned.exists()
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 2 * SHARD_BYTES
    cache.close()


def test_whole_shards_of_an_earlier_start_are_used_again(server, tmp_path):
    first = open_cache(tmp_path, 3)
    first.want([shard(server, 0)])
    wait_for(first.path(shard(server, 0)).exists)
    first.close()
    (tmp_path / "cache" / ".half.tar.1.tmp").write_bytes(b"half")
    second = open_cache(tmp_path, 3)
    second.want([shard(server, 0)])
    second.close()
    assert server.gets("0.tar") == 1
    assert len(list((tmp_path / "cache").glob("[!l]*"))) == 1


def test_two_processes_at_once_have_folders_of_their_own(tmp_path):
    first, second = open_cache(tmp_path, 1), open_cache(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.glob("cache*")) == ["cache", "cache-1"]
    first.close()
    third = open_cache(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.glob("cache*")) == ["cache", "cache-1"]
    second.close()
    third.close()


def test_a_download_that_fails_says_so_where_its_readers_wait(server, tmp_path):
    cache = open_cache(tmp_path, 3, deadline_s=0.3)
    server.always = 500
    cache.want([shard(server, 0)])
    failure = failure_path(cache.path(shard(server, 0)))
    wait_for(failure.exists)
    assert "HTTP 500" in failure.read_text()
    cache.close()


def test_a_cache_too_small_for_the_lanes_is_refused_with_both_numbers():
    shards = [Shard(f"s3://b/{n}.tar", 2 * 10**9, 0, n, 1) for n in range(100)]
    check_cache_size(shards, lanes=8, group_shards=2, gb=32)
    with pytest.raises(ValueError, match=r"data\.cache_gb is 31, but 8 lanes .* need 32 GB"):
        check_cache_size(shards, lanes=8, group_shards=2, gb=31)
    check_cache_size(shards, lanes=800, group_shards=2, gb=200)  # all of them fit


LANES = 3


def read_steps(
    spec: str, steps: int, first: dict | None = None, **changes: object
) -> list[list[StepPacks]]:
    plan = Plan(Manifest.open(spec), config(**changes), LANES)
    return [list(itertools.islice(PackLoader(plan).steps(first), steps))]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_training_from_urls_reads_the_packs_of_the_files(server, tmp_path, workers):
    write_shards(server.folder, [30, 40, 35, 30, 42, 31])
    spec = f"{server.url}/shard-{{000..005}}.tar"
    near, far = index_shards(str(server.folder / "shard-00?.tar")), index_shards(spec)
    assert near.fingerprint == far.fingerprint  # shards may move
    largest = max(s.nbytes for s in far.shards)
    room = (LANES + 0.5) * largest
    server.faults.extend([500, "short", 429])
    steps = 14  # four epochs
    seen = 0

    def watched() -> Iterator[StepPacks]:
        nonlocal seen
        settings = config(
            workers=workers, cache_dir=str(tmp_path / "c"), cache_gb=room / 1e9, pack_window=16
        )
        for step in PackLoader(Plan(far, settings, LANES)).steps(None):
            files = list((tmp_path / "c" / "rank_0").iterdir())
            seen = max(seen, sum(path.stat().st_size for path in files if path.exists()))
            yield step

    remote = [list(itertools.islice(watched(), steps))]
    local = read_steps(str(server.folder / "shard-00?.tar"), steps, pack_window=16)
    assert content(remote) == content(local)
    assert remote[0][-1].epoch >= 1
    assert largest < seen <= room


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_away_fails_the_run_with_shard_and_byte(server, tmp_path, workers):
    write_shards(server.folder, [30, 40, 35])
    spec = f"{server.url}/shard-{{000..002}}.tar"
    index_shards(spec)
    (server.folder / "shard-001.tar").rename(server.folder / "gone")
    manifest = Manifest.open(f"{server.url}/shard-{{000,002}}.tar")
    assert len(manifest.shards) == 2
    (server.folder / "gone").rename(server.folder / "shard-001.tar")
    settings = config(workers=workers, cache_dir=str(tmp_path / "c"), read_deadline_s=0.5)
    loader = PackLoader(Plan(Manifest.open(spec), settings, LANES))
    (server.folder / "shard-001.tar").unlink()
    with pytest.raises(OSError, match=r"no such object.*at byte \d+") as error:
        list(itertools.islice(loader.steps(None), 10))
    assert error.value.filename == f"{server.url}/shard-001.tar"


def test_a_run_whose_cache_is_too_small_does_not_start(server, tmp_path):
    write_shards(server.folder, [30, 40, 35, 33])
    index_shards(f"{server.url}/shard-{{000..003}}.tar")
    with pytest.raises(ValueError, match=r"data\.cache_gb is 0\.0001, but 3 lanes"):
        read_steps(
            f"{server.url}/shard-{{000..003}}.tar", 1, cache_dir=str(tmp_path), cache_gb=1e-4
        )
