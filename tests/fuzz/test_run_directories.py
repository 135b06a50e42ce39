"""What a run leaves beside its checkpoints, as audit, status and report read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.report import logged_run
from launch.report.logged_run import read_run
from launch.status import audit, snapshot
from launch.status.audit import audit_run
from launch.status.snapshot import take_snapshot
from launch.status.state import judge
from launch.status.view import status_lines
from tests.mutate import mutated_bytes, mutated_text_of_json, outcome
from tests.test_before_rooms import copy_to

COUNT = 20
LINES = [
    b"5\n", b"null\n", b"[]\n", b"{}\n", b"\xff\n", b"[" * 100_000 + b"\n", b'{"step": null}\n',
    b'{"step": ' + b"9" * 5000 + b"}\n", b'{"step": 1e999, "lanes": {}, "rejected": []}\n',
    b'{"step": 1, "lanes": {"0": [1]}, "rejected": []}\n',
    b'{"step": 1, "lanes": [], "rejected": {}}\n',
    b'{"step": 1, "lanes": {"-1": [1, "a"]}, "rejected": [null]}\n', b"\0\n",
]  # fmt: skip
"""Lines that once gave a traceback, or could."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_to(tmp_path_factory.mktemp("fuzz") / "world")


def damaged(whole: bytes, seed: int) -> list[bytes]:
    """Return forms of a file of lines: other bytes, and other values in its first line."""
    first, _, rest = whole.partition(b"\n")
    forms = [line + rest for line in LINES] + [first + b"\n" + line + rest for line in LINES]
    forms += mutated_bytes(whole, COUNT, seed)
    lines = mutated_text_of_json(json.loads(first), COUNT, seed)
    return forms + [line.replace(b"\n", b" ") + b"\n" + rest for line in lines]


def tried(world: Path, path: Path, contents: list[bytes], use: Callable[[], Any]) -> list[Any]:
    """Return what `use` gives with each content in the place of a file."""
    whole = path.read_bytes() if path.exists() else None
    found = []
    try:
        for content in contents:
            path.write_bytes(content)
            found.append(outcome(use, world))
    finally:
        path.unlink()
        if whole is not None:
            path.write_bytes(whole)
    return found


@pytest.fixture
def planned(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose audit is exact, and reads its config and shards only once for all inputs."""
    monkeypatch.chdir(world)
    run = world / "run_dirs/zero2"
    assert audit_run(run).exact
    for module, name in ((audit, "load_config"), (audit, "open_shards"), (audit, "training_plan")):
        monkeypatch.setattr(module, name, once(getattr(module, name)))
    monkeypatch.setattr(snapshot, "_images_per_epoch", lambda _: None)
    return run


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    made: list[Any] = []
    return lambda *arguments: made[0] if made else made.append(function(*arguments)) or made[0]


def test_a_damaged_ledger_is_refused_by_line_or_not_exact(world, planned):
    run, path = planned, planned / "ledger/rank_00000.jsonl"
    forms = damaged(path.read_bytes(), 0)
    for content, found in zip(
        forms, tried(world, path, forms, lambda: audit_run(run)), strict=True
    ):
        if isinstance(found, str):
            assert f"{path} line" in found, content[:200]
    assert all(
        isinstance(found, str) for found in tried(world, path, LINES, lambda: audit_run(run))
    )


def test_a_damaged_quarantine_is_refused_by_line(world, planned):
    run = planned
    line = b'{"step": 1, "sample_id": 3, "key": "a", "shard": "b", "reason": "c"}\n'
    for found in tried(world, run / "quarantine.jsonl", damaged(line, 1), lambda: audit_run(run)):
        assert not isinstance(found, str) or "quarantine.jsonl line" in found


NAMES = (
    "metrics.jsonl", "starts.jsonl", "owners/000001.json", "quarantine.jsonl",
    "heartbeat/rank_00000.json", "FINISHED", "checkpoints/latest",
    "logs/rank_00000.log", "config.yaml",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_status_and_report_read_what_can_be_read(world, planned, monkeypatch, name):
    run, path = planned, planned / name
    if name != "config.yaml":  # parsing it takes most of the time
        monkeypatch.setattr(snapshot, "_config", once(snapshot._config))
        monkeypatch.setattr(logged_run, "_parse_config", once(logged_run._parse_config))
    path.parent.mkdir(exist_ok=True)
    whole = path.read_bytes() if path.exists() else b'{"step": 1, "time": 2.5, "phase": "data"}\n'
    forms = mutated_bytes(whole, COUNT, 2) if name == "config.yaml" else damaged_lines(whole)
    tried(
        world, path, list(forms), lambda: (status_lines(judge(take_snapshot(run))), read_run(run))
    )


def damaged_lines(whole: bytes) -> list[bytes]:
    try:
        return damaged(whole, 3)[::3]
    except ValueError:  # no JSON
        return [*LINES, *mutated_bytes(whole, COUNT, 3)]
