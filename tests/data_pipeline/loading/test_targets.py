"""Labels, lists of labels and captions on their way from the shards into a pack."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.config import TextConfig
from data_pipeline.loading.loader import PackLoader
from data_pipeline.plan.plan import Plan
from data_pipeline.plan.summary import rejected_by_reason
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest, SampleFlag
from tests.data_pipeline.shard_fixtures import jpeg, write_shard
from tests.data_pipeline.synthetic import config

CAPTIONS = ["a cat", "naïve 世界 \U0001f600", "x", "two\nlines"]


def members(samples):
    """Return tar members of (key, content by suffix) with an image each."""
    return [
        (f"{key}.{suffix}", content)
        for key, contents in samples
        for suffix, content in {"jpg": jpeg(24, 32), **contents}.items()
    ]


def captioned(folder: Path, more=()) -> Manifest:
    samples = [
        (f"{number:03d}", {"txt": CAPTIONS[number % 4].encode()})
        if number % 2
        else (f"{number:03d}", {"json": json.dumps({"caption": CAPTIONS[number % 4]}).encode()})
        for number in range(40)
    ]
    write_shard(folder / "a.tar", members([*samples, *more]))
    return index_shards(str(folder))


def text_config(text=None, **changes):
    return config(require_captions=True, text=text or TextConfig(max_tokens=32), **changes)


def one_epoch(manifest, data, **options):
    for step in PackLoader(Plan(manifest, data, 2, max_epochs=1), **options).steps(None):
        yield step
        if not step.more:
            return


def texts_by_sample(steps):
    found = {}
    for step in steps:
        for pack in step.packs:
            bounds = pack.text_cu_seqlens.tolist()
            assert bounds[-1] == len(pack.text_ids)
            assert tuple(np.diff(bounds)) == pack.text_lengths
            for i, sample in enumerate(pack.sample_ids.tolist()):
                if pack.weights[i]:
                    ids = pack.text_ids[bounds[i] : bounds[i + 1]]
                    found[sample] = bytes(ids.tolist()).decode()
                else:
                    assert bounds[i] == bounds[i + 1]
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_every_caption_arrives_beside_its_image(tmp_path, workers):
    manifest = captioned(tmp_path / "s")
    found = texts_by_sample(one_epoch(manifest, text_config(workers=workers)))
    assert found == {number: CAPTIONS[number % 4] for number in range(40)}


def test_text_has_one_shape_whatever_the_pack(tmp_path):
    manifest = captioned(tmp_path / "s")
    loader = PackLoader(Plan(manifest, text_config(), 3, max_epochs=1), rank=1, world_size=2)
    shapes = {
        (tuple(pack.text_ids.shape), tuple(pack.text_cu_seqlens.shape), tuple(pack.text_cut.shape))
        for _, step in zip(range(3), loader.steps(None), strict=False)
        for pack in step.packs
    }
    assert shapes == {((32 * 32,), (34,), (32,))}


def test_samples_without_a_caption_are_not_planned_and_are_counted(tmp_path):
    more = [("n1", {}), ("n2", {"txt": b""}), ("n3", {"json": b'{"caption": " "}'})]
    manifest = captioned(tmp_path / "s", more)
    assert (manifest.samples["flags"] & SampleFlag.CAPTIONED != 0).sum() == 40
    plan = Plan(manifest, text_config(), 2, max_epochs=1)
    assert plan.num_images == 40
    assert rejected_by_reason(plan) == {"no caption": 3}
    assert len(texts_by_sample(one_epoch(manifest, text_config()))) == 40


def test_captions_that_cannot_be_used_cost_their_own_pair_and_say_why(tmp_path):
    more = [
        ("b1", {"txt": b"\xff\xfe"}),
        ("b2", {"txt": b"   "}),
        ("b3", {"txt": b"y" * 33}),
        ("b4", {"txt": b"y" * 32}),
    ]
    manifest = captioned(tmp_path / "s", more)
    steps = list(one_epoch(manifest, text_config()))
    assert len(texts_by_sample(steps)) == 41
    reasons = {r.key: r.reason for step in steps for r in step.rejected}
    assert reasons.keys() == {"b1", "b2", "b3"}
    assert "caption is not UTF-8 (byte 0)" in reasons["b1"]
    assert "no caption" in reasons["b2"]
    assert "33 tokens, above data.text.max_tokens = 32" in reasons["b3"]
    for pack in (pack for step in steps for pack in step.packs):
        for i in range((pack.sample_ids >= 0).sum()):
            rows = slice(pack.cu_seqlens[i], pack.cu_seqlens[i + 1])
            assert bool(pack.patches[rows].any()) == bool(pack.weights[i])  # zeros if not used


def test_cut_captions_are_counted_where_cutting_was_asked_for(tmp_path):
    manifest = captioned(tmp_path / "s", [("b3", {"txt": b"y" * 33})])
    data = text_config(TextConfig(max_tokens=8, truncate=True))
    steps = list(one_epoch(manifest, data))
    cut = {
        sample
        for step in steps
        for pack in step.packs
        for sample in pack.sample_ids[: len(pack.text_cut)][pack.text_cut].tolist()
    }
    assert not any(step.rejected for step in steps)
    # "naive ..." and "two\nlines" are longer than 8 bytes.
    assert cut == {n for n in range(40) if n % 4 in (1, 3)} | {40}
    found = [p.text_lengths[:-1] for step in steps for p in step.packs]
    assert max(map(max, found)) == 8


def test_a_caption_without_room_in_the_budget_costs_its_pair_and_says_so(tmp_path):
    manifest = captioned(tmp_path / "s")
    data = text_config(TextConfig(max_tokens=32, budget=40), token_budget=512)
    steps = list(one_epoch(manifest, data))
    reasons = {r.reason for step in steps for r in step.rejected}
    assert reasons == {"no room for the caption in data.text.budget = 40 tokens a pack"}
    trained, lost = texts_by_sample(steps), [r.sample_id for s in steps for r in s.rejected]
    assert sorted([*trained, *lost]) == list(range(40))
    with pytest.raises(ValueError, match=r"data\.text\.budget is 40; it must be at least 64"):
        TextConfig(budget=40)


def labelled_lists(folder: Path) -> Manifest:
    lists = {"a": b"[0, 2]", "b": b"1", "c": b"[]", "d": b"0 1 2", "e": b"2,0"}
    write_shard(folder / "a.tar", members([(k, {"cls": v}) for k, v in lists.items()]))
    return index_shards(str(folder))


def test_lists_of_labels_are_indexed_and_arrive_whole(tmp_path):
    manifest = labelled_lists(tmp_path / "s")
    assert (manifest.label_lists, manifest.most_labels, manifest.highest_label) == (4, 3, 2)
    assert manifest.samples["label"].tolist() == [0, 1, -1, 0, 2]
    data = config(require_labels=True, max_labels=3)
    sets = {}
    for step in one_epoch(manifest, data):
        for pack in step.packs:
            assert pack.label_sets.shape == (32, 3)
            for i in torch.nonzero(pack.weights > 0)[:, 0].tolist():
                sets[int(pack.sample_ids[i])] = pack.label_sets[i].tolist()
    expected = {0: [0, 2, -1], 1: [1, -1, -1], 2: [-1, -1, -1], 3: [0, 1, 2], 4: [2, 0, -1]}
    assert sets == expected


def test_an_objective_of_one_class_rejects_lists_with_a_reason(tmp_path):
    manifest = labelled_lists(tmp_path / "s")
    steps = list(one_epoch(manifest, config(require_labels=True)))
    reasons = sorted(r.reason for step in steps for r in step.rejected)
    assert reasons == ["2 labels, but the objective needs exactly one"] * 2 + [
        "3 labels, but the objective needs exactly one"
    ]
    assert sum(step.num_images for step in steps) == 1


def test_shards_that_a_former_reader_indexed_are_read_again_when_asked(tmp_path):
    folder = tmp_path / "s"
    before = captioned(folder)
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["digest"], content["checksums"]
    for entry in content["shards"]:
        for name in ("label_lists", "most_labels", "reader", "checksums"):
            del entry[name]
    path.write_text(json.dumps(content))
    assert Manifest.open(str(folder)).old_index == str(folder)
    again = index_shards(str(folder))
    assert again.old_index is None
    assert again.fingerprint == before.fingerprint


def test_an_image_that_cannot_be_decoded_leaves_its_caption_out(tmp_path):
    manifest = captioned(tmp_path / "s", [("bad", {"jpg": jpeg(24, 32)[:300], "txt": b"lost"})])
    usable = (manifest.samples["flags"] & SampleFlag.BAD) == 0
    steps = list(one_epoch(manifest, text_config()))
    assert len(texts_by_sample(steps)) == 40
    assert sum(len(step.rejected) for step in steps) == int(usable.sum()) - 40


def test_the_tokenizer_of_a_pack_is_that_of_its_config(tmp_path):
    manifest = captioned(tmp_path / "s")
    data = text_config(replace(TextConfig(), tokenizer=str(tmp_path / "none.json")))
    with pytest.raises(ValueError, match=r"none\.json"):
        list(one_epoch(manifest, data))
