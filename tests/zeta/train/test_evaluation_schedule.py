"""Evaluation during training: when, what is logged, and that training does not notice it."""

import json
import signal

import pytest
import torch

from tests.zeta.train.test_trainer import JOB, _lines, _losses, _run
from tests.zeta.training import NUM_CLASSES, SyntheticSource, tiny_navit
from zeta.checkpoint.directory import RANKS, load_full_weights
from zeta.distributed import RankInfo, World
from zeta.exit_codes import ExitCode
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.run.directory import RunDir, step_names
from zeta.train.evaluation import evaluate

HELD_OUT = {"steps": 4, "tokens": [16]}


def _run_with(run_dir, *, every=3, held_out=HELD_OUT, **changes):
    return _run(run_dir, evaluate={"every": every}, held_out=held_out, **changes)


def _validations(run_dir):
    lines = _lines(RunDir(run_dir).metrics)
    return [
        {k: v for k, v in line.items() if k != "time/evaluation_s"}
        for line in lines
        if "val/loss" in line
    ]


def _newest(run_dir):
    folder = RunDir(run_dir).checkpoints
    return folder / step_names(folder)[-1]


@pytest.fixture(scope="module")
def evaluated(ranks, tmp_path_factory):
    """An uninterrupted run of 8 steps on 2 ranks, evaluated at 3, 6 and 8."""
    run_dir = tmp_path_factory.mktemp("evaluated") / "run"
    ranks.run(JOB, 2, _run_with(run_dir))
    return run_dir


@pytest.mark.slow
def test_scores_are_logged_when_due_and_at_the_end_with_the_best_so_far(evaluated):
    lines = _validations(evaluated)
    assert [line["step"] for line in lines] == [3, 6, 8]
    for line in lines:
        assert set(line) == {
            *("step", "data/images_seen", "data/tokens_seen", "val/images", "val/rejected"),
            *("val/loss", "val/top1", "val/top5"),
            *("val/loss_at_16_tokens", "val/top1_at_16_tokens", "val/top5_at_16_tokens"),
            *("val/loss_of_average", "val/top1_of_average", "val/top5_of_average"),
            *("val/best_top1", "val/best_step"),
        }
        assert line["val/rejected"] == 1 + 3  # in a pack, and known before
        best = max(
            (one for one in lines if one["step"] <= line["step"]),
            key=lambda one: (one["val/top1"], -one["step"]),
        )
        assert (line["val/best_top1"], line["val/best_step"]) == (best["val/top1"], best["step"])
    progress = json.loads((_newest(evaluated) / "trainer.json").read_text())["progress"]
    assert (progress["validated_step"], progress["best_step"]) == (8, lines[-1]["val/best_step"])
    assert progress["best_value"] == lines[-1]["val/best_top1"]


@pytest.mark.slow
def test_a_held_out_image_that_cannot_be_used_is_named_once_and_apart_from_those_of_training(
    evaluated,
):
    (named,) = _lines(RunDir(evaluated).val_quarantine)
    assert (named["step"], named["key"], named["reason"]) == (3, "key7", "truncated")
    assert not RunDir(evaluated).quarantine.exists()
    log = RunDir(evaluated).rank_log(0).read_text()
    assert log.count("1 held-out images could not be used, the last was key7 in shard.tar") == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("average", [{"ema_decay": None}, {"ema_decay": 0.5}])
