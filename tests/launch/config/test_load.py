"""What a config may say, what it resolves to, and what is said when it is wrong."""

from __future__ import annotations

import re

import pytest
import yaml

from launch.config.fields import config_fields
from launch.config.keys import has_key, parse_override
from launch.config.load import ZetaConfig, fixed_changes, load_config, to_yaml
from launch.config.other_names import OTHER_NAMES
from launch.shipped import configs_root, recipe_names
from zeta.train.schedule import build_schedule

SHARDS = "data.shards=shards/train"


def refusal(*arguments: str, recipe: str = "demo") -> str:
    try:
        load_config(recipe, [SHARDS, *arguments])
    except ValueError as error:
        return str(error)
    return pytest.fail(f"{arguments} for {recipe} was accepted")


def write(folder, text, name="mine.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_shipped_recipe_loads(recipe):
    config = load_config(recipe, [SHARDS])
    assert isinstance(config, ZetaConfig)
    assert config.run.name == recipe
    assert config.run.dir == f"runs/{recipe}"


def test_both_recipes_of_today_ship():
    assert {"demo", "navit_b16_classification"} <= set(recipe_names())


@pytest.mark.parametrize(
    "piece", sorted(str(p.relative_to(configs_root())) for p in configs_root().glob("*/*.yaml"))
)
def test_every_shipped_piece_holds_known_keys_of_the_right_type(tmp_path, piece):
    name = piece.removesuffix(".yaml")
    mine = write(tmp_path, f"include: [{name}]\ntrain: {{max_steps: 1000000}}\n")
    load_config(mine, [SHARDS])


def test_the_recipe_of_22_billion_weights_is_that_of_the_paper():
    """Dehghani et al. 2023, section 4.1; AdamW stands in for their Adafactor."""
    config = load_config("megavit_22b", [SHARDS])
    patches = (config.data.resolution.max // 14) ** 2
    assert patches == 256
    images = config.data.token_budget // (patches + 1)
    assert images == config.data.max_images_per_pack
    assert images * config.train.packs_per_step == 65_536
    assert config.train.max_steps == 177_000
    optim = config.optim
    assert (optim.schedule, optim.lr) == ("rsqrt", 1e-3)
    schedule = build_schedule(optim, config.train)
    assert (schedule.warmup, schedule.cooldown) == (10_000, 30_000)
    assert (optim.weight_decay, optim.head_weight_decay) == (0.03, 3.0)


def test_the_command_line_wins_over_the_file_and_the_file_over_its_includes(tmp_path):
    write(tmp_path, "train: {max_steps: 10, packs_per_step: 3}\noptim: {lr: 0.5}\n", "base.yaml")
    mine = write(tmp_path, "include: [base]\ntrain: {max_steps: 20}\noptim: {lr: 0.25}\n")
    config = load_config(mine, [SHARDS, "optim.lr=1e-3"])
    assert (config.train.packs_per_step, config.train.max_steps) == (3, 20)
    assert config.optim.lr == 1e-3
    assert config.optim.schedule == "cosine"  # the default of the dataclass


def test_later_includes_win_and_includes_may_include(tmp_path):
    write(tmp_path, "optim: {lr: 1}\ntrain: {max_steps: 5}\n", "deep.yaml")
    write(tmp_path, "include: [deep.yaml]\noptim: {lr: 2}\n", "first.yaml")
    write(tmp_path, "optim: {clip: 3}\n", "second.yaml")
    config = load_config(write(tmp_path, "include: [first, second]\n"), [SHARDS])
    assert (config.optim.lr, config.optim.clip, config.train.max_steps) == (2, 3, 5)


def test_a_name_of_quotes_spaces_and_dollars_is_taken_as_it_is():
    name = """it's "a" name $(touch x); `id` & : #1"""
    assert load_config("demo", [SHARDS, f"run.name={name}"]).run.name == name


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("shards/*.tar", "shards/*.tar"),
        ("*.tar", "*.tar"),
        ("{a,b}.tar", "{a,b}.tar"),
        ("/data/{0000..0009}.tar", "/data/{0000..0009}.tar"),
        ("[a, b/*.tar]", ["a", "b/*.tar"]),
    ],
)
def test_shards_may_be_globs_braces_and_lists(text, value):
    assert load_config("demo", [f"data.shards={text}"]).data.shards == value


