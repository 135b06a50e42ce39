"""Shards with smaller images: what is in them, what stays, and what is refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_pipeline.loading.decode import decode_image
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.folder import OtherSourceError
from data_pipeline.shards.images.header import ImageFormat, image_size
from data_pipeline.shards.images.smaller import Shrinking, smaller_copy, suffix_of_copy
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.shrinking import shrink
from data_pipeline.shards.shrinking.shrink import shrink_shards
from data_pipeline.shards.tar_reader import TarError
from tests.data_pipeline.odd_pictures import odd_pictures
from tests.data_pipeline.photographs import photograph
from tests.data_pipeline.shard_fixtures import (
    encode,
    entry,
    exif,
    jpeg,
    labelled,
    photo,
    tar_bytes,
    write_shard,
)
from tests.data_pipeline.shard_server import serve
from tests.data_pipeline.shards.test_build import contents, digests

RULE = Shrinking(32)
BIG, SMALL = jpeg(60, 90), jpeg(20, 30)


def as_shown(data: bytes, height: int, width: int) -> np.ndarray:
    """Return the pixels that a loader makes of an image."""
    return decode_image(data, height=height, width=width).astype(int)


def copy_of(data: bytes, rule: Shrinking = RULE) -> bytes:
    made = smaller_copy(data, rule)
    assert made is not None
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", odd_pictures())
def test_a_copy_shows_what_the_loader_sees_in_the_original(name):
    data = odd_pictures(60, 90)[name]
    try:
        seen = as_shown(data, *(int(s) for s in _target(data)))
    except ValueError:
        with pytest.raises(ValueError, match=r"\w"):
            smaller_copy(data, RULE)
        return
    made = copy_of(data, Shrinking(32, quality=100))
    header = image_size(made)
    assert (header.height, header.width) == seen.shape[:2]
    assert (header.format, header.orientation) == (ImageFormat.JPEG, 1)
    assert np.abs(as_shown(made, *seen.shape[:2]) - seen).mean() < 1


def _target(data: bytes) -> tuple[float, float]:
    header = image_size(data)
    factor = 32 / max(header.height, header.width)
    return round(header.height * factor), round(header.width * factor)


def test_an_image_of_the_size_stays_and_one_pixel_more_does_not():
    assert smaller_copy(jpeg(20, 32), RULE) is None
    assert smaller_copy(encode(photo(32, 20), exif=exif(6)), RULE) is None
    made = image_size(copy_of(jpeg(20, 33)))
    assert (made.height, made.width) == (19, 32)


def test_a_line_of_pixels_keeps_its_pixel():
    made = image_size(copy_of(jpeg(1, 900)))
    assert (made.height, made.width) == (1, 32)


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_image_is_upright_and_stays_so(turn):
    data = encode(photo(60, 90), exif=exif(turn), quality=95)
    made = copy_of(data, Shrinking(32, quality=100))
    opened = Image.open(io.BytesIO(made))
    assert not opened.getexif()
    height, width = opened.height, opened.width
    assert (height, width) == ((32, 21) if turn >= 5 else (21, 32))
    assert np.abs(as_shown(made, height, width) - as_shown(data, height, width)).mean() < 2


def test_grey_stays_grey_in_one_channel_whatever_the_original_had():
    grey = photo(60, 90).convert("L")
    for data in (encode(grey), encode(grey, "PNG"), encode(grey.convert("RGB"), "PNG")):
        assert Image.open(io.BytesIO(copy_of(data))).mode == "L"
    assert Image.open(io.BytesIO(copy_of(BIG))).mode == "RGB"


def test_a_colour_profile_is_kept_where_it_describes_the_copy():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for form in ("JPEG", "PNG", "WEBP"):
        made = copy_of(encode(photo(60, 90), form, icc_profile=profile))
        assert Image.open(io.BytesIO(made)).info["icc_profile"] == profile
    for mode in ("L", "CMYK"):
        made = copy_of(encode(photo(60, 90).convert(mode), icc_profile=b"x" * 16 + b"CMYK"))
        assert "icc_profile" not in Image.open(io.BytesIO(made)).info


def test_a_lower_quality_has_fewer_bytes():
    data = encode(photograph(200, 300))
    sizes = [len(copy_of(data, Shrinking(128, quality))) for quality in (50, 90, 100)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Shrinking(0), r"max_side is 0; it must be from 1 to 65535 pixels"),
        (Shrinking(70_000), r"max_side is 70000"),
        (Shrinking(8, 0), r"quality is 0; it must be from 1 to 100"),
        (Shrinking(8, 101), r"quality is 101"),
    ],
)
def test_a_rule_out_of_its_range_is_refused(tmp_path, rule, message):
    write_shard(tmp_path / "in/0.tar", [("a.jpg", BIG)])
    with pytest.raises(ValueError, match=message):
        shrink_shards(tmp_path / "in", tmp_path / "out", rule)
    with pytest.raises(ValueError, match=message):
        build_shards([("a", {"jpg": BIG})], tmp_path / "built", shrink=rule)
    assert not (tmp_path / "out").exists()


def test_suffixes_say_jpeg_unless_they_say_nothing():
    assert [suffix_of_copy(s) for s in ("png", "left.WEBP", "JPEG", "img", "v2.jfif")] == [
        "jpg", "left.jpg", "JPEG", "img", "v2.jfif",
    ]  # fmt: skip


def mixed_shard(path: Path) -> list[tuple[str, bytes]]:
    """Write a shard with every kind of entry, and return the members of its samples."""
    members = [
        ("a.jpg", BIG),
        ("a.cls", b"1"),
        ("a.json", b'{"width": 90}'),
        ("b.txt", "naïve 世界".encode()),
        ("b.PNG", encode(photo(60, 90), "PNG")),
        ("c.jpg", SMALL),
        ("c.cls", b"0"),
        ("d/" + "é" * 80 + ".webp", encode(photo(60, 90), "WEBP")),
        ("d/" + "é" * 80 + ".left.jpg", jpeg(60, 90, 7)),
    ]
    folder = entry("d", tarfile.DIRTYPE)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes([*members[:7], folder, *members[7:]]))
    return members


def test_all_but_the_larger_images_stays_byte_for_byte_and_in_order(tmp_path):
    before = mixed_shard(tmp_path / "in/x.tar")
    (tmp_path / "in/classes.json").write_text('["no", "yes"]')
    result = shrink_shards(tmp_path / "in", tmp_path / "out", RULE)
    with tarfile.open(tmp_path / "out/x.tar") as tar:
        after = [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]
        assert "d" in [m.name for m in tar.getmembers() if m.isdir()]
    renamed = {"b.PNG": "b.jpg", before[7][0]: before[7][0].replace("webp", "jpg")}
    assert [name for name, _ in after] == [renamed.get(name, name) for name, _ in before]
    changed = {name for (name, old), (_, new) in zip(before, after, strict=True) if old != new}
    assert changed == {"a.jpg", "b.PNG", before[7][0]}
    assert result.manifest.class_names == ("no", "yes")
    assert result.manifest.samples["label"].tolist() == [1, -1, 0, -1]
    assert result.manifest.samples["width"].tolist() == [32, 32, 30, 32]
    report = result.reports[0]
    assert (report.images, report.copies, report.unreadable) == (4, 3, [])
    assert report.bytes_after < report.bytes_before


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_of_every_format_keep_their_facts(tmp_path, form):
    infos = []
    for name, content in (("long/" * 18 + "k.png", encode(photo(60, 90), "PNG")), ("b.jpg", BIG)):
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.uname, info.mode = len(content), 1234567, "ann", 0o640
        infos.append((info, content))
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for info, content in infos:
            tar.addfile(info, io.BytesIO(content))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.tar").write_bytes(stream.getvalue())
    shrink_shards(tmp_path / "in", tmp_path / "out", RULE)
    with tarfile.open(tmp_path / "out/0.tar") as tar:
        found = [(m.name, m.mtime, m.uname, m.mode) for m in tar]
    assert found == [
        ("long/" * 18 + "k.jpg", 1234567, "ann", 0o640),
        ("b.jpg", 1234567, "ann", 0o640),
    ]


def test_names_that_are_not_utf8_stay_one_sample(tmp_path):
    shard = tar_bytes([("KEY.jpg", BIG), ("KEY.cls", b"2")], tarfile.USTAR_FORMAT)
    raw = b"k\xe9y"
    blocks = bytearray(shard)
    for at in (0, 512 + -(-len(BIG) // 512) * 512):
        blocks[at : at + 3] = raw
        blocks[at + 148 : at + 156] = b" " * 8
        blocks[at + 148 : at + 156] = b"%06o\0 " % sum(blocks[at : at + 512])
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.tar").write_bytes(bytes(blocks))
    manifest = shrink_shards(tmp_path / "in", tmp_path / "out", RULE).manifest
    assert manifest.samples["label"].tolist() == [2]
    with tarfile.open(tmp_path / "out/0.tar", errors="surrogateescape") as tar:
        assert [name.encode(errors="surrogateescape")[:3] for name in tar.getnames()] == [raw] * 2


def write_two(folder: Path) -> None:
    for number in range(2):
        write_shard(folder / f"{number}.tar", [(f"{number}{c}.jpg", jpeg(60, 90, number))
                                               for c in "ab"])  # fmt: skip


def test_a_killed_shrink_continues_with_the_missing_shards(tmp_path, monkeypatch):
    write_two(tmp_path / "in")
    whole = shrink_shards(tmp_path / "in", tmp_path / "whole", RULE)
    write = shrink._shrink_shard

    def killed_at_second(task: shrink._Task) -> None:
        if task.name == "1.tar":
            raise KeyboardInterrupt
        write(task)

    monkeypatch.setattr(shrink, "_shrink_shard", killed_at_second)
    with pytest.raises(KeyboardInterrupt):
        shrink_shards(tmp_path / "in", tmp_path / "out", RULE)
    assert list(digests(tmp_path / "out")) == ["0.tar"]
    (tmp_path / "out/.1.tar.99.tmp").write_bytes(b"of a process that was killed outright")
    written: list[str] = []
    monkeypatch.setattr(shrink, "_shrink_shard", lambda t: written.append(t.name) or write(t))
    again = shrink_shards(tmp_path / "in", tmp_path / "out", RULE)
    assert written == ["1.tar"]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert again.reports == whole.reports
    assert not list((tmp_path / "out").glob(".*"))
    shrink_shards(tmp_path / "in", tmp_path / "out", RULE)
    assert written == ["1.tar"]


def test_a_failure_while_a_shard_is_written_leaves_no_shard(tmp_path, monkeypatch):
    write_two(tmp_path / "in")
    data = (tmp_path / "in/0.tar").read_bytes()
    (tmp_path / "in/0.tar").write_bytes(data[:1500])
    with pytest.raises(TarError, match=r"0\.tar: the shard is cut"):
        shrink_shards(tmp_path / "in", tmp_path / "out", RULE)
    assert not list((tmp_path / "out").glob("*.tar*"))


@pytest.mark.parametrize("change", ["rule", "source", "content"])
def test_a_target_of_another_source_or_rule_is_refused_by_name(tmp_path, change):
    write_two(tmp_path / "in")
    write_two(tmp_path / "other")
    shrink_shards(tmp_path / "in", tmp_path / "out", RULE)
    before = digests(tmp_path / "out")
    if change == "content":
        write_shard(tmp_path / "in/1.tar", labelled(2))
    source = tmp_path / ("other" if change == "source" else "in")
    rule = Shrinking(16, 80) if change == "rule" else RULE
    with pytest.raises(OtherSourceError) as error:
        shrink_shards(source, tmp_path / "out", rule)
    words = {
        "rule": f"shrunk from {tmp_path}/in to side 32, quality 90; now it is {tmp_path}/in, "
        "side 16, quality 80: choose another folder",
        "source": f"now it is {tmp_path}/other, side 32, quality 90: choose",
        "content": "(its shards or classes have changed): choose",
    }
    assert words[change] in str(error.value)
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: (folder / "out/mine").touch(), "exists and holds no shrunk shards"),
        (lambda folder: write_two(folder / "in/more"), "0.tar have one name"),
        (
            lambda folder: (
                write_shard(folder / "in/more/9.tar", labelled(1)),
                (folder / "in/more/classes.json").write_text('["a"]'),
            ),
            "different classes.json: shrink each",
        ),
    ],
)
def test_what_cannot_be_one_folder_is_refused(tmp_path, prepare: Callable[[Path], object], message):
    (tmp_path / "out").mkdir()
    write_two(tmp_path / "in")
    prepare(tmp_path)
    spec = [tmp_path / "in", *filter(Path.exists, [tmp_path / "in/more"])]
    with pytest.raises(ValueError, match=message):
        shrink_shards(spec, tmp_path / "out", RULE)
    with pytest.raises(ValueError, match=r"is the folder of the shards themselves"):
        shrink_shards(tmp_path / "in", tmp_path / "in", RULE)


def broken_shard(path: Path) -> None:
    members = [("a.jpg", BIG), ("b.jpg", BIG[:900]), ("b.cls", b"1"), ("c.jpg", b"text")]
    write_shard(path, [*members, ("d.cls", b"3"), ("e.jpg", BIG), ("e.jpg", SMALL)])


def test_images_that_cannot_be_read_are_listed_and_kept(tmp_path):
    broken_shard(tmp_path / "in/0.tar")
    result = shrink_shards(tmp_path / "in", tmp_path / "out", RULE)
    report = result.reports[0]
    assert [line["key"] for line in report.unreadable] == ["b", "c", "d", "e"]
    assert "cannot be decoded" in report.unreadable[0]["reason"]
    with tarfile.open(tmp_path / "out/0.tar") as tar:
        assert tar.extractfile("b.jpg").read() == BIG[:900]
        assert len(tar.getnames()) == 7
    line = json.loads((tmp_path / "out/shrink_report.jsonl").read_text())
    assert (line["name"], line["images"], line["copies"]) == ("0.tar", 3, 1)


def test_images_that_cannot_be_read_are_left_out_on_request(tmp_path):
    broken_shard(tmp_path / "in/0.tar")
    rule = RULE._replace(drop_unreadable=True)
    result = shrink_shards(tmp_path / "in", tmp_path / "out", rule)
    assert [line["key"] for line in result.reports[0].unreadable] == ["b", "c", "d", "e"]
    with tarfile.open(tmp_path / "out/0.tar") as tar:  # d and e may hold parts of others
        assert tar.getnames() == ["a.jpg", "d.cls", "e.jpg", "e.jpg"]


def test_remote_shards_are_shrunk_as_local_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("ZETA_INDEX_DIR", str(tmp_path / "index"))
    write_two(tmp_path / "in")
    (tmp_path / "in/classes.json").write_text('["a"]')
    near = shrink_shards(tmp_path / "in", tmp_path / "near", RULE)
    with serve(tmp_path / "in") as server:
        server.faults.extend([500, "reset"])
        far = shrink_shards(f"{server.url}/{{0..1}}.tar", tmp_path / "far", RULE)
    assert digests(tmp_path / "far") == digests(tmp_path / "near")
    assert far.manifest.class_names == near.manifest.class_names == ("a",)


def test_a_build_makes_the_same_copies(tmp_path):
    samples = [("a", {"png": encode(photo(60, 90), "PNG"), "cls": b"1"}), ("b", {"jpg": SMALL})]
    manifest = build_shards(samples, tmp_path / "out", shrink=RULE, seed=None)
    found = contents(manifest)
    assert found == {
        "a": {"jpg": copy_of(samples[0][1]["png"]), "cls": b"1"},
        "b": {"jpg": SMALL},
    }
    with pytest.raises(ValueError, match="holds shards of another source, or of this one"):
        build_shards(samples, tmp_path / "out", seed=None)


def test_a_build_counts_copies_not_originals_against_its_limit(tmp_path):
    samples = [(f"{n}", {"jpg": jpeg(200, 300, n)}) for n in range(20)]
    manifest = build_shards(samples, tmp_path / "out", shrink=RULE, max_size_mb=0.05)
    assert len(manifest.shards) < len(
        build_shards(samples, tmp_path / "b", max_size_mb=0.05).shards
    )
    assert all(shard.nbytes <= 50_000 for shard in manifest.shards)


def test_the_shards_of_an_index_keep_their_order_and_count(tmp_path):
    write_two(tmp_path / "in")
    before = index_shards(tmp_path / "in")
    after = shrink_shards(tmp_path / "in", tmp_path / "out", RULE).manifest
    assert [s.count for s in after.shards] == [s.count for s in before.shards]
    assert after.samples["label"].tolist() == before.samples["label"].tolist()


def test_a_sample_that_rotted_since_it_was_indexed_is_not_copied_under_a_new_checksum(tmp_path):
    shard = write_shard(tmp_path / "in/a.tar", labelled(3))
    index_shards(tmp_path / "in")
    content, before = bytearray(shard.read_bytes()), shard.stat().st_mtime_ns
    content[512] ^= 1  # the label of the first image
    shard.write_bytes(content)
    os.utime(shard, ns=(before, before))
    with pytest.raises(ValueError, match=r"0000 in .*a\.tar: damaged in storage: the .* byte 0 "):
        shrink_shards(tmp_path / "in", tmp_path / "out", RULE)
    assert not (tmp_path / "out/a.tar").exists()


@pytest.mark.slow
def test_a_shrink_in_processes_that_is_killed_outright_continues_to_the_same_bytes(tmp_path):
    photo = encode(photograph(900, 1200))
    for number in range(4):
        photos = [(f"{number}{n}.jpg", photo) for n in range(6)]
        write_shard(tmp_path / "in" / f"{number}.tar", photos)
    shrink_shards(tmp_path / "in", tmp_path / "whole", RULE)
    words = ["shards", "shrink", str(tmp_path / "in"), str(tmp_path / "out")]
    words += ["--max-side", "32", "--workers", "2"]
    command = [sys.executable, "-m", "launch", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not list((tmp_path / "out").glob("*.tar")):
            time.sleep(0.01)
            assert process.poll() is None
        process.kill()
    left = digests(tmp_path / "out")
    assert left.items() <= digests(tmp_path / "whole").items()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert "24 of 24 images made smaller" in done.stdout
    assert not list((tmp_path / "out").glob(".*"))
