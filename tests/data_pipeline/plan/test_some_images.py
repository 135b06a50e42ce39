"""Some of the images of large shards: which, and that they are read as before."""

import numpy as np
import pytest

from data_pipeline.plan import some_images as module
from data_pipeline.plan.some_images import class_counts, some_images
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.manifest import Manifest
from tests.data_pipeline.shard_fixtures import jpeg

LABELS = [i % 3 for i in range(30)] + [3, 3] + [None] * 4
"""Ten images each of three classes, two of a fourth, and four without one."""


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    samples = []
    for i, label in enumerate(LABELS):
        files = {"jpg": jpeg(40 + i, 40, i)}  # the height tells the sample
        if label is not None:
            files["cls"] = str(label).encode()
        samples.append((f"s{i}", files))
    samples.append(("broken", {"jpg": b"no picture", "cls": b"0"}))
    build_shards(samples, folder, max_count=7)
    return Manifest.open(str(folder))


def numbers(chosen):
    return (chosen.samples["height"].astype(int) - 40).tolist()


def test_classes_are_counted_without_images_that_cannot_be_used(manifest):
    assert class_counts(manifest).tolist() == [10, 10, 10, 2]


def test_each_class_gets_equally_many_as_far_as_it_has_them(manifest):
    chosen = some_images(manifest, 14, by_class=True)
    assert np.bincount(chosen.samples["label"]).tolist() == [4, 4, 4, 2]


def test_without_classes_any_image_is_as_likely(manifest):
    counts = np.bincount(some_images(manifest, 16, by_class=False).samples["label"], minlength=4)
    assert counts.sum() == 16
    assert counts.max() - counts[:3].min() > 0  # not dealt out by class


@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, 36])
def test_the_choice_does_not_depend_on_how_the_manifest_is_read(
    manifest, monkeypatch, by_class, chunk
):
    whole = some_images(manifest, 11, by_class=by_class)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    parts = some_images(manifest, 11, by_class=by_class)
    assert numbers(parts) == numbers(whole)
    assert parts.fingerprint == whole.fingerprint


def test_a_smaller_number_chooses_a_part_of_a_larger_one(manifest):
    few, more = (some_images(manifest, most, by_class=True) for most in (6, 20))
    assert set(numbers(few)) < set(numbers(more))
    assert few.fingerprint != more.fingerprint


def test_the_rows_stay_those_of_their_shards(manifest):
    chosen = some_images(manifest, 9, by_class=False)
    assert sum(shard.count for shard in chosen.shards) == len(chosen.samples) == 9
    row_of = {number: row for row, number in enumerate(numbers(manifest))}
    for row, number in enumerate(numbers(chosen)):
        before = row_of[number]
        shard = chosen.shards[int(chosen.shard_of(row))]
        assert shard.path == manifest.shards[int(manifest.shard_of(before))].path
        assert chosen.samples[row] == manifest.samples[before]
        assert chosen.known_checksums[row] == manifest.known_checksums[before] != 0


def test_all_images_are_chosen_where_there_are_no_more(manifest):
    assert sorted(numbers(some_images(manifest, 10**9, by_class=True))) == list(range(32))
