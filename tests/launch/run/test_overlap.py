"""Held-out shards that are trained on too are found, however they are spelled."""

from __future__ import annotations

import os
import shutil

import pytest

from data_pipeline.shards.index import index_shards
from launch.run.overlap import shared_shards
from tests.data_pipeline.shard_fixtures import encode, labelled, photo, write_shard
from tests.data_pipeline.shard_server import serve


@pytest.fixture
def trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZETA_INDEX_DIR", str(tmp_path / "index"))
    for number in range(2):
        write_shard(tmp_path / "shards" / f"{number}.tar", labelled(3, 3 * number))
    return index_shards("shards")


def spelled(tmp_path, how):
    folder = tmp_path / "shards"
    if how == "absolute":
        return folder
    if how == "link":
        (tmp_path / "link").symlink_to(folder)
        return tmp_path / "link"
    (tmp_path / how).mkdir()
    for path in folder.glob("*.tar"):
        (os.link if how == "hard link" else shutil.copy)(path, tmp_path / how / f"as-{path.name}")
    return tmp_path / how


@pytest.mark.parametrize("how", ["absolute", "link", "hard link", "copy"])
def test_a_shard_is_the_same_by_any_name_link_or_copy(trained_on, tmp_path, how):
    assert len(shared_shards(index_shards(spelled(tmp_path, how)), trained_on)) == 2


def test_a_shard_behind_a_url_is_the_same(trained_on, tmp_path):
    with serve(tmp_path / "shards") as server:
        remote = index_shards([f"{server.url}/{number}.tar" for number in range(2)])
        assert len(shared_shards(remote, trained_on)) == 2


def test_other_pictures_of_the_same_sizes_are_not_the_same(tmp_path):
    sets = []
    for number, folder in enumerate(("train", "val")):
        images = [(f"{i}.bmp", encode(photo(16, 16, 10 * number + i), "BMP")) for i in range(3)]
        write_shard(tmp_path / folder / "0.tar", images)
        sets.append(index_shards(tmp_path / folder))
    assert (sets[0].samples == sets[1].samples).all()
    assert shared_shards(*sets) == []
