"""`train.deepspeed`: what passes reaches DeepSpeed and works, all else is refused by name."""

import json

import pytest

from zeta.train.config import TrainConfig
from zeta.train.optimizers.table import OPTIMIZERS, highest_stage
from zeta.zero.passthrough import merged

OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


def _report(ranks, tmp_path, job, world_size, **arguments):
    out = tmp_path / "report.json"
    ranks.run(f"tests.zeta.passthrough_jobs.{job}", world_size, {"out": str(out), **arguments})
    return json.loads(out.read_text())


def _refusal(settings):
    try:
        TrainConfig(deepspeed=settings)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping is decided by optim.clip"),
        ({"train_batch_size": 8}, "train_batch_size is decided by train.packs_per_step"),
        ({"scheduler": {}}, "scheduler is decided by optim.schedule"),
        ({"bf16": {"enabled": True}}, "bf16 is decided by train.dtype"),
        ({"wandb": {}}, "wandb is decided by tracker.wandb"),
        ({"prescale_gradients": True}, "prescale_gradients is decided by the exact mean"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is decided by train.zero_s"),
        ({"zero_optimization": {"zenflow": {}}}, "zenflow is decided by zeta's finite check"),
        ({"zero_optimisation": {}}, "did you mean zero_optimization"),
        ({"wall_clock_brakdown": True}, "did you mean wall_clock_breakdown"),
        ({"zero_optimization": {"overlap_com": 1}}, "did you mean zero_optimization.overlap_comm"),
        ({"zero_optimization": 3}, "zero_optimization is 3; it must be a mapping"),
        (
            {"zero_optimization": {"reduce_bucket_size": "large"}},
            "zero_optimization.reduce_bucket_size is 'large'; it must be a number",
        ),
        (
            {"zero_optimization": {"sub_group_size": -1}},
            "sub_group_size is -1; it must be at least",
        ),
        ({"zero_optimization": {"sub_group_size": 1.5}}, "is 1.5; it must be a whole number"),
        (
            {"zero_optimization": {"overlap_comm": "maybe"}},
            "overlap_comm is 'maybe'; it must be true or false",
        ),
        ({"optimizer": {"type": "Lamb"}}, "optimizer is decided by optim.kind and optim.params"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer is {'device': 'nvme'}; it must be a mapping with device cpu",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "offload_optimizer.ratio is decided by zeta's finite check",
        ),
    ],
)
def test_what_zeta_decides_or_nobody_knows_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=r"train\.deepspeed") as refused:
        TrainConfig(deepspeed=settings)
    assert message in str(refused.value)


def test_offload_needs_something_sharded():
    with pytest.raises(ValueError, match=r"needs train.zero_stage of 1, 2 or 3; it is 0"):
        TrainConfig(deepspeed=OFFLOAD, zero_stage=0)


def test_settings_are_laid_over_the_config_without_changing_either():
    config = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.0}
    settings = {"zero_optimization": {"overlap_comm": True}, "memory_breakdown": True}
    assert merged(config, settings) == {
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "gradient_clipping": 0.0,
        "memory_breakdown": True,
    }
    assert config == {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.0}
    assert merged(config, {}) == config


@pytest.mark.slow
def test_every_key_that_deepspeed_reads_passes_or_is_refused_for_a_reason(ranks, tmp_path):
    read = _report(ranks, tmp_path, "keys_read", 1)
    assert {"zero_optimization", "fp16", "gradient_clipping"} <= set(read)
    for key in read:
        refusal = _refusal({key: {}})
        assert refusal is None or f"train.deepspeed.{key} is decided by" in refusal, key


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_optimizer_in_host_memory_trains_clips_skips_and_averages_as_without(
    ranks, tmp_path, world_size
):
    report = _report(ranks, tmp_path, "offload", world_size)
    assert len(report) == 3
    for case, seen in report.items():
        assert seen["it is in host memory"], case
        assert seen["error"] < 1e-6, case
        assert seen["clipped"], case
        assert seen["applied"] == [True, True, False, False, True, True], case
        assert seen["skipped steps changed nothing"], case


@pytest.mark.slow
def test_runs_under_settings_that_pass_resume_bitwise(ranks, tmp_path):
    small = {"stage3_param_persistence_threshold": 0, "sub_group_size": 500}
    shown = {"wall_clock_breakdown": True, "dump_state": True}
    shown |= {"comms_logger": {"enabled": True}, "flops_profiler": {"enabled": True}}
    cases = [
        [1, OFFLOAD],
        [2, OFFLOAD],
        [3, OFFLOAD],
        [2, {"zero_optimization": {"round_robin_gradients": True, "reduce_bucket_size": 1000}}],
        [2, {"zero_optimization": {"contiguous_gradients": False, "overlap_comm": True}}],
        [1, {"zero_optimization": {"reduce_scatter": False, "allgather_partitions": False}}],
        [3, {"zero_optimization": small}],
        [2, shown],
    ]
    report = _report(ranks, tmp_path, "resume", 2, cases=cases)
    assert len(report) == len(cases)
    assert all(report.values()), report


@pytest.mark.slow
def test_every_optimizer_that_passes_trains_and_resumes_bitwise_on_any_stage(ranks, tmp_path):
    params = {"sgd": {"momentum": 0.9}, "rmsprop": {"momentum": 0.5, "centered": True}}
    optims = [{"kind": kind, "params": params.get(kind, {})} for kind in OPTIMIZERS]
    cases = [
        [stage, {}, each]
        for each in optims
        for stage in (0, 2, 3)
        if stage <= highest_stage(each["kind"])
    ]
    report = _report(ranks, tmp_path, "resume", 2, cases=cases)
    assert len(report) == len(cases) == 3 * len(OPTIMIZERS) - 2  # muon at stage 0 only
    assert all(report.values()), report


@pytest.mark.slow
def test_an_optimizer_of_ones_own_resumes_bitwise_on_any_stage(ranks, tmp_path):
    cases = [[stage, {}, {"kind": "lion"}] for stage in (0, 2, 3)]
    report = _report(ranks, tmp_path, "resume_lion", 2, cases=cases)
    assert len(report) == 3
    assert all(report.values()), report


@pytest.mark.slow
def test_a_run_is_not_continued_with_another_optimizer(ranks, tmp_path):
    train = {"packs_per_step": 2, "max_steps": 1, "dtype": "fp32"}
    run = {"run_dir": str(tmp_path / "run"), "train": train}
    job = "tests.zeta.trainer_jobs.train"
    ranks.run(job, 1, run)
    other = {**train, "max_steps": 2}
    optim = {"lr": 1e-3, "schedule": "constant", "kind": "sgd"}
    codes, outputs = ranks.start(job, 1, {**run, "train": other, "optim": optim})
    assert codes == [93]
    assert "has the state of AdamW, but optim.kind asks for SGD" in outputs[0]
