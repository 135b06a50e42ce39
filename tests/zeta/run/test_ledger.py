"""Quarantine budgets end a run for the right reasons; the ledger holds no line of a lost rank."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.zeta.training import lane_pack
from zeta.distributed import RankInfo, World
from zeta.exit_codes import RunError
from zeta.packed import Rejected, StepPacks
from zeta.run.directory import RunDir
from zeta.run.ledger import (
    Ledger,
    Quarantine,
    QuarantineConfig,
    QuarantineNews,
    Streaks,
    check_budgets,
)

LIMITS = QuarantineConfig(max_share=0.1, probation_images=1000, max_in_a_row=5)
NEWS = QuarantineNews(1, "key in a.tar: truncated")


def test_the_share_of_bad_images_is_judged_after_the_probation():
    check_budgets(LIMITS, NEWS, images=799, rejected=200)
    check_budgets(LIMITS, NEWS, images=900, rejected=100)
    with pytest.raises(RunError, match=r"101 of 1,000 images \(10.1%\).*key in a.tar: truncated"):
        check_budgets(LIMITS, NEWS, images=899, rejected=101)


def test_bad_images_in_a_row_end_the_run_at_once():
    check_budgets(LIMITS, replace_in_a_row(4), images=0, rejected=4)
    with pytest.raises(RunError, match="5 images in a row"):
        check_budgets(LIMITS, replace_in_a_row(5), images=10**9, rejected=5)


def replace_in_a_row(count: int) -> QuarantineNews:
    return NEWS._replace(in_a_row=count)


def pack(weights: list[int]):
    made = lane_pack(0, 0, images=0)
    used = torch.zeros(4)
    used[: len(weights)] = torch.tensor(weights, dtype=torch.float32)
    ids = torch.full((4,), -1)
    ids[: len(weights)] = torch.arange(len(weights))
    return replace(made, weights=used, sample_ids=ids)


def test_runs_of_bad_images_continue_from_step_to_step_within_a_lane():
    streaks = Streaks()
    for weights, longest in [
        (([1, 0, 0], [0]), 2),
        (([0, 1, 0], []), 3),
        (([1, 1], [0, 0, 0]), 4),
    ]:
        packs = tuple(pack(each) for each in weights)
        step = StepPacks(0, packs, (3, 8), num_images=0, num_tokens=0, epoch=0, more=True)
        assert streaks.update(step) == longest


def test_the_lines_of_a_rank_that_is_no_more_are_cut_to_the_checkpoint(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    run_dir.ledger.mkdir()
    for rank in range(3):
        lines = [json.dumps({"step": step}) + "\n" for step in range(1, 8)]
        (run_dir.ledger / f"rank_{rank:05d}.jsonl").write_text("".join(lines))
    for rank in range(2):
        Ledger(run_dir, rank, resume_step=4, world_size=2).close()
    for rank in range(3):
        kept = (run_dir.ledger / f"rank_{rank:05d}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in kept] == [1, 2, 3, 4]
        assert (run_dir.ledger / f"rank_{rank:05d}.jsonl.attempt-1").exists()


@pytest.fixture
def file_limit():
    """Bound the size of every file that is written from now on, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(
        resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1])
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def quarantined(path: Path) -> list[int]:
    return [json.loads(line)["sample_id"] for line in path.read_text().splitlines()]


def test_a_full_disk_delays_the_quarantine_vetoes_the_checkpoint_and_loses_no_line(
    tmp_path: Path, file_limit
):
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, World(RankInfo(), torch.device("cpu")))
    quarantine.add(1, [rejected(3)], 1)
    file_limit(path.stat().st_size + 10)  # room for a part of the next line
    assert quarantine.add(2, [rejected(4)], 1).in_a_row == 1
    with pytest.raises(OSError, match="too large"):
        quarantine.flush()
    file_limit(None)
    quarantine.flush()
    assert quarantined(path) == [3, 4]


def test_a_line_that_a_kill_cut_off_does_not_spoil_the_next_one(tmp_path: Path):
    path = tmp_path / "quarantine.jsonl"
    world = World(RankInfo(), torch.device("cpu"))
    Quarantine(path, world).add(1, [rejected(3)], 1)
    path.write_text(path.read_text() + '{"step": 2, "samp')
    Quarantine(path, world).add(2, [rejected(4)], 1)
    assert Quarantine(path, world).count == 2


def rejected(sample_id: int) -> Rejected:
    return Rejected(sample_id=sample_id, key=f"k{sample_id}", shard="a.tar", reason="truncated")


def test_damaged_lines_of_the_quarantine_are_passed_over_and_kept(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    lines = [
        '{"sample_id": 3}',
        "[}",
        '{"sample_id": "x"}',
        "7}",
        '{"other": 1}',
        "[" * 10**5 + "}",
    ]
    path.write_text("\n".join(lines) + "\n")
    assert Quarantine(path, World(RankInfo(), torch.device("cpu"))).count == 1
    assert path.read_text().splitlines() == lines
