"""Specs of shards: files are compared, not their spellings, and odd names are explained."""

from __future__ import annotations

import os

import pytest

from data_pipeline.shards import folder
from data_pipeline.shards.folder import file_mark, nearly_shards, resolve_shards
from data_pipeline.shards.sources.read import open_source
from launch.cli import entry_point
from tests.data_pipeline.shard_fixtures import encode, labelled, photo, write_shard


@pytest.mark.parametrize(
    "name", ["0.tar.gz", "0.tgz", "0.tar.bz2", "0.tar.xz", "0.tar.zst", "0.tar.lz4", "0.TAR.GZ"]
)
def test_compressed_shards_are_named_with_the_remedy(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    for spec in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match="unpack it to a plain") as error:
            resolve_shards(spec)
        assert name in str(error.value)


def test_a_shard_named_in_capitals_is_to_be_renamed(tmp_path):
    write_shard(tmp_path / "0.TAR", labelled(1))
    for spec in (tmp_path, tmp_path / "0.TAR"):
        with pytest.raises(ValueError, match="rename it to end in"):
            resolve_shards(spec)


def test_index_says_which_files_beside_the_shards_are_left_out(tmp_path, capsys):
    write_shard(tmp_path / "0.tar", labelled(2))
    write_shard(tmp_path / "1.TAR", labelled(2))
    (tmp_path / "2.tar.gz").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"x")
    assert nearly_shards(tmp_path) == ["1.TAR", "2.tar.gz"]
    assert entry_point(["shards", "index", str(tmp_path)]) == 0
    assert "2 files in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("suffix", "format"),
    [
        ("jfif", "JPEG"), ("jpe", "JPEG"), ("JPEG", "JPEG"), ("pgm", "PPM"), ("ppm", "PPM"),
        ("pnm", "PPM"), ("avif", "AVIF"), ("tif", "TIFF"), ("jp2", "JPEG2000"),
    ],
)  # fmt: skip
def test_images_of_rarer_names_are_read_with_their_class(tmp_path, suffix, format):
    for name, ending in (("cat", "png"), ("dog", suffix)):
        (tmp_path / name).mkdir()
        picture = photo(20, 24).convert("L" if ending == "pgm" else "RGB")
        image = encode(picture, "PNG" if ending == "png" else format)
        (tmp_path / name / f"a.{ending}").write_bytes(image)
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert len(source.samples) == 2
    assert not +source.skipped


def test_a_file_has_one_mark_however_it_is_spelled_or_linked(tmp_path, monkeypatch):
    shard = write_shard(tmp_path / "a" / "0.tar", labelled(1))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.link(shard, tmp_path / "hard.tar")
    monkeypatch.chdir(tmp_path)
    marks = {
        file_mark(name)
        for name in ("a/0.tar", str(shard), "link/0.tar", "hard.tar", "./a/../a/0.tar",
                     f"file://{shard}")
    }  # fmt: skip
    assert len(marks) == 1
    other = write_shard(tmp_path / "b" / "0.tar", labelled(1))
    assert file_mark(str(other)) not in marks
    assert len(resolve_shards(["a", "link", "hard.tar", str(shard)])) == 1


@pytest.mark.parametrize(
    "other", ["HTTP://Host/x/0.tar", "http://host:80/x/0.tar", "http://host/x/%30.tar"]
)
def test_a_url_has_one_mark_however_it_is_spelled(other):
    assert file_mark("http://host/x/0.tar") == file_mark(other)
    assert file_mark("http://host/X/0.tar") != file_mark(other)
    assert file_mark("http://host:8080/x/0.tar") != file_mark(other)


@pytest.mark.parametrize("kind", ["folder", "broken link", "pipe"])
def test_what_is_no_file_is_no_shard(tmp_path, kind):
    write_shard(tmp_path / "0.tar", labelled(1))
    odd = tmp_path / "1.tar"
    if kind == "folder":
        odd.mkdir()
    elif kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to("none")
    with pytest.raises(ValueError, match=r"1\.tar is no file"):
        resolve_shards(tmp_path)


@pytest.mark.parametrize("spec", ["", " ", ["", "shards"]])
def test_an_empty_path_is_not_the_current_folder(spec):
    with pytest.raises(ValueError, match="is empty; give"):
        resolve_shards(spec)


@pytest.mark.parametrize("words", [["", "out"], ["photos", ""]])
def test_a_variable_that_is_not_set_is_not_the_current_folder(words, capsys):
    with pytest.raises(SystemExit):
        entry_point(["shards", "build", *words])
    assert "it is empty; give a path" in capsys.readouterr().err


def _asked(monkeypatch, spec) -> tuple[list[str], int]:
    """Return the shards of a spec, and how many files were looked at one by one."""
    asked = []
    monkeypatch.setattr(folder, "file_mark", lambda shard: asked.append(shard) or file_mark(shard))
    return resolve_shards(spec), len(asked)


def test_the_lists_of_folders_show_that_shards_are_distinct_without_a_look_at_each(
    tmp_path, monkeypatch
):
    for name in ("a/0.tar", "a/1.tar", "b/0.tar"):
        write_shard(tmp_path / name, labelled(1))
    monkeypatch.chdir(tmp_path)
    for spec in (["a", "b"], ["a/*.tar", "b/0.tar"], ["{a,b}/0.tar", "a/1.tar"]):
        shards, asked = _asked(monkeypatch, spec)
        assert len(shards) == 3
        assert asked == 0


@pytest.mark.parametrize("again", ["hard", "symbolic", "spelling"])
def test_links_and_spellings_are_looked_at(tmp_path, monkeypatch, again):
    shard = write_shard(tmp_path / "a/0.tar", labelled(1))
    other = tmp_path / "a/1.tar"
    if again == "hard":
        os.link(shard, other)
    elif again == "symbolic":
        other.symlink_to(shard)
    spec = [str(shard), str(tmp_path / "a/../a")] if again == "spelling" else tmp_path / "a"
    shards, asked = _asked(monkeypatch, spec)
    assert shards == [str(shard)]
    assert asked == 2
