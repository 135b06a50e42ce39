from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from data_pipeline.shards.build import build_shards
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.stats import shard_stats
from data_pipeline.verify import verify_shards
from tests.data_pipeline.shard_fixtures import encode, jpeg, labelled, photo, tar_bytes, write_shard
from tests.data_pipeline.shard_server import serve


def bad_shard(path: Path) -> Path:
    image = jpeg(60, 80)
    return write_shard(
        path,
        [
            ("good.jpg", image),
            ("good.txt", "caption \u96ea".encode()),
            ("cut.jpg", image[: len(image) // 2]),
            ("empty.jpg", b""),
            ("text.png", b"this is no image"),
            ("alone.txt", b"a caption"),
            ("latin.jpg", image),
            ("latin.txt", "caf\u00e9".encode("latin-1")),
            ("class.jpg", image),
            ("class.cls", b"zebra"),
            ("wrong.gif", encode(photo(20, 30), "PNG")),
        ],
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_each_bad_sample_is_named_with_its_reason(tmp_path, workers):
    write_shard(tmp_path / "0.tar", labelled(3))
    bad_shard(tmp_path / "1.tar")
    result = verify_shards(tmp_path, workers=workers)
    assert (result.shards, result.samples) == (2, 3 + 8)
    assert {bad.shard for bad in result.bad} == {str(tmp_path / "1.tar")}
    reasons = {bad.key: bad.reason for bad in result.bad}
    assert list(reasons) == ["cut", "empty", "text", "alone", "latin", "class"]
    assert "truncated" in reasons["cut"]
    assert reasons["empty"] == "empty file"
    assert "not an image" in reasons["text"]
    assert "no image" in reasons["alone"]
    assert "caption is not UTF-8" in reasons["latin"]
    assert "zebra" in reasons["class"]


def test_what_the_header_does_not_show_is_found(tmp_path):
    image = bytearray(encode(photo(64, 64), "PNG"))
    image[len(image) // 2 : len(image) // 2 + 40] = bytes(40)
    write_shard(tmp_path / "0.tar", [("a.png", bytes(image)), ("b.jpg", jpeg())])
    assert [bad.key for bad in verify_shards(tmp_path).bad] == ["a"]


def test_a_damaged_shard_is_named_and_the_samples_before_it_are_checked(tmp_path):
    content = tar_bytes(labelled(4))
    (tmp_path / "0.tar").write_bytes(content[: len(content) // 2])
    result = verify_shards(tmp_path)
    assert 0 < result.samples < 4
    assert [(bad.key, "cut" in bad.reason) for bad in result.bad] == [("", True)]


def test_two_members_of_one_kind_are_a_fault(tmp_path):
    write_shard(tmp_path / "0.tar", [("a.jpg", jpeg()), ("a.jpg", jpeg())])
    assert ["two members" in bad.reason for bad in verify_shards(tmp_path).bad] == [True]


def test_remote_shards_can_be_verified(tmp_path, monkeypatch):
    monkeypatch.setenv("ZETA_INDEX_DIR", str(tmp_path / "index"))
    bad_shard(tmp_path / "remote" / "0.tar")
    with serve(tmp_path / "remote") as server:
        near, far = verify_shards(tmp_path / "remote"), verify_shards(f"{server.url}/0.tar")
    assert [bad[1:] for bad in far.bad] == [bad[1:] for bad in near.bad]


def test_a_caption_that_is_not_utf8_costs_nothing_where_captions_are_not_read(tmp_path):
    """Index, statistics and a build leave its bytes alone; verification names it."""
    caption = "caf\xe9".encode("latin-1")
    image = jpeg(60, 80)
    members = [("a.jpg", image), ("a.txt", b"fine"), ("bad.jpg", image), ("bad.txt", caption)]
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in/a.tar", members)
    manifest = index_shards(tmp_path / "in")
    assert list(manifest.rejections()) == []
    stats = shard_stats(manifest)
    assert (stats.images, stats.captioned) == (2, 2)
    rebuilt = build_shards(tmp_path / "in", tmp_path / "out")
    assert len(rebuilt.samples) == 2
    with tarfile.open(rebuilt.shards[0].path) as tar:
        assert tar.extractfile("bad.txt").read() == caption
    assert [line[1:] for line in verify_shards(tmp_path / "in").bad] == [
        ("bad", "caption is not UTF-8 (byte 3)")
    ]
