"""Remote shards behind a local HTTP server that fails in every way it can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards import remote
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.retry import PermanentError
from tests.data_pipeline.shard_fixtures import labelled, write_shard
from tests.data_pipeline.shard_server import ShardServer, serve


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    folder = tmp_path / "remote"
    for number in range(3):
        write_shard(folder / f"{number}.tar", labelled(5 + number, first=10 * number))
    (folder / "blob").write_bytes(np.random.default_rng(0).bytes(100_000))
    monkeypatch.setenv("ZETA_INDEX_DIR", str(tmp_path / "index"))
    with serve(folder) as running:
        yield running


@pytest.mark.parametrize("fault", [429, 500, 503, "reset", "short"])
def test_what_passes_is_tried_again(server, fault):
    server.faults.extend([fault, fault])
    content = (server.folder / "blob").read_bytes()
    assert remote.read_range(f"{server.url}/blob", 1000, 50_000) == content[1000:51_000]
    assert server.gets("blob") == 3


def test_the_pause_a_server_asks_for_is_kept(server):
    server.faults.append(429)
    remote.read_range(f"{server.url}/blob", 0, 10)
    times = [time for _, _, _, time in server.requests]
    assert times[1] - times[0] >= 1


@pytest.mark.parametrize("fault", [404, 403, 400])
def test_what_does_not_pass_fails_at_once_with_url_and_byte(server, fault):
    server.always = fault
    with pytest.raises(PermanentError, match="at byte 77") as error:
        remote.read_range(f"{server.url}/blob", 77, 10)
    assert error.value.filename == f"{server.url}/blob"
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", [500, "reset", "short"])
def test_after_the_deadline_the_failure_names_url_and_byte(server, fault):
    server.always = fault
    with pytest.raises(OSError, match="at byte 77") as error:
        remote.read_range(f"{server.url}/blob", 77, 10, deadline_s=0.5)
    assert error.value.filename == f"{server.url}/blob"
    assert len(server.requests) > 1


def test_size_and_etag_are_told_despite_failures(server):
    nbytes, stamp = remote.stat(f"{server.url}/blob")
    assert nbytes == 100_000
    server.faults.extend([500, "reset"])
    assert remote.stat(f"{server.url}/blob") == (nbytes, stamp)
    (server.folder / "blob").write_bytes(bytes(100_000))
    assert remote.stat(f"{server.url}/blob") != (nbytes, stamp)
    with pytest.raises(PermanentError, match="no such object"):
        remote.stat(f"{server.url}/nothing")


def test_a_download_keeps_what_has_arrived(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "CHUNK", 30_000)
    server.faults.extend(["short", "reset", 500])
    remote.download(f"{server.url}/blob", tmp_path / "copy", 100_000)
    assert (tmp_path / "copy").read_bytes() == (server.folder / "blob").read_bytes()
    assert [first for _, _, first, _ in server.requests] == [0, 0, 0, 0, 30_000, 60_000, 90_000]


def test_a_download_that_fails_leaves_nothing(server, tmp_path):
    server.always = 500
    with pytest.raises(OSError, match="HTTP 500"):
        remote.download(f"{server.url}/blob", tmp_path / "copy", 100_000, deadline_s=0.3)
    assert list(tmp_path.glob("*copy*")) == []


def test_a_server_without_ranges_will_do(server):
    server.ranges = False
    content = (server.folder / "blob").read_bytes()
    assert remote.read_range(f"{server.url}/blob", 5, 100) == content[5:105]


def test_nobody_at_the_address_is_an_error_with_the_url():
    with pytest.raises(OSError, match=r"ClientConnectorError|Connect"):
        remote.read_range("http://127.0.0.1:9/x.tar", 0, 10, deadline_s=0.2)


def test_an_index_of_urls_is_that_of_the_files(server):
    server.faults.extend([500, "short"])
    far = index_shards(f"{server.url}/{{0..2}}.tar")
    near = index_shards(server.folder)
    assert np.array_equal(far.samples, near.samples)
    assert [shard.path for shard in far.shards] == [f"{server.url}/{n}.tar" for n in range(3)]
    before = len(server.requests)
    again = index_shards(f"{server.url}/{{0..2}}.tar")
    assert again.fingerprint == far.fingerprint
    tars = [method for method, path, _, _ in server.requests[before:] if path.endswith(".tar")]
    assert set(tars) == {"HEAD"}


def test_a_class_map_beside_remote_shards_is_used(server):
    (server.folder / "classes.json").write_text('["a", "b", "c"]')
    assert index_shards(f"{server.url}/0.tar").class_names == ("a", "b", "c")
    assert Manifest.open(f"{server.url}/0.tar").class_names == ("a", "b", "c")


def test_a_remote_shard_that_changed_or_is_gone_is_refused_by_name(server):
    spec = f"{server.url}/{{0..2}}.tar"
    index_shards(spec)
    content = (server.folder / "1.tar").read_bytes()
    (server.folder / "1.tar").unlink()
    with pytest.raises(ValueError, match=r"1\.tar cannot be read: no such object"):
        Manifest.open(spec)
    (server.folder / "1.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"1\.tar changed since it was indexed"):
        Manifest.open(spec)


def test_remote_shards_without_an_index_say_where_it_was_looked_for(server):
    with pytest.raises(ValueError, match=r"no index in .*index/http/.*ZETA_INDEX_DIR"):
        Manifest.open(f"{server.url}/0.tar")


def test_an_unknown_protocol_is_a_user_error():
    with pytest.raises(ValueError, match="nowhere://bucket"):
        remote.stat("nowhere://bucket/a.tar")


def test_other_stores_of_fsspec_work_the_same_way(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("ZETA_INDEX_DIR", str(tmp_path / "index"))
    path = write_shard(tmp_path / "0.tar", labelled(4))
    store = fsspec.filesystem("memory")
    for number in range(2):
        store.pipe_file(f"/bucket/{number}.tar", path.read_bytes())
    for spec in ("memory://bucket/", "memory://bucket/*.tar", "memory://bucket/{0..1}.tar"):
        manifest = index_shards(spec)
        assert [shard.path for shard in manifest.shards] == [
            "memory://bucket/0.tar",
            "memory://bucket/1.tar",
        ]
        assert len(manifest.samples) == 8
    store.rm("/bucket/1.tar")
    with pytest.raises(ValueError, match=r"1\.tar is indexed but missing"):
        Manifest.open("memory://bucket/")
