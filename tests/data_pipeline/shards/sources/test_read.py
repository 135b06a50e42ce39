from __future__ import annotations

import json
import os
import re
import unicodedata
from pathlib import Path

import pytest

from data_pipeline.config import DataWarning
from data_pipeline.shards.sources.read import FilePart, SourceSample, from_memory, open_source
from tests.data_pipeline.shard_fixtures import error_as_nobody, jpeg, labelled, write_shard


def put(path: Path, content: bytes = b"image") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def listing(source) -> dict[str, bytes | None]:
    """Return the label (content of .cls) of each key."""
    return {sample.key: sample.members.get("cls") for sample in source.samples}


def test_the_class_is_the_first_folder_however_deep_the_image(tmp_path):
    for name in ("dog/1.jpg", "cat/2.JPEG", "cat/more/deep/3.png", "Ünï/4.webp"):
        put(tmp_path / name)
    source = open_source(tmp_path)
    assert source.class_names == ("cat", "dog", "Ünï")
    assert listing(source) == {
        "cat/2": b"0", "cat/more/deep/3": b"0", "dog/1": b"1", "Ünï/4": b"2",
    }  # fmt: skip
    assert [next(iter(s.members)) for s in source.samples] == ["jpg", "png", "jpg", "webp"]


def test_a_flat_folder_and_unwanted_labels_give_none(tmp_path):
    put(tmp_path / "flat/1.jpg")
    put(tmp_path / "deep/2023/2.jpg")
    for name in ("flat", "deep"):
        source = open_source(tmp_path / name, labels=False)
        assert source.class_names is None
        assert set(listing(source).values()) == {None}
    assert open_source(tmp_path / "flat").class_names is None
    assert open_source(tmp_path / "deep").class_names == ("2023",)


