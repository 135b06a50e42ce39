"""Runs as a whole: resume, kills, signals, bad steps, and what lies in the run directory."""

import json
import random
import re
import signal
import subprocess
import sys

import pytest
import torch

from zeta.checkpoint.directory import find_fault, load_full_weights
from zeta.exit_codes import ExitCode
from zeta.run.code_version import code_version
from zeta.run.directory import RunDir, step_names

JOB = "tests.zeta.trainer_jobs.train"


def _run(run_dir, steps=8, *, accidents=None, stage=2, train=None, **changes):
    options = {"packs_per_step": 4, "max_steps": steps, "zero_stage": stage, "dtype": "fp32"}
    options |= {"log_every": 1, "checkpoint_every": 2, "keep_last": 3, "ema_decay": 0.5}
    options |= train or {}
    run = {"run_dir": str(run_dir), "train": options, "model": {"dropout": 0.1}}
    return run | {"accidents": accidents or {}} | changes


def _lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _metric(run_dir, name):
    return {line["step"]: line[name] for line in _lines(RunDir(run_dir).metrics) if name in line}


def _losses(run_dir):
    return _metric(run_dir, "train/loss")


def _final_weights(run_dir):
    """The weights of the newest checkpoint, and their moving average as `ema/NAME`."""
    folder = RunDir(run_dir).checkpoints
    newest = folder / step_names(folder)[-1]
    average = load_full_weights(newest, average=True)
    return load_full_weights(newest) | {f"ema/{name}": value for name, value in average.items()}


def _samples(run_dir):
    """What the ledger says of each step: digest by lane, over all ranks of the run."""
    steps = {}
    for path in sorted(RunDir(run_dir).ledger.glob("rank_*.jsonl")):
        for line in _lines(path):
            steps.setdefault(line["step"], {}).update(line["lanes"])
    return steps


def _assert_same(run_dir, reference):
    assert _losses(run_dir) == _losses(reference)
    ours, theirs = _final_weights(run_dir), _final_weights(reference)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert _samples(run_dir) == _samples(reference)
    assert RunDir(run_dir).finished.exists()