@pytest.mark.parametrize(
    ("setting", "nearest"),
    [
        ("train.max_stpes=3", "train.max_steps"),
        ("data.resolution.mxa=3", "data.resolution.max"),
        ("train.lr=3", "optim.lr"),
        ("lr=3", "optim.lr"),
        ("tracker.wandb.projct=x", "tracker.wandb.project"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_one(tmp_path, setting, nearest):
    key, _, value = setting.partition("=")
    said = refusal(setting)
    assert key in said
    assert f"did you mean {nearest}?" in said
    tree = value
    for part in reversed(key.split(".")):
        tree = f"{{{part}: {tree}}}"
    path = write(tmp_path, tree)
    said = refusal(recipe=path)
    assert key in said
    assert path in said
    assert f"did you mean {nearest}?" in said


def test_a_key_that_resembles_nothing_is_refused_with_what_there_is():
    assert "has packs_per_step, max_steps" in refusal("train.zzz=1")
    assert "has run, data, model" in refusal("zzz=1")
    assert "the nearest is optim.betas" in refusal("optimizer.betas1=1")


def test_world_size_is_no_config_key():
    assert "unknown config key train.world_size" in refusal("train.world_size=8")


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("train.packs_per_step=many", ("train.packs_per_step", "'many'", "whole number")),
        ("train.packs_per_step=1.5", ("train.packs_per_step", "1.5", "whole number")),
        ("train.packs_per_step=null", ("train.packs_per_step", "None", "whole number")),
        ("optim.lr=fast", ("optim.lr", "'fast'", "a number")),
        ("optim.betas=[0.9]", ("optim.betas", "[0.9]", "a list of 2")),
        ("train.max_steps=ten", ("train.max_steps", "'ten'", "whole number or null")),
    ],
)
def test_a_wrong_type_is_refused_with_key_value_and_type(setting, parts):
    said = refusal(setting)
    assert all(part in said for part in parts), said


def test_a_wrong_type_in_a_file_names_the_file(tmp_path):
    path = write(tmp_path, "optim: {lr: [1, 2]}")
    assert path in refusal(recipe=path)


@pytest.mark.parametrize("setting", ["train", "=3", "--lr"])
def test_a_setting_without_equals_is_refused_with_an_example(setting):
    said = refusal(setting)
    assert repr(setting) in said
    assert "key=value" in said


def test_a_section_cannot_be_a_value(tmp_path):
    assert "train is a section" in refusal("train=3")
    assert "train is a section" in refusal(recipe=write(tmp_path, "train: 3\n"))


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("train.zero_stage=4", "train.zero_stage is 4"),
        ("train.attention=flash", "train.attention is 'flash'; choose one of auto, dense"),
        ("objective.kind=hinge", "objective.kind is 'hinge'"),
        ("optim.lr=nan", "optim.lr is nan"),
        ("optim.lr=inf", "optim.lr is inf; it must be at least 0 and finite"),
        ("optim.betas=[0.9,2.0]", "optim.betas[1] is 2"),
        ("optim.betas=[-0.1,0.9]", "optim.betas[0] is -0.1"),
        ("data.resolution.max=8", "max is 8, below data.resolution.min, which is"),
        ("model.patch_size=0", "model.patch_size is 0"),
        ("model.heads=0", "model.heads is 0"),
        ("model.registers=-1", "model.registers is -1"),
        ("model.dropout=1", "model.dropout is 1"),
        ("model.channels=1", "model.channels is 1, but images are read as RGB"),
        ("run.name=a/b", "run.name is 'a/b'"),
        ("run.name=", "run.name"),
        ("run.dir=", "run.dir is None"),
        ("run.name=${nowhere}", "run.name"),
    ],
)
def test_values_outside_their_range_are_refused_by_name(setting, part):
    assert part in refusal(setting)


