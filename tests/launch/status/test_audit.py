"""`zeta data audit` on real runs: killed, continued on other world sizes, with bad images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import launch.status.audit
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.manifest import Manifest
from launch.recipes.digits import CLASS_NAMES, render_split
from tests.launch.command_line import zeta

SETTINGS = (
    "data.shards=shards",
    "run.dir=run",
    "train.packs_per_step=4",
    "train.max_epochs=30",
    "train.max_steps=null",
    "optim.schedule=constant",
    "optim.warmup_steps=0",
    "train.checkpoint_every=4",
    "train.log_every=1",
    "tracker.wandb.mode=disabled",
    "data.workers=0",
)
BAD = (20, 90, 91)


def audit(folder: Path) -> dict:
    done = zeta("data", "audit", "run", "--json", cwd=folder)
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert done.returncode == (0 if result["exact"] else 1)
    return result


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 150 digits, three of which were damaged after they were indexed."""
    folder = tmp_path_factory.mktemp("audited")
    samples = render_split("train", seed=0)
    some = [next(samples) for _ in range(150)]
    build_shards(some, folder / "shards", max_count=60, class_names=CLASS_NAMES)
    manifest = Manifest.open(folder / "shards")
    for sample_id in BAD:
        shard = Path(manifest.shards[int(manifest.shard_of(sample_id))].path)
        row, status = manifest.samples[sample_id], shard.stat()
        with shard.open("r+b") as stream:
            stream.seek(int(row["offset"]) + 512 + 60)
            stream.write(b"\x00" * (int(row["nbytes"]) // 3))
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    return folder


def wait_until_quiet(folder: Path) -> None:
    """Wait until nothing was written under `folder` for a second."""
    seen = None
    while seen != (now := [(p, p.stat().st_mtime_ns) for p in sorted(folder.glob("*/*"))]):
        seen = now
        time.sleep(1)


@pytest.mark.slow
def test_the_account_is_exact_across_a_kill_and_changed_world_sizes(world: Path):
    command = [sys.executable, "-m", "launch", "launch", "local", "demo", "--nproc", "3", *SETTINGS]
    first = subprocess.Popen(
        command, cwd=world, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True
    )
    deadline = time.monotonic() + 200
    while not list(world.glob("run/checkpoints/step_*")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.kill()  # its guardian then ends the ranks
    first.wait()
    wait_until_quiet(world / "run")
    killed = audit(world)
    assert killed["exact"], killed
    assert killed["steps"] >= 4
    assert killed["epochs"][-1]["open"] > 0
    again = zeta("train", "demo", *SETTINGS, cwd=world)
    assert again.returncode == 0, again.stderr
    assert " could not be used so far: see run/quarantine.jsonl" in again.stdout
    done = audit(world)
    assert done["exact"], done
    assert [epoch["epoch"] for epoch in done["epochs"]] == list(range(30))
    for epoch in done["epochs"]:
        assert (epoch["planned"], epoch["trained"]) == (150, 147)
        assert sum(epoch["rejected"].values()) == 3
        assert (epoch["open"], epoch["remainder"]) == (0, 0)


@pytest.mark.slow
def test_views_train_alike_on_any_ranks_and_are_counted_as_views(world: Path):
    """Two ranks with joined packs against one rank with a pack a pass: same images, same losses."""
    settings = [setting for setting in SETTINGS if not setting.startswith(("run.dir", "train.max"))]
    settings += ["train.max_epochs=3", "train.max_steps=null", "train.dtype=fp32", "data.views=3"]
    settings += ["data.token_budget=768"]
    losses = []
    for ranks, joined in ((2, 2 * 768), (1, 768)):
        run = f"views{ranks}"
        done = zeta(
            *("launch", "local", "demo", "--nproc", str(ranks), *settings),
            *(f"run.dir={run}", f"train.tokens_per_forward={joined}"),
            cwd=world,
        )
        assert done.returncode == 0, done.stderr
        audited = json.loads(zeta("data", "audit", run, "--json", cwd=world).stdout)
        assert audited["exact"], audited
        for epoch in audited["epochs"]:
            assert (epoch["planned"], epoch["trained"], epoch["views"]) == (150, 147, 441)
        ledger = [
            json.loads(line)
            for path in (world / run / "ledger").glob("rank_*.jsonl")
            for line in path.read_text().splitlines()
        ]
        assert sum(line["samples"] for line in ledger) == 3 * 147
        assert sum(line["images"] for line in ledger) == 3 * 441
        metrics = [json.loads(line) for line in (world / run / "metrics.jsonl").open()]
        steps = [line for line in metrics if "train/loss" in line]
        assert steps[-1]["data/images_seen"] == 3 * 441
        losses.append([line["train/loss"] for line in steps])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_a_changed_ledger_is_found(world: Path):
    path = world / "run/ledger/rank_00000.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:5], *lines[6:]]))
    told = zeta("data", "audit", "run", cwd=world)
    path.write_text("".join(lines))
    assert told.returncode == 1
    assert "PROBLEM: step 6" in told.stdout
    assert "NOT exact" in told.stdout


@pytest.mark.slow
def test_bad_images_in_a_row_end_the_run_with_93(world: Path):
    refused = zeta(
        "train", "demo", *SETTINGS, "run.dir=other", "train.quarantine.max_in_a_row=1", cwd=world
    )
    assert refused.returncode == 93
    assert "1 images in a row could not be used (train.quarantine.max_in_a_row)" in refused.stderr
    assert "Traceback" not in refused.stderr


CORPUS = [
    b'{"step": null, "lanes": {}, "rejected": []}',
    b'{"step": true, "lanes": {}, "rejected": []}',
    b'{"lanes": {}, "rejected": []}',
    b'{"step": 1, "lanes": [], "rejected": []}',
    b'{"step": 1, "lanes": {"x": [1, "a"]}, "rejected": []}',
    b'{"step": 1, "lanes": {"0": [null, "a"]}, "rejected": []}',
    b'{"step": 1, "lanes": {"0": 7}, "rejected": []}',
    b'{"step": 1, "lanes": {}, "rejected": ["x"]}',
    b'{"step": 1, "lanes": {}, "rejected": [], "max_epochs": "two"}',
    b"[" * 100_000,
    b"7",
    b"\xff\xfe",
    b'{"step": ' + b"9" * 400 + b"}",
]


@pytest.mark.parametrize("line", CORPUS, ids=range(len(CORPUS)))
def test_a_damaged_line_of_the_ledger_is_named_by_file_and_number(tmp_path, line):
    path = tmp_path / "rank_00000.jsonl"
    path.write_bytes(b'{"step": 1, "lanes": {"0": [4, "ab"]}, "rejected": [3]}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"rank_00000\.jsonl line 2 is damaged") as refused:
        list(launch.status.audit._lines(path, launch.status.audit._is_of_ledger))
    assert "\n" not in str(refused.value)
