"""Whether a run goes to W&B, under which id, and where it is shown."""

import pytest

from zeta.tracking.config import WandbConfig
from zeta.tracking.wandb_mode import resolve_mode, run_page, stable_run_id


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": ""}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_DISABLED": "true"}, "disabled"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "offline"),
        ("online", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "online"),
        ("online", {}, "offline"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_online_only_with_a_key_so_that_nobody_is_asked_for_one(
    tmp_path, mode, environment, expected
):
    environment = {"NETRC": str(tmp_path / "none"), **environment}
    assert resolve_mode(mode, environment) == expected


@pytest.mark.parametrize(
    ("host", "environment", "expected"),
    [
        ("api.wandb.ai", {}, "online"),
        ("wandb.lab", {}, "offline"),
        ("wandb.lab", {"WANDB_BASE_URL": "https://wandb.lab"}, "online"),
        ("wandb.lab", {"WANDB_CONFIG_DIR": "."}, "online"),
    ],
)
def test_a_key_in_netrc_counts_for_its_server(tmp_path, monkeypatch, host, environment, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.lab\n")
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {host}\n  login user\n  password abc\n")
    nowhere = {"WANDB_CONFIG_DIR": str(tmp_path / "none")}
    assert resolve_mode("auto", {"NETRC": str(netrc), **nowhere, **environment}) == expected


def test_a_netrc_that_cannot_be_read_is_none(tmp_path):
    (tmp_path / "netrc").write_text("machine\n")
    assert resolve_mode("auto", {"NETRC": str(tmp_path / "netrc")}) == "offline"


def test_the_run_id_is_made_once_and_a_copied_checkpoint_brings_its_own(tmp_path):
    made = stable_run_id(tmp_path / "wandb_run_id")
    assert len(made) == 8
    assert stable_run_id(tmp_path / "wandb_run_id", "0ther1d0") == made
    assert stable_run_id(tmp_path / "copy/wandb_run_id", made) == made


def test_the_page_of_a_run_is_known_before_it_starts_where_its_owner_is():
    key = {"WANDB_API_KEY": "k"}
    config = WandbConfig(project="p", entity="team")
    assert run_page(config, "abc", key) == "https://wandb.ai/team/p/runs/abc"
    lab = key | {"WANDB_BASE_URL": "https://wandb.lab/", "WANDB_ENTITY": "us"}
    assert run_page(WandbConfig(), "abc", lab) == "https://wandb.lab/us/zeta/runs/abc"
    assert run_page(WandbConfig(), "abc", key) is None
    assert run_page(WandbConfig(mode="offline", entity="team"), "abc", key) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mode": "on"}, "tracker.wandb.mode is 'on'"),
        ({"tags": ["x" * 65]}, "tracker.wandb.tags"),
        ({"tags": [""]}, "tracker.wandb.tags"),
        ({"project": " "}, "tracker.wandb.project is empty"),
        ({"finish_s": 0}, "tracker.wandb.finish_s is 0"),
    ],
)
def test_what_wandb_would_not_take_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match="^" + named.replace(".", r"\.")):
        WandbConfig(**changes)