def test_sections_that_contradict_each_other_are_refused():
    assert "train.max_steps = 50" in refusal("train.max_steps=50", "optim.warmup_steps=50")
    assert "train.max_epochs" in refusal("train.max_steps=null")
    epochs = ("train.max_steps=null", "train.max_epochs=3")
    tokens = ("train.max_steps=null", "train.max_tokens=1e6")
    assert "optim.schedule = cosine needs the end of the run" in refusal(
        "optim.schedule=cosine", *tokens
    )
    cooldown = ("optim.schedule=constant", "optim.cooldown_steps=5", *tokens)
    assert "optim.cooldown_steps needs the end of the run" in refusal(*cooldown)
    shares = ("optim.schedule=constant", *tokens)
    assert (
        "optim.warmup_share needs the end of the run; set train.max_steps, or optim.warmup_steps"
        in refusal(*shares)
    )
    load_config("demo", [SHARDS, *shares, "optim.warmup_steps=5"])
    for settings in (cooldown, shares, ("optim.schedule=cosine",)):  # the shards say how long it is
        load_config("demo", [SHARDS, *settings, "train.max_tokens=null", *epochs])
    assert "optim.warmup_steps" in refusal("optim.schedule=rsqrt", "optim.warmup_steps=0")
    with pytest.raises(ValueError, match=r"data\.shards is not set"):
        load_config("navit_b16_classification")


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_name_of_other_libraries_is_answered_with_a_setting_that_exists(name):
    said = refusal(f"train.{name}=4")
    assert said.startswith(f"unknown config key train.{name} (on the command line): ")
    keys = re.findall(r"\b(?:train|data|optim|model|objective)\.[\w.]+\w", said)[1:]
    assert keys
    assert all(has_key(ZetaConfig, key) for key in keys)


@pytest.mark.parametrize("section", ["data.local.augment", "data.local"])
def test_a_setting_of_another_section_is_answered_in_the_section_that_was_typed(section):
    said = refusal(f"{section}.randaugment=1")
    assert "that is data.local.augment.rand_augment.layers, and data.local.augment.rand" in said
    assert refusal(f"{section}.hflip=true").endswith("that is data.local.augment.flip")
    assert "did you mean data.local.drop.rate?" in refusal(f"{section}.rate=1")
    assert refusal("data.hflip=true").endswith("that is data.augment.flip")
    assert "did you mean data.drop.rate?" in refusal("data.augment.rate=1")


def test_no_message_names_a_key_that_does_not_exist():
    keys = {item.key for item in config_fields()}
    sections = {key.rpartition(".")[0] for key in keys if "." in key}
    assert "data.augment.rand_augment" in sections
    for section in sections:
        with pytest.raises(ValueError, match="is a section, but") as refused:
            parse_override(f"{section}=1", ZetaConfig)
        example = re.search(r"set its keys, such as ([\w.]+)$", str(refused.value))
        assert example is not None
        assert example[1] in keys | sections
        if f"{section}.place" not in keys:  # the dataclass may have it, as no field
            with pytest.raises(
                ValueError, match=f"^unknown config key {section}.place "
            ) as refused:
                parse_override(f"{section}.place=x", ZetaConfig)
            assert not re.search(r"\bplace\b", str(refused.value).partition(")")[2])


def test_no_setting_has_a_name_that_is_said_to_be_another():
    endings = {item.key.rpartition(".")[2] for item in config_fields()}
    assert not endings & OTHER_NAMES.keys()


