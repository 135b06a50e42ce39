from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import tracemalloc

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shards.tar_reader import (
    ShardFile,
    TarError,
    iter_members,
    iter_samples,
    parse_sample,
    read_sample,
)
from tests.data_pipeline.shard_fixtures import entry, labelled, mutated, tar_bytes, write_shard

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def reader(data: bytes):
    return lambda offset, nbytes: data[offset : offset + nbytes]


def members_of(data: bytes):
    return list(iter_members(reader(data), len(data), "a.tar"))


def by_tarfile(data: bytes) -> list[tuple[str, int, int, bool]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(m.name, m.offset_data, m.size, m.isreg()) for m in tar]


names = st.text(
    st.characters(blacklist_categories=["Cs"], blacklist_characters="\0/"), min_size=1, max_size=40
).filter(lambda name: name.strip("."))
paths = st.lists(names, min_size=1, max_size=12).map("/".join)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(paths, st.binary(max_size=1500)), max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_entries_of_any_name_and_size_are_read_as_tarfile_reads_them(members, format):
    data = tar_bytes(members, format)
    read = members_of(data)
    assert [(m.name, m.data_offset, m.nbytes, m.regular) for m in read] == by_tarfile(data)
    assert [data[m.data_offset : m.data_offset + m.nbytes] for m in read] == [c for _, c in members]


@pytest.mark.parametrize("format", FORMATS)
def test_folders_and_links_are_entries_without_content(format):
    data = tar_bytes(
        [
            entry("sub/", tarfile.DIRTYPE),
            entry("sub/a.jpg", tarfile.SYMTYPE, "../../etc/passwd"),
            entry("sub/b.jpg", tarfile.LNKTYPE, "sub/c.jpg"),
            entry("pipe", tarfile.FIFOTYPE),
            ("sub/c.jpg", b"content"),
        ],
        format,
    )
    read = members_of(data)
    assert [(m.name.rstrip("/"), m.regular) for m in read] == [
        ("sub", False), ("sub/a.jpg", False), ("sub/b.jpg", False), ("pipe", False),
        ("sub/c.jpg", True),
    ]  # fmt: skip
    assert [m.nbytes for m in read] == [0, 0, 0, 0, 7]


def test_a_name_split_over_the_ustar_prefix_is_whole():
    name = "/".join(["d" * 60] * 3) + "/image.jpg"
    assert [m.name for m in members_of(tar_bytes([(name, b"x")], tarfile.USTAR_FORMAT))] == [name]


def test_names_that_point_outside_are_only_labels(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [("../../x.jpg", b"1"), ("/etc/y.jpg", b"2")])
    samples = list(iter_samples(reader(shard.read_bytes()), shard.stat().st_size, "a.tar"))
    assert [key for key, _ in samples] == ["../../x", "/etc/y"]
    sample = read_sample(str(shard), samples[0][1][0].offset, 1024)
    assert (sample.key, sample.members) == ("../../x", {"jpg": b"1"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


def test_a_base_256_size_is_understood_and_one_beyond_the_file_refused():
    data = bytearray(tar_bytes([("a.jpg", b"x" * 700)]))
    resize(data, b"\x80" + (700).to_bytes(11, "big"))
    assert members_of(bytes(data))[0].nbytes == 700
    for size in (b"\x80" + (2**60).to_bytes(11, "big"), b"\xff" * 12, b"77777777777\0", b"zz"):
        resize(data, size.ljust(12, b"\0"))
        with pytest.raises(TarError, match=r"a\.tar"):
            members_of(bytes(data))


def resize(data: bytearray, field: bytes) -> None:
    data[124:136] = field
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()


def test_a_checksum_of_signed_bytes_is_accepted():
    data = bytearray(tar_bytes([("\xe9.jpg", b"x")], tarfile.GNU_FORMAT))
    signed = sum(b - 256 if b > 127 else b for b in data[:148] + b" " * 8 + data[156:512])
    data[148:156] = f"{signed:06o}\0 ".encode()
    assert members_of(bytes(data))[0].name == "\xe9.jpg"


def test_a_pax_size_overrules_the_header():
    data = bytearray(tar_bytes([("\u4e16.jpg", b"y" * 600)], tarfile.PAX_FORMAT))
    assert members_of(bytes(data))[0].name == "\u4e16.jpg"
    record = b"19 path=renamed.a\n12 size=600\n"
    record = b"18 path=renamed.a\n12 size=600\n"
    data[512 : 512 + 512] = record.ljust(512, b"\0")
    data[124:136] = f"{len(record):011o}\0".encode()
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    (member,) = members_of(bytes(data))
    assert (member.name, member.nbytes, member.offset) == ("renamed.a", 600, 0)


def test_a_shard_cut_anywhere_is_an_error_that_names_shard_and_byte():
    data = tar_bytes(labelled(3))
    end = members_of(data)[-1].end
    rng = np.random.default_rng(0)
    for cut in {0, 1, 511, 512, end - 512, end, end + 1, *rng.integers(0, end, 200).tolist()}:
        with pytest.raises(TarError, match=r"a\.tar: .* \(at byte \d+\)"):
            members_of(data[:cut])
    assert len(members_of(data[: end + 512])) == 6


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "empty file"),
        (gzip.compress(tar_bytes(labelled(1)), mtime=0), "compressed"),
        (tar_bytes(labelled(1)) + tar_bytes(labelled(1)), "after the end-of-archive"),
        (b"<html>404 not found</html>".ljust(2048), "not a tar header"),
        (tar_bytes([entry("a.jpg", b"S")]), "sparse"),
    ],
)
def test_what_is_no_plain_tar_is_refused_with_the_cause(data, what):
    with pytest.raises(TarError, match=what):
        members_of(data)


