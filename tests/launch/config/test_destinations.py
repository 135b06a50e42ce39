"""A run that starts keeps what it makes where its config says, or is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import entry_point
from launch.config.destinations import check_destinations, run_directory
from launch.config.load import load_config
from zeta.exit_codes import ExitCode

SHARDS = "data.shards=shards/train"


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("run.dir=s3://bucket/run", "run.dir is 's3://bucket/run', a URL"),
        ("run.dir=gs://b/${run.name}", "run.dir is 'gs://b/demo', a URL"),
        ("run.dir=file:///tmp/run", "a URL"),
        ("run.dir=$SCRATCH/run", r"\$SCRATCH is not expanded here"),
        ("run.dir=/data/$USER/run", r"\$USER is not expanded"),
        ("run.dir=~no-such-user/run", "the home folder of ~no-such-user is not known"),
        ("run.dir=runs/b\udce9te", r"run.dir is 'runs/b\\udce9te', which is not valid UTF-8"),
        ("run.name=b\udce9te", "run.(name|dir) is .*, which is not valid UTF-8"),
        ("data.cache_dir=$TMPDIR/cache", r"data.cache_dir is '\$TMPDIR/cache'"),
        (
            "tracker.wandb.project=my-team/vision",
            "set tracker.wandb.entity=my-team tracker.wandb.project=vision",
        ),
        ("tracker.wandb.project=my:proj", "which W&B refuses for its :"),
        ("tracker.wandb.project=a#b", "refuses for its #"),
        ("tracker.wandb.project=a?b", "refuses for its"),
        ("tracker.wandb.project=a%b", "refuses for its %"),
        ("tracker.wandb.project=a\\b", "refuses for its"),
        ("tracker.wandb.project=a/b/c", "choose a name of letters"),
        (f"tracker.wandb.project={'x' * 129}", "has 129 characters; W&B takes 128"),
        ("tracker.wandb.entity=team/vision", "tracker.wandb.entity is 'team/vision'"),
        (f"tracker.wandb.job_type={'x' * 65}", "W&B takes 64"),
    ],
)
def test_what_would_be_lost_is_refused_with_what_to_type(tmp_path, monkeypatch, setting, part):
    monkeypatch.chdir(tmp_path)
    config = load_config("demo", [SHARDS, setting])
    with pytest.raises(ValueError, match=part):
        check_destinations(config)


@pytest.mark.parametrize("setting", ["run.dir=s3://b/run", "tracker.wandb.project=my-team/vision"])
def test_training_ends_with_93_before_anything_is_written(tmp_path, monkeypatch, capsys, setting):
    monkeypatch.chdir(tmp_path)
    for command in (["train"], ["launch", "local", "--nproc", "2"], ["launch", "check"]):
        assert entry_point([*command, "demo", SHARDS, setting]) == ExitCode.NEVER_RESTART
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert setting.partition("=")[0] in said
    assert list(tmp_path.iterdir()) == []


def test_a_project_of_a_run_that_is_not_tracked_may_be_anything():
    settings = ["tracker.wandb.mode=disabled", "tracker.wandb.project=my-team/vision"]
    check_destinations(load_config("demo", [SHARDS, *settings]))


def test_the_home_of_a_user_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config("demo", [SHARDS, "run.dir=~/runs/a"])
    assert run_directory(config).path == tmp_path / "runs" / "a"


def test_a_folder_with_a_dollar_in_its_name_can_be_used_where_it_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a$b").mkdir()
    assert run_directory(load_config("demo", [SHARDS, "run.dir=a$b"])).path == Path("a$b")


OUTPUTS = [
    ["shards", "build", "photos"],
    ["export", "run"],
    ["embed", "export", "shards"],
    ["eval", "export", "shards", "--csv"],
    ["eval", "export", "shards", "--plot"],
    ["report", "run", "--out"],
    ["demo", "--out"],
    ["experiment", "--out"],
]


@pytest.mark.parametrize("command", OUTPUTS, ids=[" ".join(words) for words in OUTPUTS])
@pytest.mark.parametrize("out", ["s3://bucket/out", "gs://b/x.png", "$SCRATCH/out", "file:///o"])
def test_every_command_refuses_an_output_that_is_no_path(
    tmp_path, monkeypatch, capsys, command, out
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        entry_point([*command, out])
    assert ended.value.code == 2
    assert out in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_shards_are_built_in_the_home_folder_that_a_tilde_names(tmp_path, monkeypatch, capsys):
    from PIL import Image

    home, work = tmp_path / "home", tmp_path / "work"
    (home / "photos" / "cat").mkdir(parents=True)
    work.mkdir()
    Image.new("RGB", (32, 24)).save(home / "photos" / "cat" / "a.png")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    assert entry_point(["shards", "build", "~/photos", "~/made", "--workers", "1"]) == 0
    assert (home / "made" / "shard-000000.tar").is_file()
    assert list(work.iterdir()) == []