def test_a_missing_config_is_refused_with_the_shipped_names(tmp_path):
    for name in ("dmeo", str(tmp_path / "none.yaml"), str(tmp_path)):
        said = refusal(recipe=name)
        assert ", ".join(recipe_names()) in said


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train: [1, 2", "not valid YAML"),
        ("optim: {lr: 1, lr: 2}", "not valid YAML"),
        ("- 1\n- 2\n", "must hold sections"),
        ("include: nothing/here\n", "must be a list"),
        ("include: [nothing/here]\n", "model/digits"),
        ("include: [mine]\n", "in a circle"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, part):
    path = write(tmp_path, text)
    said = refusal(recipe=path)
    assert path in said
    assert part in said


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert str(path) in refusal(recipe=str(path))


def test_the_resolved_config_reads_back_the_same(tmp_path):
    config = load_config("demo", ["data.shards=[a, 'b c']", "run.name=x: y", "optim.lr=1e-7"])
    again = load_config(write(tmp_path, to_yaml(config)))
    assert again == config
    assert fixed_changes(to_yaml(config), again) == []


def test_a_resume_may_change_free_fields_and_is_told_of_fixed_ones():
    before = to_yaml(load_config("demo", [SHARDS]))
    free = [
        "run.name=other",
        "tracker.wandb.mode=disabled",
        "data.workers=3",
        "train.max_steps=999",
        "train.attention=sdpa_segments",
    ]
    assert fixed_changes(before, load_config("demo", [SHARDS, *free])) == []
    fixed = ["optim.lr=1", "data.resolution.max=64", "data.shards=elsewhere", "data.workers=3"]
    assert fixed_changes(before, load_config("demo", [*fixed, "train.seed=1"])) == [
        ("data.resolution.max", 96, 64),
        ("train.seed", 0, 1),
        ("optim.lr", 0.002, 1.0),
    ]


def test_a_large_whole_number_may_be_written_in_scientific_notation(tmp_path):
    for config in (
        load_config("demo", [SHARDS, "train.max_images=4e9"]),
        load_config(write(tmp_path, "include: [demo]\ntrain: {max_images: 4e9}\n"), [SHARDS]),
    ):
        assert config.train.max_images == 4_000_000_000
    for value in ("4.5", "4e-1", "inf", "many"):
        assert "train.max_images" in refusal(f"train.max_images={value}")


def test_deepspeed_settings_may_be_set_whole_or_one_by_one(tmp_path):
    zero = {"offload_optimizer": {"device": "cpu", "pin_memory": False}, "reduce_bucket_size": 1000}
    mine = "include: [demo]\ntrain: {deepspeed: {zero_optimization: {reduce_bucket_size: 1000}}}\n"
    one_by_one = [
        "train.deepspeed.zero_optimization.offload_optimizer.device=cpu",
        "train.deepspeed.zero_optimization.offload_optimizer.pin_memory=false",
    ]
    config = load_config(write(tmp_path, mine), [SHARDS, *one_by_one])
    assert config.train.deepspeed == {"zero_optimization": zero}
    text = "train.deepspeed={zero_optimization: {reduce_bucket_size: 5}}"
    again = load_config("demo", [SHARDS, text])
    assert again.train.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5}}
    assert fixed_changes(to_yaml(config), again) == []
    assert load_config(write(tmp_path, to_yaml(config))) == config
    assert "decided by optim.clip" in refusal("train.deepspeed.gradient_clipping=1.0")
    assert "train.deepspeed is 3" in refusal("train.deepspeed=3")


