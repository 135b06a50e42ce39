"""Exports: config.json, weights, and the index of weights in several files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.mutate import mutated_bytes, mutated_text_of_json, outcome
from tests.zeta.small_models import small
from zeta.export.saving import save_pretrained
from zeta.models.config import load_pretrained
from zeta.models.exported import open_export, read_config

COUNT = 120


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, arguments = small()
    box = tmp_path_factory.mktemp("fuzz") / "export"
    return save_pretrained(box, model.state_dict(), arguments, {}, max_file_bytes=20_000)


def weights(export: Path) -> dict[str, torch.Tensor]:
    return load_pretrained(export).state_dict()


def tried(export: Path, path: Path, contents: list[bytes]) -> None:
    """Hold that every content in the place of a file gives the same weights or one line."""
    whole, right = path.read_bytes(), weights(export)
    try:
        for content in contents:
            path.write_bytes(content)
            found = outcome(lambda: weights(export), export)
            if isinstance(found, str):
                assert str(export) in found, content[:300]
                continue
            for name, tensor in found.items():
                assert torch.equal(tensor, right[name]), (name, content[:300])
    finally:
        path.write_bytes(whole)


CONFIGS = [
    b"", b"5", b"null", b"[]", b"[" * 100_000, b"\xff", b'{"format": ' + b"9" * 400 + b"}",
    b'{"format": 1, "model": {"depth": 1000000000}}',
]  # fmt: skip


def test_a_changed_config_gives_the_same_weights_or_is_refused(export):
    path = export / "config.json"
    content = json.loads(path.read_text())
    tried(export, path, [*CONFIGS, *mutated_text_of_json(content, COUNT, 0)])


def test_a_changed_index_of_weights_is_refused(export):
    path = export / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    tried(export, path, list(mutated_text_of_json(content, COUNT, 1)))


def test_changed_weights_are_refused_before_anything_is_built(export):
    path = sorted(export.glob("model-*.safetensors"))[0]
    whole = path.read_bytes()
    damaged = [
        b"", b"\xff" * 8, (2**63).to_bytes(8, "little") + whole[8:], bytes(8) + whole[8:],
        (2**20).to_bytes(8, "little") + b"[" * 2**20, *mutated_bytes(whole, COUNT, 2),
        *(whole[:8] + header + whole[400:] for header in mutated_bytes(whole[8:400], COUNT, 3)),
    ]  # fmt: skip
    try:
        for content in damaged:
            path.write_bytes(content)
            if content != whole:
                assert path.name in outcome(lambda: weights(export), export)
    finally:
        path.write_bytes(whole)


def test_weights_without_a_digest_are_read_within_their_bounds_or_refused(export):
    """Exports of earlier versions have none."""
    path, config = sorted(export.glob("model-*.safetensors"))[0], export / "config.json"
    whole, before = path.read_bytes(), config.read_text()
    content = json.loads(before)
    del content["sha256"]
    config.write_text(json.dumps(content))

    def read() -> int:
        read_config(export)
        return sum(tensor.load().numel() for tensor in open_export(export).values())

    try:
        right = read()
        for header in mutated_bytes(whole[8:600], COUNT, 4):
            path.write_bytes(whole[:8] + header + whole[600:])
            found = outcome(read, export)
            assert str(export) in found if isinstance(found, str) else found <= 4 * right
    finally:
        path.write_bytes(whole)
        config.write_text(before)
