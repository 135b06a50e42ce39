"""The moving teacher of docs/extending.md follows its student, on any ranks and over a restart."""

from __future__ import annotations

import json

import pytest
import torch

from data_pipeline.shards.build import build_shards
from launch.recipes.digits import render_split
from tests.launch.command_line import zeta
from tests.zeta.objectives.foreign_moving_teacher import DECAY, MovingTeacher, StudentAndTeacher
from tests.zeta.training import tiny_navit
from zeta.models.config import load_pretrained
from zeta.objectives.config import ObjectiveConfig

KIND = "tests.zeta.objectives.foreign_moving_teacher:MovingTeacher"
SETTINGS = (
    *("data.shards=shards", "data.workers=0", "data.drop.keep=true", f"objective.kind={KIND}"),
    *("train.checkpoint_every=3", "optim.schedule=constant", "optim.warmup_steps=1"),
    *("optim.warmup_share=0", "train.device=cpu", "tracker.wandb.mode=disabled"),
)


def test_the_teacher_moves_towards_the_student_and_never_trains():
    model = StudentAndTeacher(tiny_navit(), tiny_navit(), seed=3).train()
    assert not model.teacher.training
    before = [p.clone() for p in model.teacher.parameters()]
    MovingTeacher(ObjectiveConfig(KIND), 1).finish_step(model)
    pairs = zip(model.teacher.parameters(), before, model.image.parameters(), strict=True)
    for after, was, student in pairs:
        torch.testing.assert_close(after, DECAY * was + (1 - DECAY) * student)


@pytest.mark.slow
def test_ranks_stages_and_bf16_copies_follow_as_one_process_does(ranks, tmp_path):
    found = {}
    for world_size, cases in {1: [(0, "fp32"), (0, "bf16")], 2: [(2, "fp32"), (3, "fp32")]}.items():
        out = tmp_path / f"{world_size}.json"
        arguments = {"packs_per_step": 4, "cases": cases, "out": str(out)}
        ranks.run("tests.zeta.objectives.distill_jobs.moving", world_size, arguments)
        found |= json.loads(out.read_text())
    wanted = torch.tensor(found["0 fp32"]["weights"])
    for case in ("2 fp32", "3 fp32"):
        torch.testing.assert_close(torch.tensor(found[case]["weights"]), wanted, rtol=0, atol=1e-5)
    assert found["0 bf16"]["stale"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_goes_on_after_a_restart_as_if_there_had_been_none(tmp_path, dtype):
    samples = [(k, {"jpg": f["jpg"]}) for k, f in list(render_split("val", seed=0))[:60]]
    build_shards(samples, tmp_path / "shards")
    for run, ends in (("whole", [6]), ("parts", [3, 6])):
        for end in ends:
            settings = (f"run.dir={run}", f"train.max_steps={end}", f"train.dtype={dtype}")
            done = zeta("train", "demo", *settings, *SETTINGS, cwd=tmp_path)
            assert done.returncode == 0, done.stderr + done.stdout
        exported = zeta("export", run, f"{run}_export", cwd=tmp_path)
        assert exported.returncode == 0, exported.stderr
    whole, parts = (load_pretrained(tmp_path / f"{run}_export") for run in ("whole", "parts"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], weight), name
