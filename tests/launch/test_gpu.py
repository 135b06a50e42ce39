"""A run as a whole on CUDA devices: `make test-gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.shards.index import index_shards
from tests.data_pipeline.shard_fixtures import labelled, write_shard
from zeta.checkpoint.directory import load_full_weights
from zeta.run.directory import RunDir, step_names

SETTINGS = (
    "model.num_classes=3",
    "model.dim=512",  # the weights of its layers are above what ZeRO-3 leaves whole
    "model.heads=8",
    "model.depth=2",
    "model.mlp_dim=1024",
    "data.token_budget=256",
    "optim.warmup_steps=0",
    "train.compile=false",
    "train.log_every=1",
    "tracker.wandb.mode=disabled",
)


def losses(shards: Path, out: Path, ranks: int, steps: int, *settings: str) -> list[float]:
    """Train under `zeta launch local` and return the loss of every step so far."""
    command = [sys.executable, "-m", "launch", "launch", "local", "demo", "--nproc", str(ranks)]
    own = (f"data.shards={shards}", f"run.dir={out}", f"train.max_steps={steps}")
    done = subprocess.run(
        [*command, *SETTINGS, *own, *settings], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = map(json.loads, RunDir(out).metrics.read_text().splitlines())
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.gpu
@pytest.mark.slow
def test_zero_3_in_bf16_over_nccl_on_all_devices_follows_the_cpu_in_fp32_and_resumes(tmp_path):
    """One rank a visible device; each trains two packs a step.

    Written on a machine without a GPU. There, both runs of it were tried on CPU ranks alone.
    """
    shards = tmp_path / "shards"
    write_shard(shards / "0.tar", labelled(60))
    index_shards(shards)
    ranks = max(torch.cuda.device_count(), 1)
    packs = f"train.packs_per_step={2 * ranks}"
    cuda = ("train.device=cuda", "train.dtype=bf16", "train.zero_stage=3")
    out = tmp_path / "cuda"
    losses(shards, out, ranks, 2, packs, *cuda)
    assert RunDir(out).finished.exists()
    got = losses(shards, out, ranks, 3, packs, *cuda)
    expected = losses(shards, tmp_path / "cpu", 1, 2, packs)
    assert len(got) == 3
    # Steps one and two are on the same images; the second shows that the update was the same.
    assert got[:2] == pytest.approx(expected, rel=5e-2)
    checkpoints = RunDir(out).checkpoints
    weights = load_full_weights(checkpoints / step_names(checkpoints)[-1])
    assert all(torch.isfinite(weight).all() for weight in weights.values())


CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ONE_RANK = ("train.packs_per_step=2", "train.dtype=bf16")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu") / "shards"
    write_shard(folder / "0.tar", labelled(60))
    index_shards(folder)
    return folder


@pytest.fixture(scope="module")
def in_fp32(photos, tmp_path_factory):
    """Losses of two steps on the CPU in fp32."""
    out = tmp_path_factory.mktemp("fp32") / "run"
    return losses(photos, out, 1, 2, "train.packs_per_step=2", "train.device=cpu")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_each_zero_stage_in_bf16_follows_fp32(photos, in_fp32, tmp_path, device, stage):
    own = (f"train.device={device}", f"train.zero_stage={stage}")
    got = losses(photos, tmp_path / "run", 1, 2, *ONE_RANK, *own)
    assert got == pytest.approx(in_fp32, rel=5e-2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("cpu", "cpu"),
        pytest.param("cuda", "cpu", marks=CUDA),
        pytest.param("cpu", "cuda", marks=CUDA),
    ],
)
def test_a_checkpoint_of_one_device_is_resumed_on_another(photos, tmp_path, first, then, stage):
    run, whole = tmp_path / "run", tmp_path / "whole"
    own = (*ONE_RANK, f"train.zero_stage={stage}")
    losses(photos, run, 1, 1, *own, f"train.device={first}")
    got = losses(photos, run, 1, 2, *own, f"train.device={then}")
    assert got == pytest.approx(losses(photos, whole, 1, 2, *own, f"train.device={then}"), rel=5e-2)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_a_run_with_cuda_graphs_follows_one_without(photos, tmp_path, stage, compiled):
    """Never run so far: it needs a device. `tests/zeta/train/test_recorded.py` runs the rest."""
    own = (*ONE_RANK, "train.device=cuda", f"train.zero_stage={stage}", f"train.compile={compiled}")
    ways = {
        mode: losses(photos, tmp_path / mode, 1, 4, *own, f"train.cuda_graph={mode}")
        for mode in ("true", "false")
    }
    assert ways["true"] == pytest.approx(ways["false"], rel=1e-2)
