"""A run none of whose images can be decoded ends with 93, and leaves nothing that looks trained."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.launch.command_line import zeta
from zeta.exit_codes import ExitCode
from zeta.run.directory import RunDir

TINY = ["model.dim=32", "model.depth=1", "model.heads=2", "model.mlp_dim=32", "data.workers=0"]
TINY += ["train.packs_per_step=2", "optim.warmup_steps=1", "tracker.wandb.mode=disabled"]
TINY += ["train.log_every=1"]


def cut_photos(folder):
    """JPEGs whose headers are whole, and whose pixels are not."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for number in range(20):
            path = folder / label / f"{number}.jpg"
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(path)
            content = path.read_bytes()
            path.write_bytes(content[: len(content) * 2 // 3])


@pytest.mark.slow
@pytest.mark.parametrize("saves", ["train.checkpoint_every=1", "train.checkpoint_every=100"])
def test_a_run_without_one_decoded_image_is_neither_saved_nor_finished(tmp_path, saves):
    cut_photos(tmp_path / "photos")
    assert zeta("shards", "build", "photos", "shards", cwd=tmp_path).returncode == 0
    end = ["train.max_steps=3", saves]
    done = zeta("train", "demo", "data.shards=shards", "run.dir=r", *TINY, *end, cwd=tmp_path)
    assert done.returncode == ExitCode.NEVER_RESTART, done.stderr
    assert "no image was trained on" in done.stderr
    run = RunDir(tmp_path / "r")
    assert not run.finished.exists()
    assert list(run.checkpoints.iterdir()) == []
    logged = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert all(row.get("data/tokens_seen", 0) == 0 == row.get("data/fill", 0) for row in logged)
