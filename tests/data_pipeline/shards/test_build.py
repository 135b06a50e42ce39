from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
import webdataset

from data_pipeline.shards import build
from data_pipeline.shards.build import build_shards, build_split
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.tar_reader import read_sample
from tests.data_pipeline.shard_fixtures import error_as_nobody, jpeg, labelled, write_shard


@pytest.fixture
def images(tmp_path) -> Path:
    """Twelve images in three class folders, and one file that is none."""
    for number in range(12):
        path = tmp_path / "images" / "abc"[number // 4] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(24, 20 + number, number))
    (tmp_path / "images/a/notes.txt").write_text("x")
    return tmp_path / "images"


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def contents(manifest: Manifest) -> dict[str, dict[str, bytes]]:
    found = {}
    for sample_id, row in enumerate(manifest.samples):
        path = manifest.shards[int(manifest.shard_of(sample_id))].path
        sample = read_sample(path, int(row["offset"]), int(row["nbytes"]))
        found[sample.key] = sample.members
    return found


def test_every_image_is_in_the_shards_once_with_its_label(images, tmp_path):
    manifest = build_shards(images, tmp_path / "out", max_count=5)
    assert [shard.count for shard in manifest.shards] == [5, 5, 2]
    assert contents(manifest) == {
        f"{'abc'[n // 4]}/{n}": {"jpg": jpeg(24, 20 + n, n), "cls": b"%d" % (n // 4)}
        for n in range(12)
    }
    assert manifest.class_names == ("a", "b", "c")
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["a", "b", "c"]
    skipped = json.loads((tmp_path / "out/build.json").read_text())["skipped"]
    assert skipped == {"not an image by its name (.txt)": 1}


def test_classes_named_by_numbers_keep_their_index(tmp_path):
    for number in range(12):
        path = tmp_path / "src" / str(number) / "image.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(jpeg(24, 20 + number, number))
    manifest = build_shards(tmp_path / "src", tmp_path / "out")
    assert manifest.class_names == tuple(sorted(map(str, range(12))))
    for row in manifest.samples:
        assert manifest.class_names[row["label"]] == str(row["width"] - 20)


def test_webdataset_reads_what_was_built(images, tmp_path):
    manifest = build_shards(images, tmp_path / "out", max_count=5)
    theirs = webdataset.WebDataset([s.path for s in manifest.shards], shardshuffle=False)
    assert {item["__key__"]: item["jpg"] for item in theirs} == {
        key: members["jpg"] for key, members in contents(manifest).items()
    }


def test_equal_sources_give_equal_bytes(images, tmp_path):
    build_shards(images, tmp_path / "one", max_count=5)
    build_shards(images, tmp_path / "two", max_count=5)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    with tarfile.open(tmp_path / "one/shard-000000.tar") as tar:
        assert {(m.mtime, m.uname, m.gname) for m in tar} == {(0, "zeta", "zeta")}


def test_samples_are_shuffled_by_default_and_kept_in_order_on_request(images, tmp_path):
    shuffled = build_shards(images, tmp_path / "s", max_count=4)
    other = build_shards(images, tmp_path / "o", max_count=4, seed=1)
    kept = build_shards(images, tmp_path / "k", max_count=4, seed=None)
    assert len(set(shuffled.samples["label"][:4].tolist())) > 1
    assert list(contents(shuffled)) != list(contents(other))
    assert kept.samples["label"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_shards_stay_within_the_size_limit(tmp_path):
    samples = [(f"{n:03d}", {"jpg": bytes(20_000)}) for n in range(20)]
    samples.append(("x" * 120, {"jpg": jpeg()}))
    manifest = build_shards(samples, tmp_path / "out", max_size_mb=0.1)
    assert Counter(shard.count for shard in manifest.shards)[4] >= 4
    for shard in manifest.shards:
        assert shard.nbytes <= 100_000 + 10_240  # and tar's closing record


def test_the_end_of_a_tar_file_counts_too(tmp_path):
    samples = [(f"{i}", {"jpg": jpeg(20 + i, 30)}) for i in range(60)]
    manifest = build_shards(samples, tmp_path / "out", max_size_mb=0.025)
    assert len(manifest.shards) > 2
    assert max(Path(shard.path).stat().st_size for shard in manifest.shards) <= 25_000


def test_one_sample_larger_than_a_shard_gets_its_own(tmp_path):
    samples = [("a", {"jpg": jpeg()}), ("b", {"jpg": jpeg(200, 200)}), ("c", {"jpg": jpeg()})]
    manifest = build_shards(samples, tmp_path / "out", max_size_mb=0.001, seed=None)
    assert [shard.count for shard in manifest.shards] == [1, 1, 1]


def test_in_memory_samples_go_through_the_same_writer(tmp_path):
    samples = ((f"scan{n}", {"jpg": jpeg(seed=n), "cls": b"%d" % (n % 2)}) for n in range(6))
    manifest = build_shards(samples, tmp_path / "out", class_names=["zero", "one"])
    assert manifest.class_names == ("zero", "one")
    assert {k: m["cls"] for k, m in contents(manifest).items()} == {
        f"scan{n}": b"%d" % (n % 2) for n in range(6)
    }


def test_shards_are_rebuilt_from_shards_with_captions_untouched(tmp_path):
    caption = "naïve 世界".encode()
    write_shard(tmp_path / "in/a.tar", [*labelled(3), ("k.jpg", jpeg()), ("k.txt", caption)])
    write_shard(tmp_path / "in/b.tar", labelled(3))
    manifest = build_shards(tmp_path / "in", tmp_path / "out", max_count=3)
    found = contents(manifest)
    assert found["k"]["txt"] == caption
    assert sorted(found) == ["0000", "0000-2", "0001", "0001-2", "0002", "0002-2", "k"]
    assert found["0000-2"] == found["0000"]


def test_a_finished_build_is_found_and_not_written_again(images, tmp_path, monkeypatch):
    first = build_shards(images, tmp_path / "out", max_count=5)
    monkeypatch.setattr(build, "_write_shard", lambda task: pytest.fail("written again"))
    assert build_shards(images, tmp_path / "out", max_count=5).fingerprint == first.fingerprint


def test_an_interrupted_build_goes_on_with_what_is_missing(images, tmp_path, monkeypatch):
    build_shards(images, tmp_path / "whole", max_count=3)
    write, written = build._write_shard, []

    def interrupt_at_third(task):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(task.number)
        return write(task)

    monkeypatch.setattr(build, "_write_shard", interrupt_at_third)
    with pytest.raises(KeyboardInterrupt):
        build_shards(images, tmp_path / "out", max_count=3)
    monkeypatch.setattr(build, "_write_shard", lambda t: written.append(t.number) or write(t))
    (tmp_path / "out/.shard-000003.tar.99.tmp").write_bytes(b"of a builder that was killed")
    build_shards(images, tmp_path / "out", max_count=3)
    assert not list((tmp_path / "out").glob(".*"))
    assert written == [0, 1, 2, 3]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("change", ["image", "option", "source"])
def test_shards_of_something_else_are_not_mixed_in(images, tmp_path, change):
    build_shards(images, tmp_path / "out", max_count=5)
    before = digests(tmp_path / "out")
    if change == "image":
        (images / "a/0.jpg").write_bytes(jpeg(seed=99))
    source = images / "a" if change == "source" else images
    with pytest.raises(ValueError, match="holds shards of another source"):
        build_shards(source, tmp_path / "out", max_count=4 if change == "option" else 5)
    assert digests(tmp_path / "out") == before


def test_a_folder_with_other_files_is_left_alone(images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    with pytest.raises(ValueError, match="exists and is not a shard build; choose a new or empty"):
        build_shards(images, tmp_path / "out")
    with pytest.raises(ValueError, match="cannot write to"):
        build_shards(images, tmp_path / "out/thesis.tex/below")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_import_of_torch_waits_for_its_end(how):
    def leave(number, frame):
        raise InterruptedError(number)

    def be_interrupted():
        with build._signals_deferred():
            signal.raise_signal(how)
            through.append(how)

    previous, through = signal.signal(how, leave), []
    try:
        with pytest.raises(InterruptedError):
            be_interrupted()
        assert through == [how]
        assert signal.getsignal(how) is leave
    finally:
        signal.signal(how, previous)


@pytest.mark.parametrize(
    "items",
    [
        [("a", {"jpg": b""}), "shards/0.tar"],
        ["shards/0.tar", ("a", {"jpg": b""})],
        [("a", {"jpg": b""}), 7],
        [("a", {"jpg": b""}), ("a", {"jpg": b""}, "more")],
    ],
)
def test_an_item_of_another_kind_is_named_and_not_left_out(tmp_path, items):
    with pytest.raises(ValueError, match="item 1 of the source is") as caught:
        build_shards(items, tmp_path / "out")
    assert f"{items[1]!r}; all must be paths" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_build_without_one_usable_image_names_the_folder_and_what_to_do(tmp_path):
    for number in range(4):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / f"{number}.jpg").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="no usable image") as caught:
        build_shards(tmp_path / "src", tmp_path / "out", max_count=2)
    assert str(caught.value).startswith(f"no usable image in the shards {tmp_path}/out: 4 x ")
    assert f"{tmp_path}/out/manifest_rejected.jsonl: repair the images" in str(caught.value)


def test_an_image_that_may_not_be_read_is_named(images, tmp_path):
    (images / "a/0.jpg").chmod(0)
    (tmp_path / "out").mkdir()
    for path in (tmp_path, tmp_path / "out"):
        path.chmod(0o777)
    message = error_as_nobody(tmp_path, lambda: build_shards(images, tmp_path / "out"))
    assert message.startswith(f"cannot read {images}/a/0.jpg: Permission denied; make it readable")


def test_files_that_are_no_images_inside_are_rejected_not_lost(images, tmp_path):
    (images / "a/broken.jpg").write_bytes(b"<html>")
    manifest = build_shards(images, tmp_path / "out")
    (rejection,) = manifest.rejections()
    assert rejection.key == "a/broken"
    assert len(manifest.samples) == 13


@pytest.mark.slow
def test_ctrl_c_in_the_middle_leaves_whole_shards_and_a_rerun_finishes(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    for number in range(1200):
        (source / f"{number}.jpg").write_bytes(jpeg(24, 32) + bytes(60_000))
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from data_pipeline.shards.build import build_shards\n"
        "if __name__ == '__main__':\n"
        "    build_shards(sys.argv[1], sys.argv[2], max_count=50, workers=2)\n"
    )
    command = [sys.executable, str(script), str(source), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    while len(shards_in(tmp_path / "out")) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode not in (0, None)
    done = shards_in(tmp_path / "out")
    assert 0 < len(done) < 24
    assert not list((tmp_path / "out").glob(".*"))
    stamps = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in done}
    subprocess.run(command, env=environment, check=True)
    assert len(Manifest.open(tmp_path / "out").samples) == 1200
    assert {n: (tmp_path / "out" / n).stat().st_mtime_ns for n in done} == stamps
    build_shards(source, tmp_path / "alone", max_count=50)
    assert digests(tmp_path / "alone") == digests(tmp_path / "out")


def shards_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.tar"))


def key_sets(parts: dict[str, Manifest]) -> dict[str, set[str]]:
    return {name: set(contents(manifest)) for name, manifest in parts.items()}


def in_memory(count: int) -> list[tuple[str, dict[str, bytes]]]:
    image = jpeg(8, 8, 0)  # with a tail that decoders pass over, so that no two are equal
    return [(f"{i:05d}", {"jpg": image + b"%d" % i, "cls": b"%d" % (i % 3)}) for i in range(count)]


def test_a_share_is_held_out_by_key_whatever_the_order_and_what_else_there_is(tmp_path):
    parts = build_split(in_memory(600), tmp_path / "a", 0.1, class_names=["x", "y", "z"])
    sets = key_sets(parts)
    assert sets["train"] | sets["val"] == {f"{i:05d}" for i in range(600)}
    assert not sets["train"] & sets["val"]
    assert 30 <= len(sets["val"]) <= 90
    assert {name: len(manifest.samples) for name, manifest in parts.items()} == {
        name: len(keys) for name, keys in sets.items()
    }
    assert parts["val"].class_names == parts["train"].class_names == ("x", "y", "z")
    more = key_sets(build_split(in_memory(900)[::-1], tmp_path / "b", 0.1, seed=7))
    assert sets["val"] == {key for key in more["val"] if key < "00600"}
    assert sets["val"] < key_sets(build_split(in_memory(600), tmp_path / "c", 0.2))["val"]


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_neither_set_is_empty(tmp_path, share):
    parts = build_split(in_memory(3), tmp_path / "out", share)
    assert sorted(len(manifest.samples) for manifest in parts.values()) == [1, 2]


def test_a_split_that_cannot_be_is_refused(tmp_path):
    for share in (0, 1, -0.5, 5):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            build_split(in_memory(3), tmp_path / "out", share)
    with pytest.raises(ValueError, match="holds one image"):
        build_split(in_memory(1), tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()
    build_shards(in_memory(3), tmp_path / "whole")
    with pytest.raises(ValueError, match="built without a held-out share"):
        build_split(in_memory(3), tmp_path / "whole", 0.5)
    build_split(in_memory(30), tmp_path / "split", 0.5)
    with pytest.raises(ValueError, match="with other options"):
        build_split(in_memory(30), tmp_path / "split", 0.2)
    with pytest.raises(ValueError, match=r"train/ and val/, built with a held-out share \(--val"):
        build_shards(in_memory(30), tmp_path / "split")
    with pytest.raises(ValueError, match="split/train, or another folder in it"):
        Manifest.open(str(tmp_path / "split"))


def pictures(folder: Path) -> set[bytes]:
    """Return the bytes of the images in the shards of a folder."""
    found = set()
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {tar.extractfile(m).read() for m in tar if m.name.endswith((".jpg", ".png"))}
    return found


@pytest.mark.parametrize("kind", ["rows", "copies", "links"])
def test_a_picture_is_held_out_with_all_its_rows_and_copies(tmp_path, kind):
    """Five captions an image, one row each, as the tables of COCO and Flickr30k have them."""
    source = tmp_path / "src"
    source.mkdir()
    rows = []
    for number in range(20):
        for copy in range(5):
            path = source / f"{number}_{copy if kind != 'rows' else 0}.jpg"
            if kind == "links" and copy:
                path.unlink(missing_ok=True)
                path.symlink_to(source / f"{number}_0.jpg")
            else:
                path.write_bytes(jpeg(seed=number) + bytes(10_000) + b"%03d" % number)
            rows.append(f"{path.name},caption {copy} of picture {number}\n")
    table = source / "t.csv"
    table.write_text("path,caption\n" + "".join(rows))
    parts = build_split(table, tmp_path / "out", 0.3)
    train, val = pictures(tmp_path / "out/train"), pictures(tmp_path / "out/val")
    assert not train & val
    assert len(train) + len(val) == 20
    assert 2 <= len(val) <= 11
    assert sum(len(part.samples) for part in parts.values()) == 100
    # Copies of equal length and ends, that differ in between, are other pictures.
    for number in range(20):
        (source / f"{number}_0.jpg").write_bytes(
            jpeg() + bytes(8192) + b"%03d" % number + bytes(8192)
        )
    split = build_split(source, tmp_path / "other", 0.3)
    assert sum(len(pictures(tmp_path / "other" / name)) for name in split) == (
        40 if kind == "copies" else 20
    )


def test_one_picture_in_many_samples_cannot_be_split(tmp_path):
    with pytest.raises(ValueError, match="one image, in several samples"):
        build_split([("a", {"jpg": jpeg()}), ("b", {"jpg": jpeg()})], tmp_path / "out", 0.5)


def test_shards_are_written_to_local_folders_only(images, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="out is 's3://b/r', a URL; it must be a folder"):
        build_shards(images, "s3://b/r")
    monkeypatch.setenv("HOME", str(tmp_path))
    build_shards(images, "~/out")
    assert shards_in(tmp_path / "out")


def test_a_sample_that_rotted_since_it_was_indexed_is_not_built_into_other_shards(tmp_path):
    shard = write_shard(tmp_path / "in/a.tar", labelled(3))
    index_shards(tmp_path / "in")
    content, before = bytearray(shard.read_bytes()), shard.stat().st_mtime_ns
    content[512] ^= 1  # the label of the first image
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"0000 in .*a\.tar: damaged in storage: the .* byte 0 "):
        build_shards(tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))
    content[512] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(before, before))
    assert build_shards(str(shard), tmp_path / "out").shards[0].count == 3


def test_a_build_that_met_a_damaged_shard_goes_on_once_it_was_copied_again(tmp_path):
    shard = write_shard(tmp_path / "in/a.tar", labelled(3))
    index_shards(tmp_path / "in")
    whole = shard.read_bytes()
    one_each = {"max_count": 1, "seed": None}
    broken = bytearray(whole)
    broken[whole.rindex(b"JFIF")] ^= 1  # the last image; two shards are written before it
    shard.write_bytes(broken)
    with pytest.raises(ValueError, match=r"0002 in .*damaged in storage"):
        build_shards(tmp_path / "in", tmp_path / "out", **one_each)
    before = digests(tmp_path / "out")
    assert len(before) == 2
    shard.write_bytes(whole)
    assert len(build_shards(tmp_path / "in", tmp_path / "out", **one_each).samples) == 3
    assert digests(tmp_path / "out").items() > before.items()