def test_what_is_passed_over_is_counted_with_its_reason(tmp_path):
    for name in ("cat/1.jpg", "cat/.2.jpg", "cat/3.txt", "cat/noext", ".git/4.jpg", "5.jpg"):
        put(tmp_path / name)
    (tmp_path / "cat/6.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "cat/loop").symlink_to(tmp_path / "cat")
    source = open_source(tmp_path)
    assert listing(source) == {"cat/1": b"0"}
    assert dict(source.skipped) == {
        "hidden file": 1,
        "not an image by its name (.txt)": 1,
        "not an image by its name (no extension)": 1,
        "hidden folder": 1,
        "image beside the class folders, so without a class": 1,
        "broken link, or not a regular file": 1,
        "folder linked twice": 1,
    }


def test_linked_class_folders_are_followed(tmp_path):
    put(tmp_path / "store/cat/1.jpg")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/cat").symlink_to(tmp_path / "store/cat")
    assert listing(open_source(tmp_path / "train")) == {"cat/1": b"0"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "gone", "gone does not exist; give a folder of images"),
        (lambda p: p, r"no images found in .* \(it is empty\); it must hold image files"),
        (lambda p: put(p / "a.txt").parent, r"no images found .*1 x not an image by its name"),
        (lambda p: put(p / "a.zip"), "a.zip is a single file; give the folder"),
        (lambda p: put(p / "a.csv", b"file,label\na.jpg,1\n"), "needs a header with path"),
        (lambda p: put(p / "a.csv", b"path\n\xff\xfe.jpg\n"), "cannot be read as UTF-8 CSV"),
        (
            lambda p: put(p / "a.csv", b"path,label\nx.jpg,1\n"),
            r"no file that exists \(1 rows\)",
        ),
        (lambda p: put(p / "a.csv", b"path,class\nx.jpg,1\n"), "path, class; it needs a header"),
        (lambda p: put(p / "a.csv", b""), "of an empty file; it needs a header"),
        (lambda p: put(p / "a.jsonl", b"{"), "line 1 is not JSON"),
        (lambda p: put(p / "a.jsonl", b"[" * 99999), "line 1 is not JSON"),
        (lambda p: put(p / "a.jsonl", b'{"path": "x"}'), "no line of .* has a label or a caption"),
        (
            lambda p: put(p / "a.jsonl", b'{"path": "x", "label": 1.0}'),
            r"label is 1.0, a float; it must be an integer or a name",
        ),
        (
            lambda p: put(p / "a.jsonl", b'{"path": "x", "caption": "\\ud83d"}'),
            "caption of row 1 is not Unicode text",
        ),
        (lambda p: put(p / "a.jsonl", b"\n[1]"), "line 2 is not an object with a path"),
    ],
)
def test_a_source_that_gives_nothing_says_what_to_do(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        open_source(make(tmp_path))


def test_a_folder_that_may_not_be_read_is_named(tmp_path):
    put(tmp_path / "cat/1.jpg")
    put(tmp_path / "dog/1.jpg")
    tmp_path.chmod(0o755)
    (tmp_path / "dog").chmod(0)
    message = error_as_nobody(tmp_path, lambda: open_source(tmp_path))
    (tmp_path / "dog").chmod(0o755)
    assert message.startswith(f"cannot read the folder {tmp_path}/dog: Permission denied")
    (tmp_path / "dog").chmod(0)
    message = error_as_nobody(tmp_path / "dog", lambda: open_source(tmp_path / "dog"))
    (tmp_path / "dog").chmod(0o755)
    assert message.startswith(f"cannot read the folder {tmp_path}/dog: Permission denied; make")


def test_a_csv_of_paths_names_and_captions(tmp_path):
    for name in ("img/1.jpg", "img/2.png"):
        put(tmp_path / name)
    elsewhere = put(tmp_path / "other/3.jpg")
    table = put(
        tmp_path / "lists/t.csv",
        '\ufeffpath,label,caption\n../img/1.jpg,dog,"a, b\n世界"\n../img/2.png,cat,\n'
        f"{elsewhere},,\ngone.jpg,dog,\n".encode(),
    )
    source = open_source(table, root=tmp_path)
    assert source.class_names == ("cat", "dog")
    assert [(s.key, s.members.get("cls"), s.members.get("txt")) for s in source.samples] == [
        ("img/1", b"1", "a, b\n世界".encode()),
        ("img/2", b"0", None),
        ("other/3", None, None),
    ]
    assert source.skipped == {"row whose file does not exist": 1}
    assert source.samples[2].members["jpg"].path == str(elsewhere)


def test_columns_are_found_by_name_whatever_their_case_and_spaces(tmp_path):
    put(tmp_path / "1.jpg")
    table = put(tmp_path / "t.csv", b"Caption, Label ,PATH\r\n a dog, dog, 1.jpg\r\n")
    sample = open_source(table).samples[0]
    assert (sample.members["cls"], sample.members["txt"]) == (b"0", b"a dog")


def test_captions_keep_every_unicode_character(tmp_path):
    put(tmp_path / "1.jpg")
    caption = "".join(map(chr, (0x2028, 0x85, 0x0B, 0x1C, 0x1F98A, 0x301, 0x202E))) + "\n\t\"'" * 2
    for name, text in (
        ("raw.jsonl", json.dumps({"path": "1.jpg", "caption": caption}, ensure_ascii=False)),
        ("escaped.jsonl", json.dumps({"path": "1.jpg", "caption": caption})),
        ("t.csv", 'path,caption\n1.jpg,"x' + caption.replace('"', '""') + 'x"\n'),
        ("long.csv", f"path,caption\n1.jpg,{'é' * 200_000}\n"),
    ):
        stored = open_source(put(tmp_path / name, text.encode())).samples[0].members["txt"].decode()
        expected = {"t.csv": f"x{caption}x", "long.csv": "é" * 200_000}.get(name, caption)
        assert stored == expected


@pytest.mark.parametrize("label", ["-1", "1.0", "+3", "2e3", "inf", "2147483648", "9" * 5000])
def test_a_number_that_is_no_class_index_does_not_turn_indices_into_names(tmp_path, label):
    put(tmp_path / "1.jpg")
    table = put(tmp_path / "t.csv", f"path,label\n1.jpg,10\n1.jpg,{label}\n".encode())
    with pytest.raises(
        ValueError, match=rf"has the label {re.escape(label[:200])}(\.\.\.)?; labels must"
    ):
        open_source(table)


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        (["1", "nan", "3"], "line 3 has the label nan, which stands for a missing value"),
        (["cat", "dog", "None"], "line 4 has the label None, which stands for a missing value"),
        (["1", "N/A"], "line 3 has the label N/A"),
        (["1", "", "NULL"], "line 4 has the label NULL"),
        (["<NA>"], "line 2 has the label <NA>"),
        (["1", "2", "cat"], "line 2 has the label 1, a number, and line 4 the label cat, a name"),
        (["cat", "1.5"], "line 3 has the label 1.5, a number, and line 2 the label cat"),
    ],
)
def test_one_label_of_another_kind_does_not_renumber_the_others(tmp_path, labels, fault):
    put(tmp_path / "1.jpg")
    csv = put(
        tmp_path / "t.csv", ("path,label\n" + "".join(f"1.jpg,{x}\n" for x in labels)).encode()
    )
    with pytest.raises(ValueError, match=re.escape(fault)):
        open_source(csv)
    lines = [json.dumps({"path": "1.jpg", "label": x}) for x in labels]
    table = put(tmp_path / "t.jsonl", "\n".join(lines).encode())
    with pytest.raises(ValueError, match="has the label"):
        open_source(table)


