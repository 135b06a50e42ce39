"""A run whose shards are in an object store: it trains, stops for want of a token, and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.shards.build import build_shards
from launch.recipes.digits import render_split
from tests.data_pipeline.object_stores import s3_store
from tests.launch.command_line import zeta
from zeta.exit_codes import ExitCode

SETTINGS = (
    "train.checkpoint_every=3",
    "train.log_every=1",
    "train.packs_per_step=2",
    "optim.warmup_steps=2",
    "optim.schedule=constant",  # or it would depend on the number of steps
    "data.workers=1",
    "data.val_shards=null",
    "tracker.wandb.mode=disabled",
)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.slow
def test_a_run_on_s3_resumes_after_its_token_expired_with_the_losses_of_local_shards(
    tmp_path, monkeypatch
):
    for package in ("s3fs", "moto"):
        pytest.importorskip(package)
    monkeypatch.setenv("ZETA_INDEX_DIR", str(tmp_path / "index"))
    build_shards(list(render_split("val", seed=0))[:120], tmp_path / "shards", max_count=40)

    def train(spec: str, run: str, steps: int) -> tuple[int, str]:
        words = [f"data.shards={spec}", f"run.dir={run}", f"train.max_steps={steps}"]
        words += [f"data.cache_dir={tmp_path / 'cache'}", "model.num_classes=10", *SETTINGS]
        done = zeta("train", "demo", *words, cwd=tmp_path)
        return done.returncode, done.stderr

    assert train("shards", "near", 6)[0] == 0
    with s3_store(monkeypatch) as store:
        for path in (tmp_path / "shards").glob("*.tar"):
            store.files().pipe_file(store.url(path.name), path.read_bytes())
        assert zeta("shards", "index", store.url(), cwd=tmp_path).returncode == 0
        store.faults.extend([500, "reset", "SlowDown"])
        status, said = train(store.url(), "far", 3)
        assert status == 0, said
        assert not store.faults
        store.always = "ExpiredToken"
        status, said = train(store.url("shard-{000000..000002}.tar"), "far", 6)
        assert status == ExitCode.NEVER_RESTART
        errors = [line for line in said.splitlines() if "zeta: error" in line]
        assert len(errors) == 1, said
        assert "access denied (ExpiredToken: as told)" in errors[0]
        assert "the credentials have expired: renew them" in errors[0]
        store.always = None
        status, said = train(store.url(), "far", 6)
        assert status == 0, said
    assert losses(tmp_path / "far") == losses(tmp_path / "near")
