from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.shards import index, parallel
from data_pipeline.shards.images.header import ImageFormat
from data_pipeline.shards.index import index_shard, index_shards
from data_pipeline.shards.manifest import Manifest, SampleFlag
from data_pipeline.shards.manifest_files import SAMPLE_DTYPE
from data_pipeline.shards.tar_reader import ShardFile, TarError, read_sample
from tests.data_pipeline.shard_fixtures import (
    encode,
    entry,
    error_as_nobody,
    exif,
    jpeg,
    labelled,
    photo,
    tar_bytes,
    write_shard,
)


def index_members(tmp_path: Path, members) -> Manifest:
    (tmp_path / "a.tar").write_bytes(tar_bytes([*members, *labelled(1, 50)]))
    return index_shards(tmp_path)


def reasons(manifest: Manifest) -> dict[str, str]:
    return {rejection.key: rejection.reason for rejection in manifest.rejections()}


def test_every_row_leads_to_its_sample(tmp_path):
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", labelled(5, 5 * number))
    manifest = index_shards(tmp_path)
    for sample_id, row in enumerate(manifest.samples):
        path = manifest.shards[int(manifest.shard_of(sample_id))].path
        sample = read_sample(path, int(row["offset"]), int(row["nbytes"]))
        assert sample.key == f"{sample_id:04d}"
        assert sample.members["cls"] == b"%d" % (sample_id % 3)
        assert sample.members["jpg"] == jpeg(24, 20 + sample_id, sample_id)
        assert (row["height"], row["width"], row["label"]) == (24, 20 + sample_id, sample_id % 3)
        assert row["flags"] == SampleFlag.LABELLED


def test_formats_sizes_and_orientation_are_read_whatever_the_extension(tmp_path):
    formats = ["JPEG", "PNG", "WEBP", "GIF", "BMP"]
    turned = {format: {"exif": exif(6)} for format in formats[:3]}
    images = [(f"{f}.jpg", encode(photo(30, 40), f, **turned.get(f, {}))) for f in formats]
    manifest = index_members(tmp_path, images)
    rows = manifest.samples[:5]
    assert [ImageFormat(f).name for f in rows["format"]] == ["JPEG", "PNG", "WEBP", "GIF", "OTHER"]
    assert rows[["height", "width"]].tolist() == [(40, 30)] * 3 + [(30, 40)] * 2


def test_img2dataset_output_is_read_as_it_is(tmp_path):
    members = []
    for number in range(3):
        record = {"caption": "a cat", "key": f"{number:09d}", "status": "success", "width": 40}
        members += [
            (f"{number:09d}.jpg", jpeg(30, 40, number)),
            (f"{number:09d}.txt", "a cat \u4e16".encode()),
            (f"{number:09d}.json", json.dumps(record).encode()),
        ]
    manifest = index_members(tmp_path, members)
    assert manifest.samples["flags"].tolist() == [SampleFlag.CAPTIONED] * 3 + [SampleFlag.LABELLED]
    assert manifest.samples["label"].tolist() == [-1, -1, -1, 50 % 3]
    assert manifest.class_names is None


def test_labels_may_be_names_of_the_class_map(tmp_path):
    (tmp_path / "classes.json").write_text('["cat", "dog", "cow"]')
    first = [("a.cls", b"dog"), ("a.jpg", jpeg())]
    second = [("b.jpg", jpeg()), ("b.json", b'{"label": "cow"}')]
    manifest = index_members(tmp_path, [*first, *second])
    assert manifest.samples["label"].tolist() == [1, 2, 2]
    assert manifest.class_names == ("cat", "dog", "cow")


def test_bad_samples_cost_only_themselves_and_have_their_reason_on_file(tmp_path):
    bomb = bytearray(jpeg())
    at = bomb.index(b"\xff\xc0")
    bomb[at + 5 : at + 9] = b"\xea\x60\xea\x60"
    manifest = index_members(
        tmp_path,
        [
            ("html.jpg", b"<html>404</html>"), ("empty.jpg", b""), ("cut.jpg", jpeg()[:30]),
            ("bomb.jpg", bytes(bomb)), ("text.txt", b"no image"), ("good.jpg", jpeg()),
            ("name.cls", b"dog"), ("name.jpg", jpeg()),
            ("twice.jpg", jpeg()), ("twice.jpg", jpeg()),
            ("json.jpg", jpeg()), ("json.json", b'{"label": '),
        ],
    )  # fmt: skip
    found = reasons(manifest)
    expected = {
        "html": "not an image", "empty": "empty file", "cut": "ends before its size",
        "bomb": "60000 x 60000", "text": "no image among", "name": "'dog' is a name",
        "twice": "two members .jpg", "json": "json cannot be read",
    }  # fmt: skip
    assert found.keys() == expected.keys()
    assert all(part in found[key] for key, part in expected.items())
    bad = (manifest.samples["flags"] & SampleFlag.BAD) != 0
    assert bad.tolist() == [True] * 5 + [False] + [True] * 3 + [False]
    lines = [json.loads(x) for x in (tmp_path / "manifest_rejected.jsonl").read_text().splitlines()]
    assert lines[0] == {"shard": "a.tar", "row": 0, "key": "html", "reason": found["html"]}


