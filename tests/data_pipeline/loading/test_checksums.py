"""Storage that changes the bytes of samples without a word, and what notices it."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from data_pipeline.loading.fetch import read_image
from data_pipeline.loading.loader import PackLoader, check_state
from data_pipeline.loading.recipe import ImageRecipe, pack_recipe
from data_pipeline.plan.plan import Plan
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.tar_reader import ShardFile
from data_pipeline.verify import verify_shards
from tests.data_pipeline.shard_fixtures import jpeg
from tests.data_pipeline.shard_server import serve
from tests.data_pipeline.synthetic import config, write_shards
from zeta.packed import Rejected, StepPacks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards = write_shards(tmp_path / "shards", [8, 8])
    index_shards(shards)
    return shards


def plan(folder: Path | str, **changes: object) -> Plan:
    return Plan(Manifest.open(folder), config(**{"read_deadline_s": 2} | changes), 1, max_epochs=1)


def steps(folder: Path, **changes: object) -> list[StepPacks]:
    loader = PackLoader(plan(folder, **changes))
    return list(itertools.takewhile(lambda step: step.num_tokens or step.more, loader.steps(None)))


def rejected(made: list[StepPacks]) -> list[Rejected]:
    return [line for step in made for line in step.rejected]


def change(path: Path, offset: int, content: bytes | None = None) -> None:
    """Change bytes of a file, a single bit by default, but not its size and mtime."""
    before = path.stat()
    with path.open("r+b") as stream:
        stream.seek(offset)
        old = stream.read(1)
        stream.seek(offset)
        stream.write(content or bytes([old[0] ^ 4]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def place(folder: Path, sample_id: int, what: bytes) -> tuple[Path, int]:
    """Return the shard of a sample, and the place of `what` in it, after the sample's begin."""
    manifest = Manifest.open(folder)
    shard = Path(manifest.shards[int(manifest.shard_of(sample_id))].path)
    return shard, shard.read_bytes().index(what, int(manifest.samples["offset"][sample_id]))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", [b"\xff\xda", b"s00003.jpg", b"s00003.cls", b"ustar"])
def test_a_flipped_bit_costs_its_own_slot_and_is_named(folder, what, workers):
    before = steps(folder)
    assert rejected(before) == []
    shard, at = place(folder, 3, what)
    change(shard, at + 6)  # of the picture, of a name, or of a header
    after = steps(folder, workers=workers)
    (bad,) = rejected(after)
    assert (bad.sample_id, Path(bad.shard).name) == (3, "shard-000.tar")
    offset = int(Manifest.open(folder).samples["offset"][3])
    assert f"bytes at byte {offset} of the shard are not those that were indexed" in bad.reason
    for whole, hurt in zip(before, after, strict=True):
        for pack, other in zip(whole.packs, hurt.packs, strict=True):
            assert (pack.sample_ids == other.sample_ids).all()
            good = (other.sample_ids != 3) & (other.sample_ids >= 0)
            assert (other.weights[good] == 1).all()
            assert (other.weights[other.sample_ids == 3] == 0).all()
            assert (pack.labels[good] == other.labels[good]).all()
            for index in good.nonzero()[:, 0].tolist():
                part = slice(*pack.cu_seqlens[index : index + 2].tolist())
                assert (pack.patches[part] == other.patches[part]).all()
    assert rejected(steps(folder)) == [bad]  # on every replay the same


def test_the_key_is_named_where_it_can_be_read(folder):
    shard, at = place(folder, 3, b"\xff\xda")
    change(shard, at + 6)
    assert [line.key for line in rejected(steps(folder))] == ["s00003"]


def test_another_label_is_not_trained_on(folder):
    manifest = Manifest.open(folder)
    shard, at = place(folder, 3, b"s00003.cls")
    assert shard.read_bytes()[at + 512 : at + 513] == b"1"
    change(shard, at + 512, b"0")
    assert [line.sample_id for line in rejected(steps(folder))] == [3]
    assert int(manifest.samples["label"][3]) == 1


def test_a_shard_replaced_under_the_same_size_and_mtime_is_not_trained_on(folder):
    shard = folder / "shard-000.tar"
    content = bytearray(shard.read_bytes())
    manifest = Manifest.open(folder)
    for row in manifest.samples[:8]:  # other noise at the end of each picture
        end = content.index(b"\xff\xd9", int(row["offset"]))
        content[end - 3] ^= 1
    change(shard, 0, bytes(content))
    assert {line.sample_id for line in rejected(steps(folder))} == set(range(8))


def recipe_of(folder: Path | str, sample_id: int, **changes: object) -> ImageRecipe:
    whole = plan(folder, **changes)
    lane = whole.lane(0)
    while pack := lane.next_pack():
        for image in pack_recipe(whole, pack, 0).images:
            if image.sample_id == sample_id:
                return image
    raise AssertionError(sample_id)


def test_bytes_that_only_memory_had_wrong_are_read_from_storage(folder, monkeypatch):
    image = recipe_of(folder, 3)
    shard, at = place(folder, 3, b"\xff\xda")
    change(shard, at + 6)

    def repaired(self: object, offset: int, nbytes: int) -> None:
        assert (offset, nbytes) == (image.offset, image.nbytes)
        change(shard, at + 6)

    monkeypatch.setattr(ShardFile, "forget", repaired)
    sample = read_image(image, 2)
    assert sample.fault == ""
    assert set(sample.members) == {"jpg", "cls"}


