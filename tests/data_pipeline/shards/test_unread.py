"""What of a shard will not be read is counted by kind, with an example, and said."""

from __future__ import annotations

import pytest

from data_pipeline.shards.index import index_shards
from data_pipeline.shards.unread import unread_lines
from data_pipeline.verify import verify_shards
from launch.cli import entry_point
from tests.data_pipeline.shard_fixtures import jpeg, labelled, write_shard


def shard(folder, names):
    content = {"jpg": jpeg(), "cls": b"1", "txt": b"a caption"}
    return write_shard(
        folder / "0.tar", [(name, content[name.rpartition(".")[2]]) for name in names]
    )


def frames(clips, count):
    keys = [f"clip{c}.{f:04d}" for c in range(clips) for f in range(count)]
    return [f"{key}.{suffix}" for key in keys for suffix in ("jpg", "cls")]


def test_images_and_labels_of_keys_with_dots_are_counted_with_an_example(tmp_path):
    shard(tmp_path, frames(3, 10))
    manifest = index_shards(tmp_path)
    assert len(manifest.samples) == 3
    found = {item.kind.partition(" ")[0]: (item.count, item.example) for item in manifest.unread}
    assert found == {"image": (27, "clip0.0001.jpg"), "label": (27, "clip0.0001.cls")}
    assert verify_shards(tmp_path).unread == manifest.unread
    *counts, advice = unread_lines(manifest.unread)
    assert counts[0].startswith("not read: 27 x image beside the one that is read under its key")
    assert "write their keys without dots" in advice


@pytest.mark.parametrize(
    "names",
    [
        ("2021-01-01T10.20.30.jpg", "2021-01-01T10.20.30.cls"),
        ("photo.v2.jpg", "photo.v2.txt"),
        ("0.input.jpg", "0.output.cls"),
        ("a.jpg", "a.cls", "a.txt"),
    ],
)
def test_what_is_unambiguous_is_read_and_nothing_is_said(tmp_path, names):
    shard(tmp_path, names)
    manifest = index_shards(tmp_path)
    assert manifest.samples["flags"].item() != 0
    assert not list(unread_lines(manifest.unread))


def test_several_captions_or_labels_under_a_key_are_said(tmp_path):
    shard(tmp_path, ["a.jpg", "a.cls", "a.other.cls", "a.long.txt", "a.short.txt"])
    kinds = {item.kind.partition(" ")[0]: item.count for item in index_shards(tmp_path).unread}
    assert kinds == {"label": 1, "caption": 2}


@pytest.mark.parametrize("images_first", [True, False])
def test_labels_that_lie_apart_from_their_images_are_named_with_the_remedy(tmp_path, images_first):
    order = ("jpg", "cls") if images_first else ("cls", "jpg")
    shard(tmp_path, [f"{key}.{suffix}" for suffix in order for key in range(6)])
    manifest = index_shards(tmp_path)
    assert manifest.reasons().startswith("6 x its image lies elsewhere in the shard")
    assert "tar --sort=name" in manifest.reasons()
    assert {bad.reason for bad in verify_shards(tmp_path).bad} == {
        rejection.reason for rejection in manifest.rejections()
    }


def test_a_label_without_any_image_stays_what_it_is(tmp_path):
    shard(tmp_path, ["a.jpg", "b.cls"])
    assert index_shards(tmp_path).reasons() == "1 x no image among its members"


def test_a_format_that_is_not_read_is_named(tmp_path):
    write_shard(tmp_path / "0.tar", [("a.heic", b"x"), ("a.cls", b"1"), *labelled(2)])
    assert index_shards(tmp_path).reasons() == "1 x no image among its members (.heic)"


def test_index_and_verify_say_it(tmp_path, capsys):
    shard(tmp_path, [*frames(1, 3), "x.cls", "x.jpg", "y.cls"])
    assert entry_point(["shards", "index", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "not read: 2 x image beside the one that is read under its key" in said
    assert "1 samples cannot be used (1 x no image among its members)" in said
    assert entry_point(["shards", "verify", str(tmp_path), "--workers", "1"]) == 1
    assert "not read: 2 x label beside" in capsys.readouterr().out