def test_nothing_usable_is_an_error_with_the_reasons(tmp_path):
    write_shard(tmp_path / "a.tar", [(f"{n}.jpg", b"") for n in range(4)])
    with pytest.raises(ValueError, match=r"no usable image in the shards .*: 4 x empty file"):
        index_shards(tmp_path)


def test_entries_outside_any_sample_are_counted(tmp_path):
    (tmp_path / "a.tar").write_bytes(
        tar_bytes(
            [entry("d/", tarfile.DIRTYPE), entry("d/a.jpg", tarfile.SYMTYPE, "/etc/passwd"),
             ("README", b"x"), ("__meta__/x.json", b"{}"), *labelled(2)]
        )
    )  # fmt: skip
    assert len(index_shards(tmp_path).samples) == 2
    (shard,) = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    assert shard["ignored"] == {
        "folder": 1, "link or special file": 1, "file without a suffix, or webdataset meta data": 2,
    }  # fmt: skip


def test_a_cut_shard_fails_with_its_name_and_the_others_are_kept(tmp_path):
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", labelled(2, 2 * number))
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:2000])
    with pytest.raises(TarError, match=r"1\.tar: the shard is cut .*\(at byte \d+\)"):
        index_shards(tmp_path)
    (tmp_path / "1.tar").write_bytes(whole)
    assert index_shards(tmp_path).samples["width"].tolist() == list(range(20, 26))


def test_only_new_and_changed_shards_are_read_again(tmp_path, monkeypatch):
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", labelled(2, 2 * number))
    index_shards(tmp_path)
    read: list[str] = []

    def record(read_at, nbytes, shard, *more):
        read.append(Path(shard).name)
        return index_shard(read_at, nbytes, shard, *more)

    monkeypatch.setattr(index, "index_shard", record)
    write_shard(tmp_path / "1.tar", labelled(3, 30))
    write_shard(tmp_path / "3.tar", labelled(1, 40))
    (tmp_path / "0.tar").unlink()
    manifest = index_shards(tmp_path)
    assert read == ["1.tar", "3.tar"]
    assert manifest.samples["width"].tolist() == [50, 51, 52, 24, 25, 60]
    assert index_shards(tmp_path).fingerprint == manifest.fingerprint
    assert len(read) == 2
    assert len(list(tmp_path.glob("manifest-*.npy"))) == 1