def test_an_optimizer_under_deepspeed_is_read_as_the_optimizer_that_it_was(tmp_path):
    old = "optimizer: {type: SGD, params: {momentum: 0.9}}"
    mine = f"include: [demo]\ntrain: {{deepspeed: {{disable_allgather: true, {old}}}}}\n"
    config = load_config(write(tmp_path, mine), [SHARDS])
    assert (config.optim.kind, config.optim.params) == ("sgd", {"momentum": 0.9})
    assert config.train.deepspeed == {"disable_allgather": True}
    typed = ["train.deepspeed.optimizer.type=Adam", "train.deepspeed.optimizer.params.eps=1e-5"]
    config = load_config("demo", [SHARDS, *typed])
    assert (config.optim.kind, config.optim.params) == ("adam", {"eps": 1e-5})
    assert "optim.kind is 'lamb'; choose one of" in refusal("train.deepspeed.optimizer.type=Lamb")
    assert "optimizer.typo" in refusal("train.deepspeed.optimizer.typo=Lamb")


def test_an_old_run_with_an_optimizer_under_deepspeed_resumes_under_either_spelling():
    now = load_config("demo", [SHARDS, "optim.kind=sgd", "optim.params={momentum: 0.9}"])
    tree = yaml.safe_load(to_yaml(now))
    del tree["optim"]["kind"], tree["optim"]["params"]
    tree["train"]["deepspeed"] = {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}
    old_yaml = yaml.safe_dump(tree)
    assert fixed_changes(old_yaml, now) == []
    adam = load_config("demo", [SHARDS])
    assert fixed_changes(old_yaml, adam) == [("optim.kind", "sgd", "adamw")]


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 20_000])
def test_every_recipe_holds_for_any_number_of_steps(recipe, steps):
    config = load_config(recipe, [SHARDS, f"train.max_steps={steps}"])
    schedule = build_schedule(config.optim, config.train)
    assert 1 <= schedule.warmup <= max(1, steps // 4)
    assert schedule.rate(0, 1) > 0


def test_a_run_that_counted_its_warmup_continues_under_a_share_of_the_same_length():
    share = load_config("demo", [SHARDS])
    count = load_config("demo", [SHARDS, "optim.warmup_share=0", "optim.warmup_steps=100"])
    assert fixed_changes(to_yaml(count), share) == []
    old = "\n".join(line for line in to_yaml(count).splitlines() if "_share" not in line)
    for ramp in ("warmup_images", "warmup_tokens", "cooldown_images", "cooldown_tokens"):
        old = old.replace(f"{ramp}: null", f"{ramp}: 0")
    assert "warmup_images: 0" in old
    assert fixed_changes(old, share) == []
    other = load_config("demo", [SHARDS, "optim.warmup_share=0.2"])
    assert ("optim.warmup_share", 0.1, 0.2) in fixed_changes(to_yaml(share), other)
    assert ("optim.warmup_steps", 100, None) in fixed_changes(to_yaml(count), other)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ([], "demo"),
        (["run.dir=runs/second"], "second"),
        (["run.dir=/data/runs/third/"], "third"),
        (["run.dir=runs/second", "run.name=mine"], "mine"),
        (["run.dir=runs/${run.name}-2"], "demo"),
        (["run.dir=runs/.."], "demo"),
    ],
)
def test_a_run_is_called_after_its_directory_or_else_after_its_recipe(settings, name):
    assert load_config("demo", [SHARDS, *settings]).run.name == name


def test_a_run_is_called_after_the_directory_that_its_file_names(tmp_path):
    write(tmp_path, "include: [demo]\nrun: {dir: runs/fourth}\n", "recipe.yaml")
    assert load_config(str(tmp_path / "recipe.yaml"), [SHARDS]).run.name == "fourth"


def test_a_run_that_is_older_than_a_field_ran_under_its_default():
    now = load_config("demo", [SHARDS])
    old = "\n".join(line for line in to_yaml(now).splitlines() if "schedule_by" not in line)
    assert fixed_changes(old, now) == []
    changed = load_config(
        "demo", [SHARDS, "optim.schedule_by=images", "optim.warmup_steps=0", "train.max_images=4e6"]
    )
    assert ("optim.schedule_by", "steps", "images") in fixed_changes(old, changed)