@pytest.mark.parametrize(
    ("table", "fault"),
    [
        ("path,label,caption\n1.jpg,3,a cat, asleep\n", "line 2 has 4 values under a header of 3"),
        ("path,label\n1.jpg\n", "line 2 has 1 values under a header of 2"),
        (
            'path,caption\n1.jpg,"a cat\n1.jpg,a dog\n1.jpg,a cow\n',
            "line 4 is not CSV: unexpected end",
        ),
        ("path,label,label\n1.jpg,1,2\n", "two columns label"),
    ],
)
def test_rows_that_would_lose_a_value_or_the_rows_after_them_are_refused(tmp_path, table, fault):
    put(tmp_path / "1.jpg")
    with pytest.raises(ValueError, match=fault):
        open_source(put(tmp_path / "t.csv", table.encode()))


def test_the_keys_of_json_lines_are_found_whatever_their_case(tmp_path):
    put(tmp_path / "1.jpg")
    rows = [{"Path": "1.jpg", "Label": 7, "caption": "x"}]
    table = put(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)).encode())
    assert listing(open_source(table)) == {"1": b"7"}
    table = put(tmp_path / "t.jsonl", b'{"path": "1.jpg", "label": 1, "Label": 2}')
    with pytest.raises(ValueError, match="line 1 has a key twice"):
        open_source(table)


def test_a_table_reads_no_file_outside_its_folder_unless_asked(tmp_path):
    secret = put(tmp_path / "secret/key.jpg")
    put(tmp_path / "t/in/1.jpg")
    (tmp_path / "t/link").symlink_to(tmp_path / "secret")
    (tmp_path / "t/in/2.jpg").symlink_to(secret)
    for path in (
        str(secret),
        "../secret/key.jpg",
        "in/../../secret/key.jpg",
        "link/key.jpg",
        "in/2.jpg",
    ):
        table = put(tmp_path / "t/t.csv", f"path,label\nin/1.jpg,0\n{path},1\n".encode())
        with pytest.raises(ValueError, match=r"line 3 names .* outside .*--root") as raised:
            open_source(table)
        assert f"--root {tmp_path}`" in str(raised.value)
        assert len(open_source(table, root=tmp_path).samples) == 2