def test_an_index_that_is_up_to_date_is_not_written_again(tmp_path):
    write_shard(tmp_path / "a.tar", labelled(2))
    index_shards(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    index_shards(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_shards_that_are_links_are_indexed_where_the_links_are(tmp_path):
    shard = write_shard(tmp_path / "store/a.tar", labelled(2))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.tar").symlink_to(shard)
    assert len(index_shards(tmp_path / "mine").samples) == 2
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["a.tar"]


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path):
    write_shard(tmp_path / "a.tar", labelled(2))
    tmp_path.chmod(0o555)
    message = error_as_nobody(tmp_path, lambda: index_shards(tmp_path))
    assert message.startswith("cannot write the index beside the shards ([Errno 13]")
    assert message.endswith("link them into a folder that you can write to, and index that")


def test_indexing_part_of_a_folder_keeps_the_rest(tmp_path):
    write_shard(tmp_path / "train.tar", [*labelled(2), ("bad.jpg", b"")])
    write_shard(tmp_path / "val.tar", [("worse.jpg", b""), *labelled(2, 5)])
    index_shards(tmp_path / "train.tar")
    index_shards(tmp_path / "val.tar")
    both = Manifest.open(tmp_path)
    assert both.samples["width"].tolist() == [20, 21, 0, 0, 25, 26]
    assert [(r.sample_id, r.key) for r in both.rejections()] == [(2, "bad"), (3, "worse")]
    assert [(r.sample_id, r.key) for r in Manifest.open(tmp_path / "val.tar").rejections()] == [
        (0, "worse")
    ]


@pytest.mark.parametrize("damage", [b"5\n", b"\xff", b"[" * 99_999, b'{"shard": "a.tar"}', None])
def test_what_a_damaged_index_says_to_type_mends_it(tmp_path, damage):
    write_shard(tmp_path / "a.tar", [*labelled(2), ("bad.jpg", b"")])
    index_shards(tmp_path)
    write_shard(tmp_path / "b.tar", labelled(2, 5))
    path = tmp_path / ("manifest_rejected.jsonl" if damage else "manifest.json")
    path.write_bytes(damage or b"{")
    with pytest.raises(ValueError, match=rf"{path.name}( line 1)? is damaged .* delete (it|mani)"):
        index_shards(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert list(reasons(index_shards(tmp_path))) == ["bad"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"[" * 9999 + b, lambda b: b""])
def test_a_damaged_part_file_is_made_again(tmp_path, monkeypatch, damage):
    write_shard(tmp_path / "0.tar", labelled(2))
    with monkeypatch.context() as stopped:
        stopped.setattr(index, "_merge", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            index_shards(tmp_path)
    (part,) = (tmp_path / index.PARTS_FOLDER).iterdir()
    part.write_bytes(damage(part.read_bytes()))
    assert index_shards(tmp_path).samples["width"].tolist() == [20, 21]


def test_a_new_class_map_changes_the_labels(tmp_path):
    (tmp_path / "classes.json").write_text('["cat", "dog"]')
    write_shard(tmp_path / "a.tar", [("a.cls", b"dog"), ("a.jpg", jpeg())])
    assert index_shards(tmp_path).samples["label"].tolist() == [1]
    (tmp_path / "classes.json").write_text('["dog", "cat"]')
    assert index_shards(tmp_path).samples["label"].tolist() == [0]


def test_worker_processes_give_the_same_index(tmp_path, monkeypatch):
    for folder in ("one", "two"):
        for number in range(3):
            write_shard(tmp_path / folder / f"{number}.tar", labelled(4, 4 * number))
    alone = index_shards(tmp_path / "one")
    monkeypatch.setattr(parallel, "SMALL_BYTES", 0)
    shared = index_shards(tmp_path / "two", workers=2)
    assert alone.samples.tobytes() == shared.samples.tobytes()
    names = [{path.name for path in (tmp_path / f).iterdir()} for f in ("one", "two")]
    assert names[0] == names[1]
    assert not any(name.startswith(".") for name in names[0])


def test_an_interrupted_index_goes_on_where_it_stopped(tmp_path, monkeypatch):
    for number in range(4):
        write_shard(tmp_path / f"{number}.tar", labelled(2, 2 * number))
    read: list[str] = []

    def interrupt_at_third(read_at, nbytes, shard, *more):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(Path(shard).name)
        return index_shard(read_at, nbytes, shard, *more)

    monkeypatch.setattr(index, "index_shard", interrupt_at_third)
    with pytest.raises(KeyboardInterrupt):
        index_shards(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    read.clear()
    monkeypatch.setattr(
        index, "index_shard", lambda *a: read.append(Path(a[2]).name) or index_shard(*a)
    )
    assert index_shards(tmp_path).samples["width"].tolist() == list(range(20, 28))
    assert read == ["2.tar", "3.tar"]
    assert not (tmp_path / index.PARTS_FOLDER).exists()


def test_a_part_of_a_shard_that_changed_meanwhile_is_not_used(tmp_path, monkeypatch):
    write_shard(tmp_path / "0.tar", labelled(2))
    monkeypatch.setattr(index, "_merge", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        index_shards(tmp_path)
    monkeypatch.undo()
    write_shard(tmp_path / "0.tar", labelled(3, 7))
    assert index_shards(tmp_path).samples["width"].tolist() == [27, 28, 29]


def test_a_missing_shard_names_itself(tmp_path):
    with pytest.raises(ValueError, match="no shard matches"):
        index_shards(tmp_path / "gone.tar")


@pytest.mark.slow
def test_headers_are_read_in_less_cpu_time_than_tarfile_and_pillow_take(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (330, 340, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), quality=90)
    assert 80_000 < len(data) < 130_000
    shard = write_shard(
        tmp_path / "a.tar",
        [m for n in range(1000) for m in ((f"{n:06d}.cls", b"%d" % n), (f"{n:06d}.jpg", data))],
    )

    def indexed() -> int:
        with ShardFile(str(shard)) as file:
            return len(index_shard(file.read_at, file.nbytes, "a.tar", None, checksums=False).rows)

    def opened() -> int:
        with tarfile.open(shard) as archive:
            images = [m for m in archive if m.name.endswith(".jpg")]
            return len([Image.open(archive.extractfile(image)).size for image in images])

    assert indexed() == 1000 * SAMPLE_DTYPE.itemsize
    assert opened() == 1000
    ours, theirs = zip(
        *[(cpu_seconds(indexed), cpu_seconds(opened)) for _ in range(5)], strict=True
    )
    print(f"{1000 / min(ours):,.0f} headers/s of CPU time, {min(theirs) / min(ours):.1f} x Pillow")
    assert min(ours) < min(theirs)


def cpu_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
