"""The index beside shards: manifest.json, its arrays, the rejected list, the class map, parts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from data_pipeline.verify import verify_shards
from tests.data_pipeline.shard_fixtures import labelled, write_shard
from tests.mutate import mutated_bytes, mutated_text_of_json, outcome

COUNT = 250


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    box = tmp_path_factory.mktemp("fuzz") / "shards"
    box.mkdir()
    (box / "classes.json").write_text('["a", "b", "c"]')
    write_shard(box / "0.tar", [*labelled(3), ("bad.jpg", b"")])
    write_shard(box / "1.tar", labelled(2, 7))
    index_shards(box)
    return box


def facts(manifest: Manifest) -> list[object]:
    """Return what a run takes from an index."""
    return [
        manifest.fingerprint, manifest.content_digest, manifest.class_names, manifest.highest_label,
        manifest.label_lists, manifest.most_labels, np.asarray(manifest.samples[:]).tobytes(),
        np.asarray(manifest.known_checksums[:]).tobytes(), list(manifest.rejections()),
    ]  # fmt: skip


def tried(folder: Path, path: Path, contents: list[bytes]) -> list[list[object] | str]:
    """Return what opening the folder gives with each content in the place of a file."""
    whole = path.read_bytes()
    found = []
    try:
        for content in contents:
            path.write_bytes(content)
            found.append(outcome(lambda: facts(Manifest.open(folder)), folder))
    finally:
        path.write_bytes(whole)
    return found


def npy(array: np.ndarray, **options: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


ARRAYS = [
    b"",
    b"PK\x03\x04" + bytes(40),
    b"\x93NUMPY\x01\x00\xff\xff{",
    b"\x93NUMPY\x01\x00v\x00{'descr': '<u8', 'fortran_order': False, 'shape': (10000000000000,)}\n",
    npy(np.zeros(6)),
    npy(np.zeros((6, 1), "<u4")),
    npy(np.array([None, 1]), allow_pickle=True),
    npy(np.array(3, "<u4")),
    npy(np.zeros(0, "<u4")),
]
"""Arrays of other kinds that once gave a traceback, or could."""


@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # of a header that looks like Python 2's
def test_a_changed_array_is_refused_whatever_was_changed(folder):
    right = facts(Manifest.open(folder))
    arrays = sorted(folder.glob("*.npy"))
    assert len(arrays) == 2
    for seed, path in enumerate(arrays):
        damaged = list(mutated_bytes(path.read_bytes(), COUNT, seed))
        for content, found in zip(damaged, tried(folder, path, damaged), strict=True):
            assert found == right or "manifest.json is damaged" in found, content[:200]
        for found in tried(folder, path, ARRAYS):
            assert "manifest.json is damaged" in found


LISTS = [
    b"", b"5", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"version": 1, "shards": 3}',
    b'{"version": 1, "shards": [[]], "samples": "manifest-0123456789abcdef.npy"}',
    b'{"version": 1, "shards": [], "samples": "../manifest-0123456789abcdef.npy"}',
    b'{"version": 1, "shards": [], "samples": "/dev/zero"}', b'{"version": ' + b"9" * 5000 + b"}",
]  # fmt: skip


def test_a_changed_list_is_refused(folder):
    path = folder / "manifest.json"
    right = facts(Manifest.open(folder))
    damaged = [*LISTS, *mutated_text_of_json(json.loads(path.read_text()), 2 * COUNT, 2)]
    for content, found in zip(damaged, tried(folder, path, damaged), strict=True):
        assert found == right or str(folder) in found, content


REJECTED = [
    b"5\n", b"null", b"{}", b"[]\n", b"\xff", b"[" * 100_000, b'{"shard": 1}',
    b'{"shard": "0.tar", "row": []}', b'{"shard": "0.tar", "row": 1e99, "key": "a", "reason": "b"}',
    b"9" * 5000,
]  # fmt: skip


def test_a_changed_list_of_rejected_samples_is_refused_by_line_or_read(folder):
    path = folder / "manifest_rejected.jsonl"
    (line,) = path.read_text().splitlines()
    damaged = [*REJECTED, *mutated_text_of_json(json.loads(line), COUNT, 3)]
    for content, found in zip(damaged, tried(folder, path, damaged), strict=True):
        if isinstance(found, str):
            assert "manifest_rejected.jsonl line" in found, content


def test_a_changed_class_map_never_renames_a_class(folder):
    path = folder / "classes.json"
    right = facts(Manifest.open(folder))
    damaged = [
        b"[" * 100_000, b'["a", "b"]', b'["a", "a", "c"]', b'{"a": 1}', b"\xff", b"9" * 5000,
        *mutated_text_of_json(json.loads(path.read_text()), COUNT, 4),
    ]  # fmt: skip
    for content, found in zip(damaged, tried(folder, path, damaged), strict=True):
        assert found == right or "classes.json" in found, content


def test_a_damaged_index_never_stops_verify(folder):
    path = folder / "manifest.json"
    whole = path.read_bytes()
    try:
        for content in LISTS:
            path.write_bytes(content)
            result = outcome(lambda: verify_shards(folder), folder)
            assert result.samples == 6
            assert "empty file" in {bad.reason for bad in result.bad}
    finally:
        path.write_bytes(whole)