def test_a_table_takes_no_file_that_is_no_image_by_name_and_content(tmp_path):
    put(tmp_path / "passwd", b"root:x:0:0:root:/root:/bin/bash\n")
    put(tmp_path / "photo", jpeg())
    source = open_source(put(tmp_path / "t.csv", b"path,label\npasswd,0\nphoto,1\n"))
    assert listing(source) == {"photo": b"1"}
    assert source.skipped == {"row whose file is no image, by its name and its content": 1}


def test_files_of_several_rows_are_said_and_so_are_their_conflicts(tmp_path):
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        put(tmp_path / name)
    table = put(tmp_path / "t.csv", b"path,label\n1.jpg,0\n./1.jpg,0\n2.jpg,0\n2.jpg,1\n3.jpg,1\n")
    with pytest.warns(DataWarning) as told:
        open_source(table)
    first, second = (str(each.message) for each in told)
    assert first.startswith(f"2 files are named in several rows of {table} (4 rows)")
    assert second.startswith(
        f"1 of them has different labels in different rows, as {tmp_path}/2.jpg"
    )


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (("train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/dog/1.jpg"), "train, val"),
        (("Train/cat/1.jpg", "Test/1.jpg"), "Test, Train"),
        (("train/cat/1.jpg", "train/dog/1.jpg"), "train"),
        (("train/cat/1.jpg", "valid/cat/1.jpg", "extra/1.jpg"), "train, valid"),
    ],
)
def test_splits_are_not_taken_for_classes(tmp_path, files, splits):
    for name in files:
        put(tmp_path / name)
    with pytest.raises(ValueError, match=f"the folders {splits} of .* look like splits"):
        open_source(tmp_path)
    assert open_source(tmp_path, labels=False).class_names is None


def test_classes_may_have_the_name_of_a_split(tmp_path):
    for name in ("train/1.jpg", "bus/1.jpg", "test/1.jpg"):
        put(tmp_path / name)
    assert open_source(tmp_path).class_names == ("bus", "test", "train")


def test_class_folders_whose_names_cannot_be_written_are_named_before_anything_is(tmp_path):
    for name in (b"b\xe9te", b"b\xe8te"):
        put(Path(os.fsdecode(os.fsencode(tmp_path) + b"/src/" + name)) / "1.jpg")
    with pytest.raises(ValueError, match=r"b'b\\xe8te' and b'b\\xe9te', whose names are not UTF-8"):
        open_source(tmp_path / "src")


def test_classes_that_look_alike_are_refused(tmp_path):
    for form in ("NFC", "NFD"):
        put(tmp_path / "src" / unicodedata.normalize(form, "café") / "1.jpg")
    with pytest.raises(ValueError, match=r"look alike, '.*' and '.*'.*two forms of Unicode"):
        open_source(tmp_path / "src")
    put(tmp_path / "1.jpg")
    rows = "".join(f"1.jpg,{unicodedata.normalize(form, 'café')}\n" for form in ("NFC", "NFD"))
    with pytest.raises(ValueError, match="look alike"):
        open_source(put(tmp_path / "t.csv", f"path,label\n{rows}".encode()))


def test_images_that_are_left_out_with_their_folder_are_said(tmp_path):
    for name in ("cat/1.jpg", "..x/2.jpg", "..x/deep/3.png", "owl/4.heic"):
        put(tmp_path / name)
    with pytest.warns(DataWarning) as told:
        assert listing(open_source(tmp_path)) == {"cat/1": b"0"}
    texts = " ".join(str(each.message) for each in told)
    assert f"2 images in the folder {tmp_path}/..x are left out" in texts
    assert f"1 of the folders of {tmp_path} hold no image that can be used" in texts
    assert "'owl'" in texts


def test_images_of_less_common_names_keep_their_class(tmp_path):
    names = ("a/1.jfif", "b/1.jpe", "c/1.pgm", "d/1.AVIF", "e/1.pbm", "f/1.pnm")
    for name in names:
        put(tmp_path / name)
    source = open_source(tmp_path)
    assert source.class_names == ("a", "b", "c", "d", "e", "f")
    suffixes = [next(iter(sample.members)) for sample in source.samples]
    assert suffixes == ["jpg", "jpg", "pgm", "avif", "pbm", "pnm"]


