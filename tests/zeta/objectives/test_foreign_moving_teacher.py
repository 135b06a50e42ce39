"""The moving teacher of docs/extending.md follows its student, on any ranks and over a restart."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from data_pipeline.shards.build import build_shards
from launch.recipes.digits import render_split
from tests.launch.command_line import zeta
from tests.zeta.objectives.foreign_moving_teacher import DECAY, MovingTeacher, StudentAndTeacher
from tests.zeta.training import tiny_navit
from zeta.models.config import load_pretrained
from zeta.objectives.base import Step
from zeta.objectives.config import ObjectiveConfig

KIND = "tests.zeta.objectives.foreign_moving_teacher:MovingTeacher"
SETTINGS = (
    *("data.shards=shards", "data.workers=0", "data.drop.keep=true", f"objective.kind={KIND}"),
    *("train.checkpoint_every=3", "optim.schedule=constant", "optim.warmup_steps=1"),
    *("optim.warmup_share=0", "train.device=cpu", "tracker.wandb.mode=disabled"),
)


def equal(model):
    """Whether the teacher has the weights and buffers of its student."""
    own, students = model.teacher.state_dict(), model.image.state_dict()
    return all(torch.equal(own[name], value) for name, value in students.items())


def test_the_teacher_begins_as_its_student_in_weights_and_normalisation():
    model = StudentAndTeacher(tiny_navit(mean=0.3), tiny_navit(), seed=3)
    drawn = {name: value.clone() for name, value in model.image.state_dict().items()}
    assert not equal(model)
    MovingTeacher(ObjectiveConfig(KIND), 1).start(model)
    assert equal(model)
    assert all(torch.equal(drawn[n], value) for n, value in model.image.state_dict().items())


@pytest.mark.parametrize(("share", "decay"), [(0.0, DECAY), (0.5, 0.95), (1.0, 1.0)])
def test_the_teacher_moves_towards_the_student_ever_more_slowly_and_never_trains(share, decay):
    model = StudentAndTeacher(tiny_navit(), tiny_navit(), seed=3).train()
    assert not model.teacher.training
    before = [p.clone() for p in model.teacher.parameters()]
    MovingTeacher(ObjectiveConfig(KIND), 1).finish_step(model, Step(0, seed=0, share=share))
    pairs = zip(model.teacher.parameters(), before, model.image.parameters(), strict=True)
    for after, was, student in pairs:
        torch.testing.assert_close(after, decay * was + (1 - decay) * student)


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
    for run in ("whole", "parts"):
        if run == "parts":  # as it was after step 3
            shutil.copytree(tmp_path / "whole", tmp_path / run)
            shutil.rmtree(tmp_path / run / "checkpoints/step_00000006")
            (tmp_path / run / "FINISHED").unlink()
        settings = (f"run.dir={run}", "train.max_steps=6", f"train.dtype={dtype}")
        done = zeta("train", "demo", *settings, *SETTINGS, cwd=tmp_path)
        assert done.returncode == 0, done.stderr + done.stdout
        log = (tmp_path / run / "logs/rank_00000.log").read_text()
        assert ("continuing from step_00000003" in log) == (run == "parts")
        exported = zeta("export", run, f"{run}_export", cwd=tmp_path)
        assert exported.returncode == 0, exported.stderr
    whole, parts = (load_pretrained(tmp_path / f"{run}_export") for run in ("whole", "parts"))
    for name, weight in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], weight), name
