"""A run that begins at the weights of another: where they may lie, and what is refused."""

import pytest
import torch

from tests.zeta.training import tiny_navit
from zeta.checkpoint.directory import load_full_weights
from zeta.exit_codes import ExitCode
from zeta.export.saving import save_pretrained
from zeta.models.published.fitting import nearest_factors
from zeta.train.init_sources import open_weights

JOB = "tests.zeta.trainer_jobs.train"
ARGUMENTS = {"arch": "navit", "image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 16}
ARGUMENTS |= {"depth": 2, "heads": 2, "dim_head": 8, "mlp_dim": 32, "channels": 1}


def _run(run_dir, init_from=None, stage=2, model=None, **changes):
    train = {"packs_per_step": 2, "max_steps": 1, "zero_stage": stage, "dtype": "fp32"}
    train |= {"init_from": None if init_from is None else str(init_from)}
    train |= {"seed": (model or {}).get("seed", 0)}
    optim = {"lr": 0.0, "schedule": "constant"}  # the weights stay as they begin
    run = {"run_dir": str(run_dir), "train": train, "optim": optim, "model": model or {}}
    return run | changes


def _weights(run_dir):
    return load_full_weights(run_dir / "checkpoints" / "step_00000001")


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory):
    """A run of a model with seed 3, on 2 ranks at ZeRO-3, with its export beside it."""
    folder = tmp_path_factory.mktemp("trained")
    optim = {"lr": 0.1, "schedule": "constant"}
    ranks.run(JOB, 2, _run(folder / "run", stage=3, model={"seed": 3}, optim=optim))
    save_pretrained(folder / "export", _weights(folder / "run"), ARGUMENTS, {})
    save_pretrained(folder / "timm", _weights(folder / "run"), ARGUMENTS, form="timm")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("source", ["run", "run/checkpoints/step_00000001", "export"])
def test_a_run_begins_at_the_weights_of_a_run_a_checkpoint_or_an_export(
    ranks, tmp_path, trained, source, stage
):
    outputs = ranks.run(JOB, 2, _run(tmp_path / "new", trained / source, stage))
    expected, weights = _weights(trained / "run"), _weights(tmp_path / "new")
    assert set(weights) == set(expected)
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    assert f"initialised from {trained / source} (train.init_from)" in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_head_for_other_classes_keeps_its_initial_values_and_this_is_said(
    ranks, tmp_path, trained, stage
):
    other = {"num_classes": 7, "seed": 9}
    outputs = ranks.run(JOB, 2, _run(tmp_path / "new", trained / "run", stage, other))
    weights, fresh = _weights(tmp_path / "new"), tiny_navit(**other).state_dict()
    expected = _weights(trained / "run") | {n: v for n, v in fresh.items() if n.startswith("head.")}
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    kept = "except that head.weight and head.bias keep their initial values, as their shapes differ"
    assert kept in outputs[0]


@pytest.mark.slow
def test_a_run_begins_at_weights_of_timm(ranks, tmp_path, trained):
    outputs = ranks.run(JOB, 2, _run(tmp_path / "new", trained / "timm", stage=3))
    expected, weights = _weights(trained / "run"), _weights(tmp_path / "new")
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    assert f"initialised from {trained / 'timm'} (train.init_from)" in outputs[0]
    ranks.run(JOB, 1, _run(tmp_path / "grid", model={"position": "grid_bicubic"}))
    table = _weights(tmp_path / "grid")
    save_pretrained(tmp_path / "vit", table, ARGUMENTS | {"position": "grid_bicubic"}, form="timm")
    outputs = ranks.run(JOB, 2, _run(tmp_path / "near", tmp_path / "vit"))
    assert (
        "; its positions of a grid as the nearest sums of a row and a column, 100.0%" in outputs[0]
    )
    rows, columns, _ = nearest_factors(table["embeds.pos_embed"])
    near = _weights(tmp_path / "near")
    assert torch.equal(near["embeds.pos_embed_y"], rows)
    assert torch.equal(near["embeds.pos_embed_x"], columns)


@pytest.mark.slow
def test_a_run_that_has_a_checkpoint_goes_on_from_it(ranks, tmp_path, trained):
    ranks.run(JOB, 1, _run(tmp_path / "new"))
    outputs = ranks.run(JOB, 1, _run(tmp_path / "new", trained / "gone"))
    assert "continuing from step_00000001" in outputs[0]


@pytest.mark.slow
def test_what_cannot_be_begun_at_is_refused_on_every_rank_by_name(ranks, tmp_path, trained):
    refusals = {
        "is not a folder: give a run directory": (tmp_path / "absent", {}),
        "whose weights are of another model: attn_pool.kv.weight": (trained / "run", {"dim": 24}),
    }
    for message, (path, model) in refusals.items():
        codes, outputs = ranks.start(JOB, 2, _run(tmp_path / "new", path, model=model))
        assert codes == [ExitCode.NEVER_RESTART] * 2
        assert all(message in output and "train.init_from" in output for output in outputs)


@pytest.mark.slow
def test_damaged_weights_are_never_begun_at(ranks, tmp_path):
    ranks.run(JOB, 1, _run(tmp_path / "run"))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    victim = next((checkpoint / "zero").glob("*optim*"))
    victim.write_bytes(victim.read_bytes()[:-1])
    for path in (tmp_path / "run", checkpoint):
        with pytest.raises(ValueError, match="whole checkpoint"):
            open_weights(path, {})