def test_an_entry_that_reaches_beyond_the_file_is_refused_where_it_begins():
    data = tar_bytes([("a.jpg", b"x"), ("b.jpg", bytes(5000))])
    with pytest.raises(TarError, match=r"cut inside an entry \(at byte 1024\)"):
        members_of(data[:4000])


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_long_name_without_its_entry_is_refused(format):
    data = tar_bytes([("n" * 150 + ".jpg", b"x")], format)
    with pytest.raises(TarError, match="an extended header without its entry"):
        members_of(data[:1024] + bytes(1024))


def test_names_that_are_not_utf8_stay_distinct_and_printable():
    data = tar_bytes([("\udcfe.jpg", b"1"), ("\udcff.jpg", b"2")], tarfile.GNU_FORMAT)
    assert [member.name for member in members_of(data)] == ["\\xfe.jpg", "\\xff.jpg"]


@pytest.mark.parametrize("kind", [b"L", b"x", b"g"])
def test_an_extended_header_of_a_gigabyte_is_refused_unread(kind):
    data = bytearray(tar_bytes([entry("long", kind)], tarfile.GNU_FORMAT))
    resize(data, f"{2**30:011o}\0".encode())
    asked: list[int] = []

    def read_at(offset: int, nbytes: int) -> bytes:
        asked.append(nbytes)
        return bytes(data[offset : offset + nbytes])

    with pytest.raises(TarError, match="extended header of 1073741824 bytes"):
        list(iter_members(read_at, 2**40, "a.tar"))
    assert max(asked) <= 512


@pytest.mark.parametrize(
    "record",
    [b"12 path=a.jpg", b"99 path=a\n", b"x path=a\n", b"8 path=a\n", b"0 path=a\n", b"7 patha\n"],
)
def test_a_malformed_pax_record_is_refused(record):
    data = bytearray(tar_bytes([("\u4e16.jpg", b"y")], tarfile.PAX_FORMAT))
    data[512:1024] = record.ljust(512, b"\0")
    with pytest.raises(TarError, match="malformed PAX"):
        members_of(bytes(data))


def test_indexing_a_large_shard_reads_little_and_keeps_nothing(tmp_path):
    path = tmp_path / "large.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(20):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.size = 2**22
            tar.addfile(info, io.BytesIO(bytes(2**22)))
    with ShardFile(str(path)) as shard:
        tracemalloc.start()
        count = sum(1 for _ in iter_members(shard.read_at, shard.nbytes, "large.tar"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert count == 20
    assert peak < 2**20


def test_samples_are_those_that_webdataset_reads(tmp_path):
    members = [
        ("a/b.left.PNG", b"1"), ("a/b.cls", b"2"), ("c.d/e.jpg", b"3"), ("noext", b"4"),
        (".hidden", b"5"), ("__meta__/x.jpg", b"6"), ("f.jpg", b"7"), ("f.json", b"{}"),
    ]  # fmt: skip
    shard = write_shard(tmp_path / "a.tar", members)
    theirs = [
        (item["__key__"], {k: v for k, v in item.items() if not k.startswith("__")})
        for item in webdataset.WebDataset(str(shard), shardshuffle=False)
    ]
    ours = []
    with ShardFile(str(shard)) as file:
        for key, group in iter_samples(file.read_at, file.nbytes, str(shard)):
            if key:
                sample = read_sample(str(shard), group[0].offset, group[-1].end - group[0].offset)
                ours.append((sample.key, sample.members))
    assert ours == theirs
    assert len(ours) == 3


def test_reading_a_sample_past_the_end_or_off_by_a_block_names_shard_and_byte(tmp_path):
    shard = write_shard(tmp_path / "a.tar", labelled(2))
    with pytest.raises(TarError, match=r"a\.tar: the shard ends inside a sample"):
        read_sample(str(shard), shard.stat().st_size - 512, 4096)
    with pytest.raises(TarError, match=r"a\.tar: this is not a tar header \(at byte 512\)"):
        read_sample(str(shard), 512, 1024)


def test_an_unreadable_shard_names_itself_and_the_byte(tmp_path):
    with pytest.raises(OSError, match=r"No such file .* at byte 512: .*gone\.tar"):
        read_sample(str(tmp_path / "gone.tar"), 512, 1024)
    with pytest.raises(OSError, match="Is a directory, reading at byte 0"):
        read_sample(str(tmp_path), 0, 1024)


def test_an_error_survives_the_way_back_from_a_worker():
    error = pickle.loads(pickle.dumps(TarError("a.tar", 512, "cut")))
    assert (error.shard, error.offset, str(error)) == ("a.tar", 512, "a.tar: cut (at byte 512)")


def test_10000_mutated_tars_end_in_entries_or_a_named_error():
    rng = np.random.default_rng(0)
    seeds = [
        tar_bytes([("k/" + "n" * 150 + "\u00e9.jpg", b"x" * 900), *labelled(2)], format)
        for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    ]
    refused = 0
    for number in range(10_000):
        data = mutated(seeds[number % 2], rng)
        try:
            for key, members in iter_samples(reader(data), len(data), "a.tar"):
                span = data[members[0].offset : members[-1].end]
                if key:
                    parse_sample(span, shard="a.tar", offset=members[0].offset)
        except TarError:
            refused += 1
    assert 0 < refused < 10_000
