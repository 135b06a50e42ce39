"""A distillation that cannot work is refused by name; the memory of one that can is predicted."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from itertools import islice

import pytest
import torch

from data_pipeline.shards.build import build_shards
from launch.cli import entry_point
from launch.config.load import load_config, to_yaml
from launch.config.resolve import completed, resolve_with_shards, training_plan
from launch.run.checks import abstract_model, check_resume, check_start
from launch.run.execution import costliest_pack, run_memory
from tests.data_pipeline.shard_fixtures import jpeg
from tests.launch.tiny_export import MODEL, write_export
from zeta.exit_codes import RunError
from zeta.export.saving import save_pretrained
from zeta.models.config import ModelConfig, build_model
from zeta.models.flops import linear_weights
from zeta.objectives import build_objective
from zeta.objectives.teacher import check_finite, load_teacher, outline_teacher
from zeta.run.directory import RunDir
from zeta.train.memory_model import activation_memory, sum_of_outputs
from zeta.train.resume import check_alike, check_same_facts

KIND = ("objective.kind=distill", "objective.label_smoothing=0")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    build_shards([(f"s{i}", {"jpg": jpeg(40, 40, i)}) for i in range(4)], folder / "shards")
    write_export(folder / "teacher", ["a"], patch_size=12, dim=24, pool="cls")
    return folder


def config(world, *settings, teacher="teacher", kind=KIND):
    given = [] if teacher is None else [f"objective.distill.teacher={world / teacher}"]
    shards = f"data.shards={world / 'shards'}"
    run = f"run.dir={world / 'run'}"
    return load_config("demo", [shards, run, *kind, "data.drop.keep=true", *given, *settings])


def changed_export(world, name, **changes):
    arguments = ModelConfig(**(MODEL | {"num_classes": 1} | changes))
    weights = build_model(arguments).state_dict()
    save_pretrained(world / name, weights, arguments.resolve(), {"objective": "softmax"})
    return world / name


def test_the_width_of_the_teacher_completes_the_config(world):
    checked = check_start(config(world), 1)
    assert checked.config.objective.distill.dim == 24
    assert checked.config.model.num_classes == 1


def test_a_plan_needs_no_teacher(world):
    from data_pipeline.shards.weighted import open_shards

    resolve_with_shards(config(world, teacher=None), open_shards(str(world / "shards")))


def test_launch_check_refuses_a_run_without_a_teacher(world, capsys):
    settings = [f"data.shards={world / 'shards'}", f"run.dir={world / 'run'}"]
    assert entry_point(["launch", "check", "navit_b16_distill", *settings]) == 93
    assert "objective.distill.teacher is not set: give the folder" in capsys.readouterr().err
    # Like shards, the teacher is read when the run starts, which may be on another machine.
    named = f"objective.distill.teacher={world / 'not_here_yet'}"
    assert entry_point(["launch", "check", "navit_b16_distill", named, *settings]) == 0
    assert str(world / "run") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (None, r"objective\.distill\.teacher is not set: give the folder of the model"),
        (
            "facebook/dinov2-small",
            r"teacher is .*facebook/dinov2-small, which cannot be read: .* does not exist; give a "
            r"folder that `zeta export` or `zeta import` wrote, or one of transformers or timm \(a "
            r"model of a hub must be downloaded into a folder first\)",
        ),
        ("shards", r"teacher is .*shards, which cannot be read: .* is not an export"),
    ],
)
def test_a_teacher_that_is_not_there_is_refused(world, teacher, message):
    with pytest.raises(ValueError, match=message):
        completed(config(world, teacher=teacher))


def test_a_broken_teacher_is_refused(world):
    broken = shutil.copytree(world / "teacher", world / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"teacher is .*broken, which cannot be used: .*missing"):
        completed(config(world, teacher="broken"))


def test_a_teacher_of_other_channels_is_refused(world):
    changed_export(world, "grey", channels=1)
    with pytest.raises(ValueError, match=r"takes images of 1 channels, but images are read as RGB"):
        completed(config(world, teacher="grey"))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_teacher_by_whose_std_no_pixel_is_normalised_is_refused(world, value):
    arguments = ModelConfig(**(MODEL | {"num_classes": 1}))
    weights = build_model(arguments).state_dict()
    weights["std"] = torch.full((3,), value)
    folder = world / f"std_{value}"
    save_pretrained(folder, weights, arguments.resolve(), {"objective": "softmax"})
    with pytest.raises(ValueError, match=r"its std is .*, by which no pixel is normalised"):
        completed(config(world, teacher=folder.name))


def test_a_teacher_of_one_size_is_refused_for_images_of_any_shape(world):
    changed_export(world, "one_size", arch="megavit", pool="cls")
    with pytest.raises(ValueError, match=r"takes squares only, .* set data\.resolution\.fit=crop"):
        completed(config(world, teacher="one_size"))
    squares = config(world, "data.resolution.fit=crop", teacher="one_size")
    assert completed(squares).objective.distill.dim == MODEL["dim"]


def test_a_teacher_with_values_that_are_not_finite_is_refused(world):
    arguments = ModelConfig(**(MODEL | {"num_classes": 1}))
    weights = build_model(arguments).state_dict()
    weights["blocks.1.attn.qkv.weight"][0, 0] = float("inf")
    save_pretrained(world / "inf", weights, arguments.resolve(), {"objective": "softmax"})
    with pytest.raises(ValueError, match=r"whose weight blocks\.1\.attn\.qkv\.weight holds NaN"):
        load_teacher(str(world / "inf"))


def overflowing(world, name, change):
    """A teacher whose weights are finite, with one of them changed."""
    arguments = ModelConfig(**(MODEL | {"num_classes": 1}))
    weights = build_model(arguments, seed=3).state_dict()
    change(weights)
    folder = world / name
    save_pretrained(folder, weights, arguments.resolve(), {"objective": "softmax"})
    return folder


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", lambda weights: weights["blocks.1.attn.qkv.weight"].fill_(3e38)),
        ("std", lambda weights: weights["std"].fill_(1e-30)),
    ],
)
def test_a_teacher_whose_outputs_are_not_finite_is_refused_before_the_first_step(
    world, tmp_path, name, change, dtype
):
    folder = overflowing(tmp_path, name, change)
    outline_teacher(str(folder))  # each of its values is finite, and std above 0
    run = config(world, teacher=folder)
    objective = build_objective(run.objective, 1)
    message = f"teacher is {folder}, whose pooled embeddings and features of a grey image and of n"
    with pytest.raises(ValueError, match=re.escape(message)):
        objective.place(torch.device("cpu"), dtype)


def test_outputs_of_a_teacher_that_nothing_is_learned_from_may_be_anything(world, tmp_path):
    folder = overflowing(tmp_path, "pooling", lambda weights: None)
    teacher, _ = load_teacher(str(folder))
    check_finite(teacher, str(folder), pooled=True, tokens=True)
    for name, value in teacher.encoder.named_parameters():
        if name.startswith("attn_pool"):
            value.data.fill_(3e38)
    check_finite(teacher, str(folder), pooled=False, tokens=True)
    with pytest.raises(ValueError, match="whose pooled embeddings of a grey image"):
        check_finite(teacher, str(folder), pooled=True, tokens=True)


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("softmax", "objective.kind=softmax+distill (or distill)"),
        ("clip", "objective.kind=clip+distill (or distill)"),
        ("lejepa", "objective.kind=distill,"),
    ],
)
def test_a_teacher_that_nothing_would_learn_from_is_refused(world, kind, remedy):
    with pytest.raises(ValueError, match=re.escape(remedy)):
        config(world, f"objective.kind={kind}")
    config(world, f"objective.kind={kind}", teacher=None)
    if kind != "lejepa":
        config(world, f"objective.kind={kind}+distill")


def test_an_objective_of_ones_own_may_learn_from_the_teacher(world):
    config(world, "objective.kind=tests.zeta.foreign_objective:Brightness")


def test_nothing_to_learn_is_refused(world):
    weights = ("objective.distill.pooled=0", "objective.distill.tokens=0")
    with pytest.raises(ValueError, match=r"pooled and objective\.distill\.tokens are both 0"):
        config(world, *weights)


def test_a_factor_without_another_objective_is_refused_with_what_to_set(world):
    with pytest.raises(
        ValueError, match=r"distill\.weight is 3, .* set objective\.distill\.pooled"
    ):
        config(world, "objective.distill.weight=3")
    config(world, "objective.distill.weight=1")
    config(world, "objective.distill.weight=3", "objective.kind=softmax+distill")


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "siglip", "clip"])
def test_a_teacher_that_counts_for_nothing_is_refused(world, kind):
    settings = (f"objective.kind={kind}+distill", "objective.distill.weight=0")
    with pytest.raises(ValueError, match=r"weight is 0, .*set it above 0, or .* without \+distill"):
        config(world, *settings)


def test_a_pooling_that_nothing_would_train_is_refused(world):
    settings = ("objective.distill.pooled=0",)
    with pytest.raises(ValueError, match=r"nothing would train attn_pool .* model\.pool=mean"):
        check_start(config(world, *settings), 1)
    check_start(config(world, *settings, "model.pool=mean"), 1)


@pytest.mark.parametrize("place", ["data.drop", "data.local.drop"])
def test_dropped_patches_that_stay_in_the_loader_are_refused(world, place):
    settings = {
        "data.drop": ["data.drop.keep=false"],
        "data.local.drop": ["data.local.views=1", "data.local.drop.kind=constant"],
    }
    match = re.escape(f"set {place}.keep=true, or {place}.kind=none")
    with pytest.raises(ValueError, match=match):
        check_start(config(world, *settings[place]), 1)
    check_start(config(world, *settings[place], f"{place}.kind=none"), 1)


def test_another_teacher_is_refused_on_resume_and_on_another_rank(world):
    facts = {"objective.distill.teacher": "a" * 64}
    check_same_facts({}, facts, "step")
    check_same_facts(facts, facts, "step")
    other = {"objective.distill.teacher": "b" * 64}
    with pytest.raises(RunError, match=r"is not what the run in step learned from"):
        check_same_facts(other, facts, "step")
    check_alike([facts, facts])
    with pytest.raises(RunError, match=r"is another model on rank 1 than on rank 0"):
        check_alike([facts, other])


def test_a_teacher_of_another_width_is_refused_on_resume_by_its_own_name(world):
    write_export(world / "wider", ["a"], dim=32)
    began, run = check_start(config(world), 1).config, world / "resumed"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(began))
    own = f"run.dir={run}"
    check_start(config(world, own), 1)
    changed = re.escape(f"objective.distill.teacher is {world / 'wider'}, ")
    with pytest.raises(ValueError, match=changed + r"with objective\.distill\.dim 32; it was 24\."):
        check_start(config(world, own, teacher="wider"), 1)
    saved = [f"objective.distill.teacher={world / 'wider'}"]
    with pytest.raises(ValueError, match=changed + r"which has 32 channels, but .* is 24, that of"):
        check_start(load_config(str(run / "config.yaml"), saved), 1)


def test_a_tokenizer_of_other_words_is_refused_on_resume_by_its_own_name(world):
    before, after = (config(world, f"objective.text.vocab_size={size}") for size in (256, 300))
    run = world / "words"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(before))
    message = r"data\.text\.tokenizer is bytes, with objective\.text\.vocab_size 300; it was 256\."
    with pytest.raises(ValueError, match=message):
        check_resume(RunDir(run), after)


def test_the_digest_is_of_the_weights_and_not_of_where_they_lie(world):
    moved = shutil.copytree(world / "teacher", world / "moved")
    _, digest = load_teacher(str(world / "teacher"))
    assert load_teacher(str(moved))[1] == digest
    model, _ = load_teacher(str(moved))
    state = model.encoder.state_dict()
    state["blocks.0.attn.qkv.weight"][0, 0] += 1e-3
    arguments = json.loads((moved / "config.json").read_text())["model"]
    save_pretrained(world / "nearly", state, arguments, {"objective": "softmax"})
    assert load_teacher(str(world / "nearly"))[1] != digest


@pytest.mark.parametrize(("dtype", "least"), [("fp32", 4), ("bf16", 2)])
def test_the_memory_of_the_teacher_is_counted(world, dtype, least):
    checked = check_start(config(world, f"train.dtype={dtype}"), 1)
    teacher, _ = load_teacher(str(world / "teacher"))
    weights = sum(p.numel() for p in teacher.parameters())
    pack = costliest_pack(checked)
    memory = run_memory(checked, pack)
    alone = activation_memory(abstract_model(checked.config), pack, sum_of_outputs, dtype)
    targets = 4 * 24 * (len(pack.patches) + len(pack.weights))  # live until the backward pass
    assert memory.activations.peak >= alone.peak + targets
    assert least * weights <= memory.beside <= 4 * weights
    without = run_memory(checked, None)
    assert memory.states(checked.config.train, 0, 1) == without.states(checked.config.train, 0, 1)
    assert memory.states(checked.config.train, 0, 1) > memory.beside + 16 * sum(memory.sizes)


def test_the_operations_of_the_teacher_are_those_of_a_forward_pass_on_whole_images(world):
    checked = check_start(config(world), 1)
    pack, model = costliest_pack(checked), abstract_model(checked.config)
    encoder = load_teacher(str(world / "teacher"))[0].encoder
    own = model.image.training_flops(pack) + model.maps.training_flops(pack)
    side, expected = checked.plan.patch_size, 0.0
    for (h, w), length in zip(pack.grids.tolist(), pack.lengths, strict=False):
        if length:
            rows, columns = (max(1, round(n * side / 12)) for n in (h, w))
            tokens = rows * columns + 1
            per_token = linear_weights(encoder.embeds) + linear_weights(encoder.blocks)
            expected += 2 * per_token * tokens + 4 * 24 * MODEL["depth"] * tokens**2
            expected += 2 * linear_weights(encoder.head)
    assert model.training_flops(pack) - own == pytest.approx(expected)


def test_a_folder_of_timm_without_weights_is_refused_by_what_it_lacks(world):
    folder = world / "of_timm"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224"}))
    with pytest.raises(
        ValueError, match=r"of_timm, which cannot be read: .*it lacks model.safetens"
    ):
        completed(config(world, teacher="of_timm"))


def test_dropped_patches_that_nobody_looks_at_are_refused(world):
    settings = ("data.drop.keep=true", "data.drop.kind=constant")
    unused = config(world, *settings, teacher=None, kind=("objective.kind=lejepa", KIND[1]))
    message = r"lejepa does not look at dropped patches: set data\.drop\.keep=false"
    with pytest.raises(ValueError, match=message):
        check_start(replace(unused, data=replace(unused.data, views=2)), 1)


RISING = (
    *("data.drop.kind=beta", "data.drop.max=0.9", "data.drop.schedule.kind=sigmoid"),
    *("data.drop.schedule.low=0.1", "data.drop.schedule.high=0.7"),
    *("data.drop.schedule.middle=1e6", "data.drop.schedule.width=1e5"),
)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("costliest")
    sides = [(16 + 8 * (i % 9), 16 + 8 * (i % 5)) for i in range(240)]
    images = [(f"s{i}", {"jpg": jpeg(*size, i)}) for i, size in enumerate(sides)]
    build_shards(images, folder / "shards")
    write_export(folder / "teacher", ["a"], patch_size=12, dim=24, pool="cls")
    return folder


def checked_many(many, *settings):
    fixed = (
        *(f"data.shards={many / 'shards'}", f"run.dir={many / 'run'}", "train.packs_per_step=2"),
        *("objective.kind=distill", "objective.label_smoothing=0", "data.drop.keep=true"),
        *("data.token_budget=256", "data.resolution.kind=native", "data.resolution.max=96"),
        f"objective.distill.teacher={many / 'teacher'}",
    )
    return check_start(load_config("demo", [*fixed, *settings]), 1)


def late_packs(run, most=60):
    """The first packs of a lane as they are where the schedule has risen."""
    drop = run.config.data.drop
    high = replace(drop, schedule=replace(drop.schedule, middle=-1e9))
    plan = training_plan(
        replace(run.config, data=replace(run.config.data, drop=high)), run.manifest
    )
    return list(islice(plan.lane(0), most))


def whole_patches(batch):
    return batch.num_tokens - batch.prefix_tokens * batch.num_images + len(batch.dropped_patches)


def test_the_pack_is_one_of_the_time_when_most_patches_are_dropped(many):
    run = checked_many(many, *RISING)
    late = [int((pack.rows * pack.columns).sum()) for pack in late_packs(run)]
    early = [int((pack.rows * pack.columns).sum()) for pack in islice(run.plan.lane(0), 60)]
    assert whole_patches(costliest_pack(run)) >= max(late) > max(early)


def test_the_predicted_memory_grows_with_the_highest_rate_that_comes(many):
    rising = run_memory(run := checked_many(many, *RISING), costliest_pack(run)).activations.peak
    level = ("data.drop.schedule.kind=none", "data.drop.rate=0.1")
    still = run_memory(run := checked_many(many, *RISING, *level), costliest_pack(run))
    assert rising > 1.05 * still.activations.peak
