"""Shards: damaged under an index that has checksums, and damaged before they are indexed."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from pathlib import Path

import pytest

from data_pipeline.loading.loader import PackLoader
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from data_pipeline.verify import verify_shards
from tests.data_pipeline.shard_fixtures import encode, jpeg, labelled, photo, tar_bytes, write_shard
from tests.data_pipeline.synthetic import config
from tests.mutate import mutated_bytes, outcome

COUNT = 60
KINDS = ("PNG", "WEBP", "GIF", "TIFF", "BMP")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    box = tmp_path_factory.mktemp("fuzz") / "shards"
    members = labelled(3)
    for number, kind in enumerate(KINDS):
        members += [
            (f"k{number}.{kind.lower()}", encode(photo(20, 30, number), kind)),
            (f"k{number}.json", b'{"label": %d}' % (number % 3)),
        ]
    write_shard(box / "0.tar", members)
    index_shards(box)
    return box


Loaded = dict[int, tuple[str, int, bytes] | str]


def loaded(folder: Path) -> Loaded:
    """Return key, label and patches of each image of one epoch, or the reason why it has none."""
    plan = Plan(Manifest.open(folder), config(read_deadline_s=1), 1, max_epochs=1)
    found: Loaded = {}
    loader = PackLoader(plan)
    for step in itertools.takewhile(
        lambda s: s.packs[0].num_images or s.rejected or s.more, loader.steps(None)
    ):
        (pack,) = step.packs
        for index in (pack.weights > 0).nonzero()[:, 0].tolist():
            part = slice(*pack.cu_seqlens[index : index + 2].tolist())
            sample_id, label = int(pack.sample_ids[index]), int(pack.labels[index])
            assert sample_id not in found
            found[sample_id] = (pack.keys[index], label, pack.patches[part].numpy().tobytes())
        found |= {rejected.sample_id: rejected.reason for rejected in step.rejected}
    return found


def replace(path: Path, content: bytes) -> None:
    """Put other content in the place of a shard, under its mtime."""
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before, before))


def same_size(content: bytes, count: int, seed: int) -> list[bytes]:
    """Return damaged forms of the size of the whole."""
    rng, found = random.Random(seed), []
    for damaged in mutated_bytes(content, count, seed):
        if rng.random() < 0.7 or len(damaged) != len(content):
            changed = bytearray(content)
            for _ in range(rng.choice((1, 3, 30))):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            damaged = bytes(changed)
        found.append(damaged)
    return found


def test_each_image_of_a_damaged_shard_is_the_original_or_rejected_by_name(folder):
    right, path = loaded(folder), folder / "0.tar"
    assert len(right) == 3 + len(KINDS)
    whole = path.read_bytes()
    hurt = 0
    try:
        for damaged in same_size(whole, COUNT, 0):
            replace(path, damaged)
            found = outcome(lambda: loaded(folder), folder)
            assert found.keys() == right.keys()
            for sample_id, image in found.items():
                if isinstance(image, str):
                    hurt += 1
                    assert "not those that were indexed" in image
                else:
                    assert image == right[sample_id]
            named = {bad.key for bad in outcome(lambda: verify_shards(folder), folder).bad}
            assert named or not any(isinstance(image, str) for image in found.values())
    finally:
        replace(path, whole)
    assert hurt > COUNT / 2


def test_a_shard_of_another_size_is_refused_by_name(folder):
    path = folder / "0.tar"
    whole = path.read_bytes()
    try:
        for damaged in (whole[:-1], whole + b"\0", whole[: len(whole) // 2], b""):
            replace(path, damaged)
            assert "0.tar changed since it was indexed" in outcome(lambda: loaded(folder), folder)
    finally:
        replace(path, whole)


def long_size(digits: int) -> bytes:
    """Return a tar whose PAX header gives a size of so many digits."""
    record = b"size=" + b"9" * digits + b"\n"
    length = len(record) + 1
    length += len(str(length + len(str(length))))
    content = bytearray(tar_bytes([("x.pax", b"%d %s" % (length, record)), *labelled(1)]))
    content[156:157] = b"x"
    content[148:156] = b"        "
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return bytes(content)


CORPUS = [
    b"",
    b"\0" * 1024,
    b"\x1f\x8b" + bytes(600),
    long_size(30),
    long_size(4000),
    long_size(5000),
    tar_bytes([("a.cls", b"0 " * 100_000), ("a.jpg", jpeg()), *labelled(1)]),
    tar_bytes([("a.cls", b"[" * 100_000), ("a.jpg", jpeg()), *labelled(1)]),
    tar_bytes([("a.json", b'{"label": ' + b"[" * 100_000), ("a.jpg", jpeg()), *labelled(1)]),
    tar_bytes([("a.json", b'{"label": ' + b"9" * 5000 + b"}"), ("a.jpg", jpeg()), *labelled(1)]),
    tar_bytes([("a.ppm", b"P3 4000 4000 255\n" + b"0 " * 4_000_000), *labelled(1)]),
    tar_bytes([("../../x.jpg", jpeg()), ("/etc/x.jpg", jpeg()), *labelled(1)]),
    tar_bytes([("\udcff.jpg", jpeg()), ("a\nb.jpg", jpeg()), *labelled(1)]),
]
"""Shards that once gave a traceback, took minutes, or could write elsewhere."""


def test_a_shard_that_was_damaged_before_is_indexed_and_loaded_or_refused_by_name(tmp_path):
    box = tmp_path / "shards"
    whole = write_shard(box / "0.tar", [*labelled(3), *labelled(2, 7)]).read_bytes()

    def use() -> Loaded:
        index_shards(box)
        return loaded(box)

    for damaged in [*CORPUS, *mutated_bytes(whole, COUNT, 1)]:
        shutil.rmtree(box)
        box.mkdir()
        (box / "0.tar").write_bytes(damaged)
        found = outcome(use, box)
        checked = outcome(lambda: verify_shards(box), box)
        if isinstance(found, str):
            assert str(box) in found, damaged[:200]
        else:
            indexed = Manifest.open(box).samples["label"].tolist()
            for sample_id, image in found.items():
                assert isinstance(image, str) or image[1] == indexed[sample_id]
        assert checked.shards == 1