def test_training_is_bitwise_the_same_with_and_without_it(ranks, tmp_path, stage, average):
    with_it, without = tmp_path / "with", tmp_path / "without"
    options = {"stage": stage, "train": average}
    ranks.run(JOB, 2, {"runs": [_run_with(with_it, every=1, **options), _run(without, **options)]})
    assert len(_validations(with_it)) == 8
    assert _losses(with_it) == _losses(without)
    for kind in {False, average["ema_decay"] is not None}:
        ours, theirs = (load_full_weights(_newest(run), average=kind) for run in (with_it, without))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_the_moving_average_is_scored_too(ranks, tmp_path, stage):
    run_dir = tmp_path / "run"
    run = _run_with(run_dir, stage=stage, train={"ema_decay": 0.9})
    ranks.run(JOB, 2, run)
    last = _validations(run_dir)[-1]
    for average, suffix in ((False, ""), (True, "_of_average")):
        model = tiny_navit(dropout=0.1).eval()
        model.load_state_dict(load_full_weights(_newest(run_dir), average=average))
        source = SyntheticSource(0, 1, 5, epoch_steps=HELD_OUT["steps"], reject_at=(1,))
        objective = build_objective(ObjectiveConfig(), NUM_CLASSES)
        found = evaluate(model, objective, source, World(RankInfo(), torch.device("cpu")))
        assert last[f"val/loss{suffix}"] == pytest.approx(found.scores["loss"], rel=1e-6)
    assert last["val/loss"] != pytest.approx(last["val/loss_of_average"], rel=1e-4)


@pytest.mark.slow
def test_the_random_state_of_a_checkpoint_is_that_of_a_run_without_it(ranks, tmp_path):
    states = []
    for name, held_out in (("with", HELD_OUT), ("without", {})):
        ranks.run(JOB, 1, _run_with(tmp_path / name, every=1, steps=2, held_out=held_out))
        path = _newest(tmp_path / name) / RANKS / "rank_00000.pt"
        states.append(torch.load(path, weights_only=True))
    assert torch.equal(states[0]["torch"], states[1]["torch"])
    assert states[0]["python"] == states[1]["python"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGUSR1, ExitCode.REQUEUE), (signal.SIGINT, ExitCode.INTERRUPTED)]
)
@pytest.mark.parametrize(("count", "done"), [(2, []), (30, []), (45, [3]), (80, [3, 6])])
def test_a_stop_in_an_evaluation_is_prompt_and_the_evaluation_is_made_up_for(
    ranks, tmp_path, evaluated, number, code, count, done
):
    accident = {"in_evaluation": {"number": number, "rank": 1, "count": count}}
    run_dir = tmp_path / "run"
    codes, outputs = ranks.start(JOB, 2, _run_with(run_dir, accidents=accident))
    assert codes == [code, code], outputs
    assert [line["step"] for line in _validations(run_dir)] == done
    assert int(step_names(RunDir(run_dir).checkpoints)[-1][5:]) == (3, 6, 8)[len(done)]
    assert not RunDir(run_dir).finished.exists()
    ranks.run(JOB, 2, _run_with(run_dir))
    assert _validations(run_dir) == _validations(evaluated)
    assert _losses(run_dir) == _losses(evaluated)
    assert RunDir(run_dir).finished.exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [5, 30])
def test_a_run_killed_in_an_evaluation_ends_as_if_it_had_not_been(
    ranks, tmp_path, evaluated, count
):
    accident = {"in_evaluation": {"number": signal.SIGKILL, "rank": 0, "count": count}}
    run_dir = tmp_path / "run"
    codes, _ = ranks.start(JOB, 2, _run_with(run_dir, accidents=accident), grace=5.0)
    assert codes[0] == -signal.SIGKILL
    ranks.run(JOB, 2, _run_with(run_dir))
    assert _validations(run_dir) == _validations(evaluated)
    assert _losses(run_dir) == _losses(evaluated)


@pytest.mark.slow
def test_a_finished_run_is_not_evaluated_again_and_can_get_its_first_evaluation(ranks, tmp_path):
    run_dir = tmp_path / "run"
    ranks.run(JOB, 1, _run(run_dir, steps=2))
    for _ in range(2):  # the second time there is nothing to do
        ranks.run(JOB, 1, _run_with(run_dir, steps=2))
        assert [line["step"] for line in _validations(run_dir)] == [2]


@pytest.mark.slow
def test_other_held_out_images_begin_a_new_search_for_the_best(ranks, tmp_path):
    run_dir = tmp_path / "run"
    ranks.run(JOB, 1, _run_with(run_dir, steps=4, every=2))
    ranks.run(JOB, 1, _run_with(run_dir, steps=6, every=2, held_out={"steps": 3}))
    last = _validations(run_dir)[-1]
    assert last["val/best_step"] == last["step"] == 6
    assert last["val/best_top1"] == last["val/top1"]
