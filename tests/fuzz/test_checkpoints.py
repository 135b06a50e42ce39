"""Checkpoints: their list of files, trainer.json, DeepSpeed's files, random states, `latest`."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mutate import mutated_bytes, mutated_text_of_json, outcome
from tests.test_before_rooms import FIXTURE
from zeta.checkpoint.directory import (
    find_fault,
    load_full_weights,
    newest_whole,
    open_zero_state,
    read_trainer_state,
)
from zeta.random_state import restore_random_state

COUNT = 60
RUNS = ("zero2", "zero0", "sgd")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    box = tmp_path_factory.mktemp("fuzz") / "runs"
    for name in RUNS:
        shutil.copytree(FIXTURE / "run_dirs" / name, box / name)
    return box


def checkpoint(run: Path) -> Path:
    (found,) = (run / "checkpoints").glob("step_*")
    return found


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Put other content in the place of a file, with its size and hash in the list: a forgery."""
    (folder / name).write_bytes(content)
    listed = json.loads((folder / "manifest.json").read_text())
    listed["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (folder / "manifest.json").write_text(json.dumps(listed))


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Read what a run that resumes reads: weights, buffers, every state of the optimizer."""
    found = load_full_weights(folder)
    state = open_zero_state(folder, read_trainer_state(folder))
    for key in state.moments:
        found |= {f"{key} {name}": state.full(name, key) for name in state.shapes}
    return found


def tried(
    folder: Path, name: str, contents: list[bytes], use: Callable[[], Any], *, forged: bool
) -> list[Any]:
    """Return what `use` gives with each content in the place of a file of a checkpoint."""
    whole, listed = (folder / name).read_bytes(), (folder / "manifest.json").read_bytes()
    found = []
    try:
        for content in contents:
            if forged:
                rewrite(folder, name, content)
            else:
                (folder / name).write_bytes(content)
            found.append(outcome(use, folder.parents[2]))
    finally:
        (folder / name).write_bytes(whole)
        (folder / "manifest.json").write_bytes(listed)
    return found


@pytest.mark.parametrize("run", RUNS)
def test_any_damage_without_a_rewritten_hash_is_found(runs, run):
    folder = checkpoint(runs / run)
    assert find_fault(folder) is None
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for seed, name in enumerate(names):
        whole = (folder / name).read_bytes()
        damaged = [c for c in mutated_bytes(whole, 6, seed) if c != whole]
        for found in tried(folder, name, damaged, lambda: load_full_weights(folder), forged=False):
            assert "is not a whole checkpoint" in found, name


LISTS = [
    b"", b"5", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"files": {}}',
    b'{"files": {"/dev/zero": [0, ""]}}', b'{"files": {"trainer.json": [null, 1]}}',
    b'{"files": {"zero/\\ud800": [1, "a"]}}',
]  # fmt: skip


def test_a_changed_list_of_files_is_a_fault(runs):
    folder = checkpoint(runs / "zero2")
    whole = json.loads((folder / "manifest.json").read_text())
    damaged = [*LISTS, *mutated_text_of_json(whole, COUNT, 1)]
    for content, found in zip(
        damaged,
        tried(folder, "manifest.json", damaged, lambda: find_fault(folder) or "", forged=False),
        strict=True,
    ):
        if not found:  # a file less, which the list need not hold, or one that is none
            files = json.loads(content)["files"]
            assert all(whole["files"].get(name) == record for name, record in files.items())


STATES = [b"", b"7", b"null", b"[]", b"[" * 100_000, b'{"a": ' + b"9" * 400 + b"}", b"\xff"]


@pytest.mark.parametrize("run", RUNS)
def test_a_rewritten_trainer_state_is_read_or_refused_in_one_line(runs, run):
    """Whether its shapes are those of the model, the model is asked; see `check_same_model`."""
    folder = checkpoint(runs / run)
    whole = json.loads((folder / "trainer.json").read_text())
    name = next(iter(whole["parameters"]))
    empty = {**whole, "parameters": {**whole["parameters"], name: [0, 16]}}
    damaged = [*STATES, json.dumps(empty).encode(), *mutated_text_of_json(whole, COUNT, 2)]
    results = tried(folder, "trainer.json", damaged, lambda: read_all(folder), forged=True)
    for content, found in zip(damaged, results, strict=True):
        if isinstance(found, str):
            assert str(folder) in found or "checkpoint" in found, content
    assert all(isinstance(found, str) for found in results[: len(STATES)])


class Hostile:
    """An object that runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def hostile_files(marker: Path) -> list[bytes]:
    """Return files in the old and the new format of torch, and a plain pickle, that run code."""
    command, made = f"touch {marker}", []
    for new in (True, False):
        path = marker.with_suffix(".pt")
        torch.save({"module": Hostile(command)}, path, _use_new_zipfile_serialization=new)
        made.append(path.read_bytes())
        path.unlink()
    return [*made, pickle.dumps(Hostile(command))]


def unchecked(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return a file of an archive whose checksums were left out, as those of a run are."""
    with archive.open(name) as part:
        part._expected_crc = None
        return part.read()


def repacked(whole: bytes, seed: int, count: int, scratch: Path) -> list[bytes]:
    """Return files of torch whose pickle inside was mutated, in an archive that is whole."""
    scratch.write_bytes(whole)
    with zipfile.ZipFile(scratch) as archive:
        parts = {name: unchecked(archive, name) for name in archive.namelist()}
    (pickled,) = (name for name in parts if name.endswith("data.pkl"))
    made = []
    for content in mutated_bytes(parts[pickled], count, seed):
        with zipfile.ZipFile(scratch, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, content if name == pickled else part)
        made.append(scratch.read_bytes())
    scratch.unlink()
    return made


@pytest.mark.filterwarnings("ignore")  # torch comments on strange pickles
@pytest.mark.parametrize("run", RUNS)
def test_a_rewritten_file_with_a_rewritten_hash_executes_nothing_and_is_refused(
    runs, run, tmp_path
):
    folder, marker = checkpoint(runs / run), runs / "executed"
    rng = random.Random(3)
    names = sorted(str(path.relative_to(folder)) for path in folder.glob("zero/*.pt"))
    records = [
        {},
        [],
        5,
        {"module": 1},
        {"module": {}, "buffer_names": ["x"]},
        {"optimizer_state_dict": {}},
    ]
    scratch = tmp_path / "scratch.pt"
    for name in names:
        whole = (folder / name).read_bytes()
        made = [b"", *hostile_files(marker)]
        for record in records:
            torch.save(record, scratch)
            made.append(scratch.read_bytes())
        for found in tried(folder, name, made, lambda: read_all(folder), forged=True):
            assert isinstance(found, str)
            assert str(folder) in found
        damaged = [
            *mutated_bytes(whole, 12, rng.randrange(99)),
            *repacked(whole, rng.randrange(99), 25, scratch),
        ]
        tried(folder, name, damaged, lambda: read_all(folder), forged=True)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore")
def test_a_rewritten_random_state_executes_nothing_and_is_refused(runs, tmp_path):
    folder, marker = checkpoint(runs / "zero2"), runs / "executed"
    name, scratch = "ranks/rank_00000.pt", tmp_path / "scratch.pt"
    whole = (folder / name).read_bytes()
    damaged = [
        b"",
        *hostile_files(marker),
        *mutated_bytes(whole, 30, 5),
        *repacked(whole, 6, 60, scratch),
    ]
    state, torch_state = random.getstate(), torch.get_rng_state()
    try:
        found = tried(
            folder, name, damaged, lambda: restore_random_state(folder / name), forged=True
        )
    finally:
        random.setstate(state)
        torch.set_rng_state(torch_state)
    assert all(isinstance(said, str) for said in found[:4])
    assert not marker.exists()


@pytest.mark.parametrize(
    "content", [b"", b"../../x", b"/etc", b"\xff\xfe", b"step_99999999", b"\0"]
)
def test_a_damaged_name_of_the_latest_checkpoint_is_not_followed(runs, content):
    latest = runs / "zero2/checkpoints/latest"
    whole = latest.read_bytes()
    latest.write_bytes(content)
    try:
        assert outcome(lambda: newest_whole(latest.parent), runs) == checkpoint(runs / "zero2")
    finally:
        latest.write_bytes(whole)
