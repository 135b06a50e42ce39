from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards import manifest_files
from data_pipeline.shards.folder import resolve_shards
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import SAMPLE_DTYPE, Manifest, Share
from data_pipeline.shards.sample_rows import SampleRows
from tests.data_pipeline.shard_fixtures import error_as_nobody, labelled, write_shard


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three indexed shards of 4, 3 and 5 samples: widths 20 to 31, labels n % 3."""
    first = 0
    for number, count in enumerate((4, 3, 5)):
        write_shard(tmp_path / f"train-{number}.tar", labelled(count, first))
        first += count
    index_shards(tmp_path)
    return tmp_path


def widths(spec) -> list[int]:
    return Manifest.open(spec).samples["width"].tolist()


def test_a_sample_takes_24_bytes():
    assert SAMPLE_DTYPE.itemsize == 24


def test_a_folder_a_glob_braces_and_a_list_name_the_same_samples(folder):
    specs = [
        folder,
        str(folder),
        f"{folder}/*.tar",
        f"{folder}/train-{{0..2}}.tar",
        [f"{folder}/train-{n}.tar" for n in range(3)],
        [folder, f"{folder}/train-1.tar"],
    ]
    opened = [Manifest.open(spec) for spec in specs]
    assert all(m.samples["width"].tolist() == list(range(20, 32)) for m in opened)
    assert len({m.fingerprint for m in opened}) == 1


def test_part_of_a_folder_and_another_order_are_other_manifests(folder):
    assert widths(folder / "train-1.tar") == [24, 25, 26]
    assert widths([f"{folder}/train-{n}.tar" for n in (2, 0)]) == [*range(27, 32), *range(20, 24)]
    assert len({Manifest.open(s).fingerprint for s in (
        folder, folder / "train-1.tar", [folder / "train-1.tar", folder / "train-0.tar"],
        [folder / "train-0.tar", folder / "train-1.tar"])}) == 4  # fmt: skip


def test_shards_of_one_folder_stay_memory_mapped(folder):
    for spec in (folder, f"{folder}/train-[01].tar"):
        samples = Manifest.open(spec).samples
        while not isinstance(samples, np.memmap) and samples.base is not None:
            samples = samples.base
        assert isinstance(samples, np.memmap)


def test_each_sample_belongs_to_its_shard(folder):
    manifest = Manifest.open(folder)
    assert [(s.first, s.count) for s in manifest.shards] == [(0, 4), (4, 3), (7, 5)]
    assert manifest.shard_of(np.arange(12)).tolist() == [0] * 4 + [1] * 3 + [2] * 5
    assert manifest.shard_of(np.array([[11, 0]])).tolist() == [[2, 0]]
    assert int(manifest.shard_of(6)) == 1
    assert manifest.samples["label"].tolist() == [n % 3 for n in range(12)]
    assert manifest.highest_label == 2


def test_several_folders_are_laid_end_to_end(tmp_path):
    for name, first in (("b", 0), ("a", 3)):
        write_shard(tmp_path / name / "s.tar", labelled(3, first))
    index_shards([tmp_path / "a", tmp_path / "b"])
    manifest = Manifest.open([tmp_path / "b", tmp_path / "a"])
    assert manifest.samples["width"].tolist() == list(range(20, 26))
    assert [s.path for s in manifest.shards] == [f"{tmp_path}/{n}/s.tar" for n in "ba"]


def test_an_empty_shard_is_left_out_and_nothing_but_empty_shards_refused(folder):
    write_shard(folder / "train-00.tar", [])
    index_shards(folder)
    manifest = Manifest.open(folder)
    assert [Path(s.path).name for s in manifest.shards] == [f"train-{n}.tar" for n in range(3)]
    assert len(manifest.samples) == 12
    with pytest.raises(
        ValueError, match=r"train-00\.tar: they are empty; .*`zeta shards build IMAGES"
    ):
        Manifest.open(folder / "train-00.tar")


@pytest.mark.parametrize("part", ["", "/*.tar", "/a.tar", "/[ab].tar"])
def test_a_folder_of_shards_that_may_not_be_read_is_named(tmp_path, part):
    folder = tmp_path / "shards"
    write_shard(folder / "a.tar", labelled(1))
    tmp_path.chmod(0o755)
    folder.chmod(0)
    message = error_as_nobody(tmp_path, lambda: Manifest.open(f"{folder}{part}"))
    folder.chmod(0o755)
    assert message == f"{folder}{part} cannot be read: Permission denied; make it readable"


def test_shards_without_an_index_are_refused_with_the_command(tmp_path):
    write_shard(tmp_path / "a.tar", labelled(1))
    with pytest.raises(ValueError, match=f"have no index; type `zeta shards index {tmp_path}`"):
        Manifest.open(tmp_path)
    index_shards(tmp_path)
    write_shard(tmp_path / "b.tar", labelled(1))
    with pytest.raises(ValueError, match=r"b\.tar is not in the index; type `zeta shards index"):
        Manifest.open(tmp_path)


def test_a_shard_that_changed_is_refused_by_name(folder):
    before = Manifest.open(folder).fingerprint
    shard = folder / "train-1.tar"
    content, times = shard.read_bytes(), shard.stat()
    shard.write_bytes(content[:-512])
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match=r"train-1\.tar changed since .* type `zeta shards index"):
        Manifest.open(folder)
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-1\.tar changed since it was indexed"):
        Manifest.open([folder / "train-0.tar", shard])
    assert widths(folder / "train-0.tar") == [20, 21, 22, 23]
    index_shards(folder)
    assert Manifest.open(folder).fingerprint == before  # the same bytes


@pytest.mark.parametrize("spec", ["{}", "{}/*.tar", "{}/train-?.tar", "{}/train-{{0..2}}.tar"])
def test_a_shard_that_is_gone_is_refused_by_name(folder, spec):
    (folder / "train-2.tar").unlink()
    with pytest.raises(ValueError, match=r"train-2\.tar"):
        Manifest.open(spec.format(folder))
    assert widths(folder / "train-0.tar") == [20, 21, 22, 23]
    index_shards(folder)
    assert widths(folder) == list(range(20, 27))


def test_a_changed_class_map_is_refused(folder):
    (folder / "classes.json").write_text('["a", "b", "c"]')
    with pytest.raises(ValueError, match=r"classes\.json changed since indexing"):
        Manifest.open(folder)
    index_shards(folder)
    assert Manifest.open(folder).class_names == ("a", "b", "c")


def test_folders_with_different_class_maps_do_not_mix(tmp_path):
    for name, names in (("a", '["x", "y", "z"]'), ("b", '["x", "z", "y"]')):
        write_shard(tmp_path / name / "s.tar", labelled(2))
        (tmp_path / name / "classes.json").write_text(names)
    with pytest.raises(ValueError, match=r"different classes\.json"):
        index_shards([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize("content", ["{", "{}", "[]", '["a", "a"]', '["a", 1]'])
def test_a_class_map_that_is_no_list_of_names_is_refused(folder, content):
    (folder / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=r"classes\.json"):
        Manifest.open(folder)


@pytest.mark.parametrize("damage", ["{", '{"version": 1}', "cut", "short"])
def test_a_damaged_index_is_refused_with_the_way_out(folder, damage):
    (array,) = folder.glob("manifest-*.npy")
    if damage == "cut":
        array.write_bytes(array.read_bytes()[:-24])
    elif damage == "short":
        np.save(array, np.load(array)[:-1])
    else:
        (folder / "manifest.json").write_text(damage)
    with pytest.raises(ValueError, match=r"is damaged .*delete it and type `zeta shards index"):
        Manifest.open(folder)


def test_an_index_of_another_version_counts_as_none(folder):
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "version": 0}))
    with pytest.raises(ValueError, match="have no index"):
        Manifest.open(folder)
    assert len(index_shards(folder).samples) == 12


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/nowhere", "no shard matches"),
        ("{}/x-{{0..3}}.tar", "no shard matches .*x-0"),
        ("{}/*.zip", "no shard matches"),
        ("{}/manifest.json", "is not a .tar file"),
        ([], "the list of shards is empty"),
        ([{"path": "a", "weight": 1}], "must be a path"),
        (3, "shards are 3; give a folder"),
    ],
)
def test_a_spec_that_names_nothing_says_what_is_wrong(folder, spec, message):
    spec = spec.format(folder) if isinstance(spec, str) else spec
    with pytest.raises(ValueError, match=message):
        resolve_shards(spec)


def test_relative_paths_and_a_home_folder_are_understood(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    name = folder.name
    home = f"~/{name}"
    for spec in (".", "*.tar", f"../{name}/train-?.tar", home, f"{home}/train-{{0..2}}.tar"):
        assert widths(spec) == list(range(20, 32))


def test_a_folder_without_shards_says_how_to_make_some(tmp_path):
    with pytest.raises(ValueError, match=r"holds no \.tar shards; write some with `zeta shards"):
        resolve_shards(tmp_path)


def test_unfinished_shards_are_not_named_by_their_folder(folder):
    (folder / ".train-9.tar.123.tmp").write_bytes(b"")
    (folder / ".hidden.tar").write_bytes(b"")
    assert len(resolve_shards(folder)) == 3


def test_a_shard_with_two_spellings_counts_once(tmp_path, monkeypatch):
    folder = tmp_path / "s"
    write_shard(folder / "a.tar", labelled(3))
    index_shards(folder)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for spec in (["s", str(folder)], ["s", "./s"], ["s", "link"]):
        assert len(Manifest.open(spec).samples) == 3


def test_a_flipped_bit_in_the_index_array_is_found_at_open_and_by_the_index(tmp_path):
    write_shard(tmp_path / "a.tar", labelled(3))
    index_shards(tmp_path)
    (array,) = tmp_path.glob("manifest-*.npy")
    whole = array.read_bytes()
    for content in (whole[:-3] + b"\x01" + whole[-2:], b"", whole[:-24], b"PK\x03\x04" + whole):
        array.write_bytes(content)
        for use in (Manifest.open, index_shards):
            with pytest.raises(
                ValueError, match=r"manifest.json is damaged .*; delete it and type"
            ):
                use(tmp_path)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"[]", b"\xff", b'{"version": 1, "shards": 3}']
)
def test_a_damaged_manifest_is_one_line(tmp_path, content):
    write_shard(tmp_path / "a.tar", labelled(3))
    index_shards(tmp_path)
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest.json is damaged .*; delete it and type"):
        Manifest.open(tmp_path)


def test_the_same_bytes_copied_again_elsewhere_have_the_same_fingerprint(tmp_path):
    for name, when in (("a", 1), ("b", 2)):
        shard = write_shard(tmp_path / name / "0.tar", labelled(3))
        os.utime(shard, (when, when))
        index_shards(tmp_path / name)
    first, second = Manifest.open(tmp_path / "a"), Manifest.open(tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    assert first.older_fingerprint != second.older_fingerprint  # as earlier versions saved it
    write_shard(tmp_path / "b/0.tar", labelled(4))
    assert index_shards(tmp_path / "b").fingerprint != first.fingerprint


def test_the_ranks_of_a_run_compare_all_shards_together_and_few_of_them_each(folder, monkeypatch):
    names = [f"{number}.tar" for number in range(1000)]
    shares = [Share(rank, 8).of(names) for rank in range(8)]
    assert sorted(name for share in shares for name in share) == sorted(names)
    assert {len(share) for share in shares} == {125}
    assert len(Share(4095, 4096).of(names)) >= 64  # each node looks at some
    assert Share(1, 8).of(names[:100]) == names[:100]
    monkeypatch.setattr(manifest_files, "_CHECKED_BY_EVERY_RANK", 1)
    os.utime(folder / "train-1.tar", ns=(1, 1))
    for rank in (0, 2):
        assert len(Manifest.open(folder, Share(rank, 3)).samples) == 12
    with pytest.raises(ValueError, match=r"train-1\.tar changed since it was indexed"):
        Manifest.open(folder, Share(1, 3))
    index_shards(folder)
    rows = next(folder.glob("manifest-*.npy"))
    content = bytearray(rows.read_bytes())
    content[-1] ^= 1  # a row of the last shard
    rows.write_bytes(content)
    for rank in (0, 1):
        assert len(Manifest.open(folder, Share(rank, 3)).samples) == 12
    with pytest.raises(ValueError, match=r"the rows of train-2\.tar in .* are not those written"):
        Manifest.open(folder, Share(2, 3))


def test_shards_that_are_no_single_run_stay_memory_mapped(folder):
    """Rows of 24 GB must not be copied into every rank because one shard was left out."""
    samples = Manifest.open([f"{folder}/train-{n}.tar" for n in (0, 2)]).samples
    assert samples["width"].tolist() == [*range(20, 24), *range(27, 32)]
    assert isinstance(samples, SampleRows)
    for part in samples.parts:
        base = part
        while not isinstance(base, np.memmap) and base.base is not None:
            base = base.base
        assert isinstance(base, np.memmap)
