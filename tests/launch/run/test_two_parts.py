"""Of two parts of images, classes are matched by name, and shards in both are found."""

from __future__ import annotations

import os
import shutil

import pytest

from data_pipeline.config import DataWarning
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.index import index_shards
from launch.run.class_map import class_map
from launch.run.overlap import shared_shards
from tests.data_pipeline.shard_fixtures import encode, jpeg, labelled, photo, write_shard
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


NUMBERS_AS_TEXT = tuple(sorted(map(str, range(12))))
"""0, 1, 10, 11, 2, ...: the names of class folders that are called by their indices."""


def shards(folder, names):
    samples = [(f"s{i}", {"jpg": jpeg(16, 16, i), "cls": str(i).encode()}) for i in range(12)]
    return build_shards(samples, folder, class_names=names)


@pytest.mark.parametrize("named", ["the model", "the shards"])
def test_names_that_are_numbers_out_of_order_are_never_compared_by_index(tmp_path, named):
    of_model = NUMBERS_AS_TEXT if named == "the model" else None
    of_shards = None if named == "the model" else NUMBERS_AS_TEXT
    with pytest.raises(ValueError, match="the class named 10 has the index 2, so labels would be"):
        class_map(of_model, 12, shards(tmp_path, of_shards), whose="the model's")


@pytest.mark.parametrize("named", ["the model", "the shards"])
def test_a_class_map_on_one_side_only_is_said(tmp_path, named):
    names = tuple("abcdefghijkl")
    of_model, of_shards = (names, None) if named == "the model" else (None, names)
    with pytest.warns(DataWarning, match="have names .*, and .* do not: their labels are compared"):
        classes = class_map(of_model, 12, shards(tmp_path, of_shards), whose="the model's")
    assert classes == list(range(12))


def test_a_class_index_beyond_the_classes_says_whose_they_are(tmp_path):
    message = "class index 11 of the shards is beyond data.probe_shards's 3 classes; add some"
    with pytest.raises(ValueError, match=message):
        class_map(None, 3, shards(tmp_path, None), whose="data.probe_shards's", remedy="add some")


def test_names_in_another_order_are_matched_by_name(tmp_path):
    names = tuple("abcdefghijkl")
    assert class_map(names[::-1], 12, shards(tmp_path, names), whose="the model's") == [
        *range(11, -1, -1)
    ]