@pytest.mark.parametrize("fault", ["flip", "cut"])
def test_a_damaged_copy_in_the_cache_is_read_from_the_source(folder, tmp_path, monkeypatch, fault):
    monkeypatch.setenv("ZETA_INDEX_DIR", str(tmp_path / "index"))
    shard, at = place(folder, 3, b"\xff\xda")
    copy = tmp_path / "copy.tar"
    copy.write_bytes(shard.read_bytes())
    with serve(folder) as server:
        urls = f"{server.url}/shard-{{000..001}}.tar"
        index_shards(urls)
        image = recipe_of(urls, 3)
        near = image._replace(cached=str(copy))
        whole = read_image(near, 2)
        if fault == "flip":
            change(copy, at + 6)
        else:
            os.truncate(copy, at)
        assert read_image(near, 2) == whole == read_image(image, 2)
        change(shard, at + 6)
        assert "not those that were indexed" in read_image(near, 2).fault
        assert "not those that were indexed" in read_image(image, 2).fault


def test_an_index_without_checksums_is_read_and_says_so_and_gets_them(folder):
    known = Manifest.open(folder)
    assert known.content_digest
    assert (known.checksums[:] > 0).all()
    for path in folder.glob("*.json*"):
        path.unlink()
    plain = index_shards(folder, checksums=False)
    assert list(folder.glob("checksums-*")) == []
    assert not plain.known_checksums.any()
    assert (plain.fingerprint, plain.content_digest) == (known.fingerprint, "")
    assert verify_shards(folder).unchecked == 16
    shard, at = place(folder, 3, b"s00003.cls")
    change(shard, at + 512, b"0")
    assert rejected(steps(folder)) == []  # nobody can know
    change(shard, at + 512, b"1")
    again = index_shards(folder)
    assert (again.checksums[:] == known.checksums[:]).all()
    assert again.content_digest == known.content_digest
    assert index_shards(folder, checksums=False).content_digest == known.content_digest  # kept


def test_a_shard_without_checksums_beside_others_keeps_what_is_known(folder):
    write_shards(folder / "more", [4], seed=5)
    (folder / "more/shard-000.tar").rename(folder / "shard-002.tar")
    (folder / "more").rmdir()
    mixed = index_shards(folder, checksums=False)
    assert (mixed.checksums[:16] > 0).all()
    assert not mixed.checksums[16:].any()
    assert mixed.content_digest == ""
    assert rejected(steps(folder)) == []
    assert (verify_shards(folder).unchecked, verify_shards(folder).bad) == (4, ())


def test_the_fingerprint_does_not_depend_on_checksums_and_a_run_goes_on_with_them(folder):
    with_them = plan(folder)
    loader = PackLoader(with_them)
    next(loader.steps(None))
    state = dict(loader.state_after(0))
    without = {key: value for key, value in state.items() if key != "contents"}  # an older run's
    assert check_state(with_them, state) == check_state(with_them, without) == 1
    other = {**state, "contents": "0" * 64}
    with pytest.raises(ValueError, match="hold other bytes than those that this run was started"):
        check_state(with_them, other)
    for path in folder.glob("*.json*"):
        path.unlink()
    index_shards(folder, checksums=False)
    assert check_state(plan(folder), state) == 1


def test_a_shard_replaced_and_indexed_again_is_not_what_a_run_was_started_on(folder):
    loader = PackLoader(plan(folder))
    next(loader.steps(None))
    state = loader.state_after(0)
    shard, _ = place(folder, 3, b"\xff\xda")
    content = shard.read_bytes()
    change(shard, content.index(b"\xff\xd9") - 3)  # a picture of the same size
    os.utime(shard, ns=(1, 1))
    index_shards(folder)
    assert Manifest.open(folder).fingerprint == state["fingerprint"]
    with pytest.raises(ValueError, match="hold other bytes"):
        check_state(plan(folder), state)


def test_verify_names_what_still_decodes(folder):
    assert verify_shards(folder).unchecked == 0
    shard, at = place(folder, 3, b"s00003.cls")
    change(shard, at + 512, b"0")
    (bad,) = verify_shards(folder).bad
    assert (Path(bad.shard).name, bad.key) == ("shard-000.tar", "s00003")
    assert "not those that were indexed" in bad.reason


def test_verify_says_that_the_index_is_damaged_and_goes_on(folder):
    (array,) = folder.glob("checksums-*.npy")
    change(array, array.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"manifest.json is damaged .*; delete it and type"):
        Manifest.open(folder)
    result = verify_shards(folder)
    assert (result.samples, result.unchecked) == (16, 16)
    assert [bad.reason.partition(" (")[0] for bad in result.bad] == [
        f"{folder / 'manifest.json'} is damaged"
    ]


def test_a_build_always_has_checksums(tmp_path):
    made = build_shards([(f"{n}", {"jpg": jpeg(seed=n)}) for n in range(4)], tmp_path / "out")
    assert made.content_digest
    assert (made.checksums[:] > 0).all()


@pytest.mark.parametrize("field", ["digest", "checksums", "count", "name"])
def test_a_rewritten_entry_of_the_list_is_found(folder, field):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    entry = content["shards"][0]
    entry[field] = entry[field] + 1 if field == "count" else entry[field][:-1] + "~"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest.json is damaged|is not in the index"):
        Manifest.open(folder)
