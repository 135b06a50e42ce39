"""Classes of a model and of shards are matched by name, or the mismatch is said."""

from __future__ import annotations

import pytest

from data_pipeline.config import DataWarning
from data_pipeline.shards.build import build_shards
from launch.run.class_map import class_map
from tests.data_pipeline.shard_fixtures import jpeg

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