@pytest.fixture(scope="module")
def reference(ranks, tmp_path_factory):
    """An uninterrupted run on 2 ranks."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    ranks.run(JOB, 2, _run(run_dir))
    return run_dir


KILLS = [
    ("train step", [1], 3),
    ("train step", [0, 1], 6),
    ("save begins", [0], 2),
    ("save begins", [0, 1], 3),
    ("half a file", [0, 1], 2),
    ("half copied", [0, 1], 1),
    ("half a file", [0], 2),
    ("half a file", [1], 1),
    ("half copied", [1], 2),
    ("between files", [1], 3),
    ("between files", [0, 1], 2),
    ("written", [1], 1),
    ("written", [0, 1], 2),
    ("before manifest", [0], 1),
    ("before manifest", [0], 3),
    ("before rename", [0], 2),
    ("before latest", [0], 2),
    ("before prune", [0], 3),
    ("half-deleted", [0], 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "killed", "count"), KILLS)
def test_a_run_killed_in_any_phase_ends_as_if_it_had_not_been(
    ranks, tmp_path, reference, phase, killed, count
):
    accident = {"kill": {"phase": phase, "ranks": killed, "count": count}}
    codes, _ = ranks.start(JOB, 2, _run(tmp_path / "run", accidents=accident), grace=5.0)
    assert [codes[rank] for rank in killed] == [-signal.SIGKILL] * len(killed)
    ranks.run(JOB, 2, _run(tmp_path / "run"))
    _assert_same(tmp_path / "run", reference)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [[0], [1], [0, 1]])
def test_a_run_killed_while_it_resumes_ends_as_if_it_had_not_been(
    ranks, tmp_path, reference, killed
):
    ranks.run(JOB, 2, _run(tmp_path / "run", 5))
    accident = {"kill": {"phase": "loading", "ranks": killed}}
    codes, _ = ranks.start(JOB, 2, _run(tmp_path / "run", accidents=accident), grace=5.0)
    assert [codes[rank] for rank in killed] == [-signal.SIGKILL] * len(killed)
    ranks.run(JOB, 2, _run(tmp_path / "run"))
    _assert_same(tmp_path / "run", reference)


@pytest.mark.slow
def test_a_run_killed_again_and_again_at_random_times_ends_as_if_it_had_not_been(
    ranks, tmp_path, reference
):
    chance = random.Random(0)
    killed = attempt = 0
    while killed < 8:
        run_dir = tmp_path / str(attempt)
        codes = None
        while codes != [0, 0]:
            codes, _ = ranks.start(
                JOB,
                2,
                _run(run_dir),
                kill_after=chance.uniform(0.2, 1.5),
                kill_ranks=chance.choice([[0], [1], [0, 1]]),
                grace=5.0,
            )
            killed += codes != [0, 0]
        _assert_same(run_dir, reference)
        attempt += 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_resume_is_bitwise_on_every_stage(ranks, tmp_path, stage):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    runs = [_run(whole, 4, stage=stage), _run(halves, 2, stage=stage), _run(halves, 4, stage=stage)]
    ranks.run(JOB, 2, {"runs": runs})
    _assert_same(halves, whole)


@pytest.mark.slow
def test_ranks_and_stage_may_change_at_every_resume(ranks, tmp_path, reference):
    run_dir = tmp_path / "run"
    for steps, (world_size, stage) in zip(
        (2, 4, 6, 8), ((1, 2), (2, 3), (3, 0), (1, 1)), strict=True
    ):
        ranks.run(JOB, world_size, _run(run_dir, steps, stage=stage))
    assert _losses(run_dir) == pytest.approx(_losses(reference), abs=1e-5)
    ours, theirs = _final_weights(run_dir), _final_weights(reference)
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=0, atol=1e-5), name
    assert _samples(run_dir) == _samples(reference)


@pytest.mark.slow
def test_a_moving_average_may_begin_and_end_with_any_resume(ranks, tmp_path):
    run_dir = tmp_path / "run"
    ranks.run(JOB, 2, _run(run_dir, 2, train={"ema_decay": None}))
    newest = RunDir(run_dir).checkpoints / "step_00000002"
    with pytest.raises(ValueError, match="has no moving average"):
        load_full_weights(newest, average=True)
    outputs = ranks.run(JOB, 2, _run(run_dir, 3))
    assert "step_00000002 has no moving average of the weights; one begins" in outputs[0]
    state = json.loads((RunDir(run_dir).checkpoints / "step_00000003/trainer.json").read_text())
    assert state["average_updates"] == 1
    before, after = load_full_weights(newest), _final_weights(run_dir)
    for name, value in before.items():
        expected = value.lerp(after[name], 0.9)  # the first update decays by 1 / 10
        assert torch.allclose(after[f"ema/{name}"], expected, rtol=0, atol=1e-6), name
    ranks.run(JOB, 1, _run(run_dir, 4, train={"ema_decay": None}))
    assert not (RunDir(run_dir).checkpoints / "step_00000004/average").exists()


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["images", "tokens"])
def test_a_run_by_images_or_tokens_has_the_same_rates_and_end_on_any_ranks(ranks, tmp_path, unit):
    optim = {"lr": 1e-3, "schedule": "rsqrt", "schedule_by": unit}
    optim |= {f"warmup_{unit}": {"images": 8, "tokens": 40}[unit]}
    limit = {"images": 40, "tokens": 200}[unit]

    def run(name, share, world_size):
        train = {"max_steps": None, f"max_{unit}": limit * share // 4}
        ranks.run(JOB, world_size, _run(tmp_path / name, train=train, optim=optim))
        return tmp_path / name

    whole = run("whole", 4, 2)
    for share, world_size in ((1, 1), (2, 3), (4, 1)):
        parts = run("parts", share, world_size)
    assert _metric(parts, "optim/lr") == _metric(whole, "optim/lr")
    seen = _metric(whole, f"data/{unit}_seen")
    assert _metric(parts, f"data/{unit}_seen") == seen
    assert limit <= seen[max(seen)]
    assert seen[max(seen) - 1] < limit
    assert RunDir(parts).finished.exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(
    ranks, tmp_path, reference, damage
):
    run_dir = tmp_path / "run"
    ranks.run(JOB, 2, _run(run_dir, 6))
    newest = RunDir(run_dir).checkpoints / "step_00000006"
    victim = next((newest / "zero").glob("*rank_1*optim*"))
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "remove":
        victim.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    outputs = ranks.run(JOB, 2, _run(run_dir))
    _assert_same(run_dir, reference)
    assert (RunDir(run_dir).checkpoints / "step_00000006.bad-1").is_dir()
    assert "step_00000006 is damaged" in outputs[0]
    assert "continuing from step_00000004" in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_fails_the_save_everywhere_and_the_run_goes_on(
    ranks, tmp_path, reference, rank
):
    run_dir = tmp_path / "run"
    accident = {"disk_full": {"rank": rank, "count": 2}}
    outputs = ranks.run(JOB, 2, _run(run_dir, accidents=accident))
    _assert_same(run_dir, reference)
    names = step_names(RunDir(run_dir).checkpoints)
    assert names == ["step_00000002", "step_00000006", "step_00000008"]
    assert not list(RunDir(run_dir).checkpoints.glob(".tmp-*"))
    assert "WARNING: the checkpoint of step 4 could not be written" in outputs[0]
    assert _metric(run_dir, "checkpoint/failures")[8] == 1


@pytest.mark.slow
def test_a_first_checkpoint_that_cannot_be_written_is_not_said_to_follow_another(ranks, tmp_path):
    run_dir = tmp_path / "run"
    outputs = ranks.run(JOB, 2, _run(run_dir, accidents={"disk_full": {"rank": 1, "count": 1}}))
    assert "the checkpoint of step 2 could not be written" in outputs[0]
    assert "; there is no earlier one" in outputs[0]


def _tmpfs_may_be_mounted(folder):
    """Whether a process may mount a tmpfs for itself: as root, on Linux."""
    code = "from tests.zeta.trainer_jobs import *\nwith mounted_tmpfs(sys.argv[1], '16k'): pass"
    command = [sys.executable, "-c", f"import sys\n{code}", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_rank_costs_a_checkpoint_and_no_more(
    ranks, tmp_path, reference
):
    if not _tmpfs_may_be_mounted(tmp_path):
        pytest.skip("a tmpfs may not be mounted here (that takes root on Linux)")
    run_dir = tmp_path / "run"
    accident = {"small_disk": {"rank": 1, "count": 2}}
    outputs = ranks.run(JOB, 2, _run(run_dir, accidents=accident))
    _assert_same(run_dir, reference)
    folder = RunDir(run_dir).checkpoints
    assert step_names(folder) == ["step_00000002", "step_00000006", "step_00000008"]
    assert find_fault(folder / "step_00000002") is None
    assert not list(folder.glob(".tmp-*"))
    assert (
        "WARNING: the checkpoint of step 4 could not be written (rank 1: OSError: [Errno 28] No "
        "space left on device); the last good one is of step 2" in outputs[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_all_files_of_a_rank_delays_them_and_the_run_goes_on(
    ranks, tmp_path, reference, rank
):
    run_dir = tmp_path / "run"
    outputs = ranks.run(JOB, 2, _run(run_dir, accidents={"no_room": {"rank": rank}}))
    _assert_same(run_dir, reference)  # metrics and ledger have every step
    folder = RunDir(run_dir).checkpoints
    assert step_names(folder) == ["step_00000002", "step_00000008"]
    for step in (4, 6):
        assert f"WARNING: the checkpoint of step {step} could not be written" in outputs[0]
    assert ("metrics.jsonl cannot be written" in outputs[0]) == (rank == 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGUSR1, ExitCode.REQUEUE),
        (signal.SIGUSR2, ExitCode.REQUEUE),
        (signal.SIGTERM, ExitCode.REQUEUE),
        (signal.SIGINT, ExitCode.INTERRUPTED),
    ],
)
def test_a_signal_to_one_rank_saves_on_all_and_the_same_command_goes_on(
    ranks, tmp_path, reference, number, code
):
    run_dir = tmp_path / "run"
    accident = {"raise_signal": {"number": number, "rank": 1, "count": 3}}
    codes, _ = ranks.start(JOB, 2, _run(run_dir, accidents=accident))
    assert codes == [code, code]
    assert step_names(RunDir(run_dir).checkpoints)[-1] == "step_00000003"
    assert not RunDir(run_dir).finished.exists()
    ranks.run(JOB, 2, _run(run_dir))
    assert _losses(run_dir) == _losses(reference)


@pytest.mark.slow
def test_files_in_the_run_directory_ask_for_a_checkpoint_and_for_the_end(
    ranks, tmp_path, reference
):
    run_dir = RunDir(tmp_path / "run")
    train = {"checkpoint_every": 100, "keep_last": 9}
    accident = {"create": {"files": {str(run_dir.save_request): 3, str(run_dir.stop_request): 5}}}
    codes, _ = ranks.start(JOB, 2, _run(run_dir.path, train=train, accidents=accident))
    assert codes == [ExitCode.INTERRUPTED] * 2
    # Asked during a step: seen when the next one is drawn, done after it; STOP before it.
    assert step_names(run_dir.checkpoints) == ["step_00000004", "step_00000005"]
    assert not run_dir.save_request.exists()
    assert run_dir.stop_request.exists()
    run_dir.stop_request.unlink()
    ranks.run(JOB, 2, _run(run_dir.path, train=train))
    _assert_same(run_dir.path, reference)


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once(ranks, tmp_path):
    accident = {"raise_signal": {"number": signal.SIGINT, "rank": 0, "count": 5, "times": 2}}
    codes, _ = ranks.start(JOB, 1, _run(tmp_path / "run", accidents=accident))
    assert codes == [ExitCode.INTERRUPTED]
    saved = step_names(RunDir(tmp_path / "run").checkpoints)  # that of step 4 may be on its way
    assert saved in (["step_00000002"], ["step_00000002", "step_00000004"])


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_steps_that_are_not_finite_are_skipped_counted_and_listed(ranks, tmp_path, stage, dtype):
    run_dir = tmp_path / "run"
    accident = {"nan_loss": {"rank": 1, "first": 5, "last": 6}}
    run = _run(run_dir, 6, accidents=accident, stage=stage, train={"dtype": dtype})
    outputs = ranks.run(JOB, 2, run)
    assert _metric(run_dir, "optim/skipped_steps")[6] == 1
    assert sorted(_losses(run_dir)) == [1, 2, 4, 5, 6]
    assert "step 3: loss or gradient is not finite" in outputs[0]
    for rank in range(2):
        lines = _lines(RunDir(run_dir).ledger / f"rank_{rank:05d}.jsonl")
        assert [line["step"] for line in lines if line.get("skipped")] == [3]
        assert len(lines[2]["sample_ids"]) == lines[2]["images"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_too_many_bad_steps_in_a_row_end_the_run_for_good(ranks, tmp_path, stage):
    accident = {"nan_loss": {"rank": 1, "first": 3, "last": 99}}
    train = {"max_nonfinite_steps": 3}
    run = _run(tmp_path / "run", accidents=accident, stage=stage, train=train)
    codes, outputs = ranks.start(JOB, 2, run)
    assert codes == [ExitCode.NEVER_RESTART] * 2
    assert "not finite for 3 steps in a row (train.max_nonfinite_steps), up to step 4" in outputs[0]


@pytest.mark.slow
def test_a_bad_label_ends_every_rank_and_names_the_sample(ranks, tmp_path):
    accident = {"bad_label": {"rank": 1, "step": 1}}
    codes, outputs = ranks.start(JOB, 2, _run(tmp_path / "run", accidents=accident))
    assert codes == [ExitCode.NEVER_RESTART] * 2
    for output in outputs:
        assert "has label 77; labels must be 0 to 4" in output


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_cannot_be_written_is_not_finished(ranks, tmp_path, reference):
    run_dir = tmp_path / "run"
    accident = {"disk_full": {"rank": 1, "count": 4}}  # saves at 2, 4, 6 and, last, 8
    codes, outputs = ranks.start(JOB, 2, _run(run_dir, accidents=accident))
    assert codes == [1, 1]
    assert "nothing after step 6 is saved" in outputs[0]
    assert not RunDir(run_dir).finished.exists()
    ranks.run(JOB, 2, _run(run_dir))
    _assert_same(run_dir, reference)


@pytest.mark.slow
def test_runs_of_one_process(ranks, tmp_path):
    """Several claims that one rank can show, in one process group."""
    kinds = ("epoch", "kept", "every", "both", "clock", "third", "rejected")
    folders = {name: tmp_path / name for name in kinds}
    epoch = {"max_steps": None, "max_epochs": 1}
    runs = [
        _run(folders["epoch"], train=epoch, source={"epoch_steps": 3}, epoch_images=40),
        _run(folders["epoch"], train=epoch, source={"epoch_steps": 3}),
        _run(folders["kept"], 8, train={"keep_last": 2}),
        _run(
            folders["every"],
            7,
            train={"keep_last": 1, "keep_every": 3, "checkpoint_every": None},
        ),
        _run(folders["both"], 8, train={"keep_last": 2, "keep_every": 5}),
        _run(
            folders["clock"],
            4,
            train={"checkpoint_minutes": 1e-9, "checkpoint_every": None, "keep_last": 9},
        ),
        _run(folders["third"], 4, objective="brightness"),
        _run(folders["rejected"], 4, source={"reject_at": [1, 3]}),
        _run(folders["rejected"], 6, source={"reject_at": [1, 3, 5]}),
    ]
    output = ranks.run(JOB, 1, {"runs": runs})[0]

    # A run by epochs tells when it ends, ends with the data, and its repetition adds nothing.
    assert re.search(r"step +1  eta +\d:\d\d:\d\d  loss", output)
    assert sorted(_losses(folders["epoch"])) == [1, 2, 3]
    assert RunDir(folders["epoch"]).finished.exists()

    # Only the newest checkpoints are kept, and `latest` names the last.
    checkpoints = RunDir(folders["kept"]).checkpoints
    assert step_names(checkpoints) == ["step_00000006", "step_00000008"]
    assert (checkpoints / "latest").read_text() == "step_00000008\n"

    # Those at multiples of keep_every are written and kept besides; `null` is no interval.
    names = step_names(RunDir(folders["every"]).checkpoints)
    assert names == ["step_00000003", "step_00000006", "step_00000007"]
    names = step_names(RunDir(folders["both"]).checkpoints)
    assert names == ["step_00000005", "step_00000006", "step_00000008"]

    # By the clock: every step takes longer than so short an interval.
    assert step_names(RunDir(folders["clock"]).checkpoints) == [
        f"step_{step:08d}" for step in (1, 2, 3, 4)
    ]

    # trainer.json tells which code wrote it.
    state = json.loads((checkpoints / "step_00000008" / "trainer.json").read_text())
    assert state["code"] == code_version()
    assert set(state["versions"]) == {"python", "torch", "deepspeed"}

    # An objective that the loop has never heard of.
    assert set(_metric(folders["third"], "train/close")) == {1, 2, 3, 4}
    losses = _losses(folders["third"])
    assert losses[4] < losses[1]

    # A sample that cannot be decoded costs its slot, and is listed once.
    assert len(_lines(RunDir(folders["rejected"]).quarantine)) == 1
    assert _metric(folders["rejected"], "data/quarantined")[6] == 1
    ledger = _lines(RunDir(folders["rejected"]).ledger / "rank_00000.jsonl")
    assert [line["rejected"] for line in ledger] == [[], [7], [], [7], [], [7]]


@pytest.mark.slow
def test_what_cannot_work_is_refused_by_name(ranks, tmp_path):
    run_dir = tmp_path / "run"
    ranks.run(JOB, 1, _run(run_dir, 2))
    refusals = {
        "4 ranks but train.packs_per_step is 3": (
            4,
            _run(tmp_path / "a", train={"packs_per_step": 3}),
        ),
        "set train.max_steps, train.max_images": (1, _run(tmp_path / "b", None)),
        "is of another model: attn_pool.kv.weight": (1, _run(run_dir, model={"dim": 24})),
    }
    for message, (world_size, run) in refusals.items():
        codes, outputs = ranks.start(JOB, world_size, run)
        assert codes == [ExitCode.NEVER_RESTART] * world_size
        assert message in outputs[0]
