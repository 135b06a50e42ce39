"""What a run tells its objective: when it starts, and where it is at each step."""

import json
import re
import signal

import pytest
import torch

from tests.zeta.objectives.distill_jobs import student_and_teacher
from tests.zeta.training import lane_pack, tiny_navit
from zeta.checkpoint.directory import load_full_weights
from zeta.export.saving import save_pretrained
from zeta.random_state import derive_seed
from zeta.run.directory import RunDir, step_names

JOB = "tests.zeta.trainer_jobs.train"
PACKS, EPOCH_STEPS, EPOCHS, SEED = 4, 5, 2, 0
ARGUMENTS = {"arch": "navit", "image_size": 16, "patch_size": 4, "num_classes": 1, "dim": 16}
ARGUMENTS |= {"depth": 2, "heads": 2, "dim_head": 8, "mlp_dim": 32, "channels": 1}


def _run(run_dir, objective, *, stage=2, lr=1e-2, accidents=None, train=None, **changes):
    options = {"packs_per_step": PACKS, "zero_stage": stage, "dtype": "fp32", "seed": SEED}
    options |= {"checkpoint_every": 2, "max_steps": 6} | (train or {})
    optim = {"lr": lr, "schedule": "constant"}
    run = {"run_dir": str(run_dir), "objective": objective, "train": options, "optim": optim}
    return run | {"accidents": accidents or {}} | changes


def _told(run_dir, world_size):
    logs = [RunDir(run_dir).rank_log(rank).read_text() for rank in range(world_size)]
    lines = [re.findall(r"^TOLD (.*)$", log, re.MULTILINE) for log in logs]
    return [[json.loads(line) for line in of_rank] for of_rank in lines]


def _weights(run_dir):
    folder = RunDir(run_dir).checkpoints
    return load_full_weights(folder / step_names(folder)[-1])


def _part(weights, prefix):
    return {
        name.removeprefix(prefix): value
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def _killed_in_step(number):
    return {"kill": {"phase": "train step", "ranks": [0, 1], "count": number}}


@pytest.mark.slow
def test_the_share_done_counts_the_images_of_all_epochs_on_any_ranks_and_after_a_resume(
    ranks, tmp_path
):
    images = [sum(lane_pack(n, lane).num_images for lane in range(PACKS)) for n in range(5)]
    whole = EPOCHS * sum(images)
    expected = ["start"]
    for index in range(EPOCH_STEPS):
        share = sum(images[:index]) / whole
        expected += [[hook, index, derive_seed(SEED, index), share] for hook in ("begin", "finish")]
    settings = {
        "train": {"max_steps": None, "max_epochs": EPOCHS},
        "source": {"epoch_steps": EPOCH_STEPS},
        "epoch_images": sum(images),
    }
    for world_size in (1, 2):
        run_dir = tmp_path / f"{world_size}"
        ranks.run(JOB, world_size, _run(run_dir, "told", **settings))
        assert _told(run_dir, world_size) == [expected] * world_size
    parts = tmp_path / "parts"
    codes, _ = ranks.start(JOB, 2, _run(parts, "told", accidents=_killed_in_step(5), **settings))
    assert codes == [-signal.SIGKILL] * 2
    assert _told(parts, 2) == [expected[:-1]] * 2  # killed in the last step: it is not finished
    ranks.run(JOB, 2, _run(parts, "told", **settings))
    for told in _told(parts, 2):  # on from the checkpoint of step 4, or of 2 if it was not written
        assert told[len(expected) - 1 :] in (expected[9:], expected[5:])


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (0, "bf16"), (2, "fp32"), (3, "bf16")])
def test_a_moving_teacher_begins_as_its_student_from_initial_values_and_from_an_export(
    ranks, tmp_path, stage, dtype
):
    export = tiny_navit(num_classes=1, seed=9).state_dict()
    save_pretrained(tmp_path / "export", export, ARGUMENTS, {})
    initial = student_and_teacher(SEED).image.state_dict()
    for init_from, wanted in ((None, initial), (str(tmp_path / "export"), export)):
        train = {"max_steps": 1, "init_from": init_from, "dtype": dtype}
        folder = tmp_path / str(init_from is None)
        ranks.run(JOB, 2, _run(folder, "moving", stage=stage, lr=0.0, train=train))
        found = _weights(folder)
        student, teacher = _part(found, "image."), _part(found, "teacher.")
        assert set(student) == set(teacher) != set()
        for name, value in student.items():
            assert torch.equal(value, teacher[name]), name
            if not name.startswith("head."):  # not taken: it belongs to the objective
                assert torch.equal(value, wanted[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_decay_that_rises_over_the_run_goes_on_after_a_kill_as_if_there_had_been_none(
    ranks, tmp_path, stage
):
    for run, kill in (("whole", None), ("parts", 5)):
        if kill is not None:
            arguments = _run(tmp_path / run, "moving", stage=stage, accidents=_killed_in_step(kill))
            codes, _ = ranks.start(JOB, 2, arguments)
            assert codes == [-signal.SIGKILL] * 2
        ranks.run(JOB, 2, _run(tmp_path / run, "moving", stage=stage))
    whole, parts = (_weights(tmp_path / run) for run in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    student, teacher = _part(whole, "image."), _part(whole, "teacher.")
    assert not all(torch.equal(teacher[name], value) for name, value in student.items())
