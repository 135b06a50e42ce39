"""`zeta shards verify` and `stats`, and `zeta data bench`, as commands."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from data_pipeline.shards.index import index_shards
from launch.cli import entry_point
from tests.data_pipeline.shard_fixtures import encode, jpeg, labelled, photo, write_shard
from tests.data_pipeline.synthetic import write_shards


def test_verify_exits_with_1_if_anything_is_bad_and_names_it(tmp_path, capsys):
    write_shard(tmp_path / "0.tar", labelled(3))
    assert entry_point(["shards", "verify", str(tmp_path), "--workers", "1"]) == 0
    assert "3 samples in 1 shards, 0 faults" in capsys.readouterr().out
    write_shard(tmp_path / "1.tar", [("x.jpg", b"\xff\xd8\xff")])
    assert entry_point(["shards", "verify", str(tmp_path), "--workers", "1"]) == 1
    assert "1.tar\tx\tJPEG ends before its size" in capsys.readouterr().out
    assert entry_point(["shards", "verify", str(tmp_path), "--workers", "1", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["shards"], result["samples"]) == (2, 4)
    assert [bad["key"] for bad in result["bad"]] == ["x"]


def test_index_keeps_checksums_unless_told_not_to_and_verify_counts_what_has_none(tmp_path, capsys):
    write_shard(tmp_path / "0.tar", labelled(3))
    assert entry_point(["shards", "index", str(tmp_path), "--no-checksums"]) == 0
    assert entry_point(["shards", "verify", str(tmp_path), "--workers", "1"]) == 0
    assert "3 samples have no checksum in the index" in capsys.readouterr().out
    assert entry_point(["shards", "index", str(tmp_path)]) == 0
    assert entry_point(["shards", "verify", str(tmp_path), "--workers", "1"]) == 0
    assert "no checksum" not in capsys.readouterr().out
    shard = tmp_path / "0.tar"
    content, before = bytearray(shard.read_bytes()), shard.stat().st_mtime_ns
    content[512] ^= 1  # the label of the first image
    shard.write_bytes(content)
    os.utime(shard, ns=(before, before))
    assert entry_point(["shards", "verify", str(tmp_path), "--workers", "1"]) == 1
    assert "0.tar\t0000\tdamaged in storage" in capsys.readouterr().out


def test_stats_are_text_json_and_a_picture(tmp_path, capsys):
    write_shard(tmp_path / "0.tar", labelled(6))
    index_shards(tmp_path)
    png = tmp_path / "stats.png"
    assert entry_point(["shards", "stats", str(tmp_path), "--png", str(png)]) == 0
    text = capsys.readouterr().out
    assert "6 in 1 shards" in text
    assert "width / height" in text
    assert "####" in text
    with Image.open(png) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    assert entry_point(["shards", "stats", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6
    assert entry_point(["shards", "stats", str(tmp_path), "--png", "x.pdf"]) == 1
    assert "give the name of a .png file" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_prints_rates_and_stages(tmp_path, capsys):
    shards = write_shards(tmp_path / "shards", [200, 200])
    index_shards(shards)
    words = ["data", "bench", "first_run", f"data.shards={shards}", "model.num_classes=2"]
    words += ["data.token_budget=512", "data.workers=1", "--packs", "4", "--rounds", "2", "--json"]
    assert entry_point(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images_per_s"] > 0
    assert result["decode_bound_images_per_s"] > 0
    assert set(result["stages"]) == {
        "process_ms", "plan_ms", "wait_ms", "read_ms", "decode_ms", "pack_ms", "queue_occupancy",
    }  # fmt: skip
    assert 0 <= result["stages"]["queue_occupancy"] <= 1


def test_build_takes_sizes_with_a_unit(tmp_path, capsys):
    for number in range(6):
        (tmp_path / "photos").mkdir(exist_ok=True)
        photo(100, 100, number).save(tmp_path / "photos" / f"{number}.png")
    words = ["shards", "build", str(tmp_path / "photos"), str(tmp_path / "out"), "--json"]
    assert entry_point([*words, "--max-size", "60kB"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"] > 1
    assert all(path.stat().st_size < 75_000 for path in (tmp_path / "out").glob("*.tar"))
    for wrong in ("12", "0MB", "x1GB", "1TBs"):
        with pytest.raises(SystemExit):
            entry_point([*words, "--max-size", wrong])
        assert "is not a size such as 512MB" in capsys.readouterr().err


def test_shrink_writes_smaller_images_and_exits_with_1_if_one_cannot_be_read(tmp_path, capsys):
    big = [("a.png", encode(photo(60, 90), "PNG")), ("a.cls", b"0"), ("b.jpg", jpeg(60, 90))]
    write_shard(tmp_path / "in/0.tar", big)
    words = ["shards", "shrink", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "1"]
    assert entry_point([*words, "--max-side", "32"]) == 0
    assert "2 of 2 images made smaller" in capsys.readouterr().out
    write_shard(tmp_path / "in/1.tar", [("x.jpg", jpeg(60, 90)[:900])])
    assert entry_point([*words, "--max-side", "32"]) == 1
    assert "(its shards or classes have changed): choose another" in capsys.readouterr().err
    words[3] = str(tmp_path / "more")
    assert entry_point([*words, "--max-side", "32"]) == 1
    error = capsys.readouterr().err
    assert "1.tar\tx\tcannot be decoded" in error
    assert "samples without an image that can be read: 1, kept as they are" in error
    assert entry_point([*words, "--max-side", "32", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["shards"], result["images"], result["copies"]) == (2, 3, 2)
    assert [line["key"] for line in result["unreadable"]] == ["x"]


def test_build_with_a_side_reports_each_part_and_its_options_need_one(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for number in range(6):
        photo(60, 90, number).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos/9.jpg").write_bytes(jpeg(60, 90)[:900])
    words = ["shards", "build", str(tmp_path / "photos"), str(tmp_path / "out"), "--json"]
    assert entry_point([*words, "--quality", "80"]) == 1
    assert "are for --max-side N: give it too" in capsys.readouterr().err
    options = ["--max-side", "32", "--val-share", "0.3", "--drop-unreadable"]
    assert entry_point([*words, *options]) == 1
    parts = json.loads(capsys.readouterr().out)
    shrunk = [part["shrink"] for part in parts.values()]
    assert sum(part["copies"] for part in shrunk) == 6
    assert [line["key"] for part in shrunk for line in part["unreadable"]] == ["9"]
    assert sum(part["images"] for part in parts.values()) == 6