def test_members_of_a_sample_that_lie_apart_come_together(tmp_path):
    apart = [
        *((f"{n}.jpg", jpeg(seed=n)) for n in range(3)),
        *((f"{n}.cls", b"%d" % n) for n in range(3)),
    ]
    write_shard(tmp_path / "s/a.tar", [*apart, ("0.jpg", jpeg(seed=9))])
    source = open_source(tmp_path / "s")
    assert [(s.key, sorted(s.members)) for s in source.samples] == [
        ("0", ["cls", "jpg"]), ("1", ["cls", "jpg"]), ("2", ["cls", "jpg"]), ("0-2", ["jpg"]),
    ]  # fmt: skip


def test_labels_of_a_table_are_left_out_on_request(tmp_path):
    put(tmp_path / "1.jpg")
    table = put(tmp_path / "t.csv", b"path,label,caption\n1.jpg,dog,hello\n")
    source = open_source(table, labels=False)
    assert source.class_names is None
    assert set(source.samples[0].members) == {"jpg", "txt"}


def test_integer_labels_of_a_table_are_class_indices(tmp_path):
    put(tmp_path / "1.jpg")
    put(tmp_path / "2.jpg")
    rows = [{"path": "1.jpg", "label": 7}, {"path": "2.jpg", "label": "10", "caption": "x"}]
    table = put(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)).encode())
    source = open_source(table)
    assert source.class_names is None
    assert listing(source) == {"1": b"7", "2": b"10"}
    assert source.samples[1].members["txt"] == b"x"


def test_existing_shards_are_a_source(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [*labelled(2), ("README", b"x")])
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    source = open_source(tmp_path)
    assert source.class_names == ("a", "b", "c")
    assert [s.key for s in source.samples] == ["0000", "0001"]
    part = source.samples[1].members["jpg"]
    assert isinstance(part, FilePart)
    assert shard.read_bytes()[part.offset : part.offset + part.nbytes] == jpeg(24, 21, 1)
    assert source.skipped == {"tar entry that belongs to no sample": 1}


def test_a_folder_of_images_with_a_stray_tar_is_a_folder_of_images(tmp_path):
    put(tmp_path / "cat/1.jpg")
    put(tmp_path / "cat.tar")
    source = open_source(tmp_path)
    assert listing(source) == {"cat/1": b"0"}
    assert source.skipped["not an image by its name (.tar)"] == 1


def test_keys_that_collide_are_numbered(tmp_path):
    for name in ("a.jpg", "a.png", "a-2.jpg", "a.b.jpg", "a_b.jpg"):
        put(tmp_path / name)
    keys = [sample.key for sample in open_source(tmp_path).samples]
    assert keys == ["a-2", "a_b", "a", "a-3", "a_b-2"]
    memory = from_memory([("k", {"jpg": b"1"}), ("k", {"jpg": b"2"})])
    assert [sample.key for sample in memory.samples] == ["k", "k-2"]
    memory = from_memory([(key, {"jpg": b""}) for key in ("k", "k", "k-2")])
    assert [sample.key for sample in memory.samples] == ["k", "k-3", "k-2"]


@pytest.mark.parametrize(
    ("key", "clean"),
    [
        ("a.b", "a_b"), ("d.e/a", "d.e/a"), ("/a", "a"), ("a\nb\0c", "a_b_c"), ("__x__/a", "x__/a"),
        ("x/..", "x/__"), ("\udcff", "\ufffd"), ("世界/é", "世界/é"),
    ],
)  # fmt: skip
def test_keys_are_such_that_webdataset_keeps_them_whole(key, clean):
    assert from_memory([(key, {"jpg": b""})]).samples == [SourceSample(clean, {"jpg": b""})]


def test_nothing_in_memory_is_an_error():
    with pytest.raises(ValueError, match="no samples to write"):
        from_memory([])
