"""The bytes of a sample of a shard are compared where they are copied, and nowhere else."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from data_pipeline.shards.checksum import DamagedSample
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.sources.content import read_members
from data_pipeline.shards.sources.read import open_source
from tests.data_pipeline.shard_fixtures import labelled, write_shard


def rot(shard, offset):
    content, stamp = bytearray(shard.read_bytes()), shard.stat().st_mtime_ns
    content[offset] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(stamp, stamp))


@pytest.fixture
def shard(tmp_path):
    path = write_shard(tmp_path / "in/a.tar", labelled(3))
    index_shards(tmp_path / "in")
    return path


def test_the_bytes_that_are_copied_are_those_that_are_compared(shard):
    samples = open_source(shard).samples
    contents = [read_members(sample) for sample in samples]
    assert [name for content in contents for name in sorted(content)] == ["cls", "jpg"] * 3
    flat = dict(labelled(3))
    assert [content["jpg"] for content in contents] == [flat[f"000{n}.jpg"] for n in range(3)]
    rot(shard, samples[1].members["jpg"].offset + 9)  # after the source was opened
    assert [read_members(sample) for sample in samples[::2]] == contents[::2]
    with pytest.raises(DamagedSample, match=r"0001 in .*a\.tar: damaged in storage"):
        read_members(samples[1])
    assert read_members(replace(samples[1], indexed=())).keys() == {"cls", "jpg"}


def test_a_source_of_shards_is_opened_without_reading_its_images(tmp_path, monkeypatch):
    members = [(name, content + bytes(50_000)) for name, content in labelled(3) if "jpg" in name]
    shard = write_shard(tmp_path / "in/a.tar", members)
    index_shards(tmp_path / "in")
    read = list[int]()
    pread = os.pread

    def counted(*arguments):
        data = pread(*arguments)
        read.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counted)
    samples = open_source(shard).samples
    assert all(sample.indexed for sample in samples)
    assert 0 < sum(read) < 50_000


def test_members_that_lie_apart_are_each_compared(tmp_path):
    members = labelled(2)
    shard = write_shard(tmp_path / "in/a.tar", members[1::2] + members[::2])  # images, then labels
    index_shards(tmp_path / "in")
    samples = open_source(shard).samples
    assert [sorted(read_members(sample)) for sample in samples] == [["cls", "jpg"]] * 2
    rot(shard, samples[0].members["jpg"].offset)
    with pytest.raises(DamagedSample, match="0000 in "):
        read_members(samples[0])
