"""The checks of `zeta launch doctor`; tests/slurm/test_launch_slurm.py has a real cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.cli import entry_point
from launch.cluster import doctor
from launch.cluster.doctor import container, disk, partition_check, place, wandb_mode
from launch.cluster.probe import parse_partitions
from launch.config.load import load_config

GIB = 2**30
SINFO = """\
main*|2|idle|(null)
main*|1|mixed-|gpu:h100:8(S:0-1),nvme:1
main*|1|down*|gpu:h100:8
debug|1|idle*|gpu:4
debug|3|drained|gpu:a100:2,gpu:t4:1
"""


def config(*overrides):
    return load_config("demo", ["data.shards=x", *overrides])


def test_partitions_count_nodes_that_can_run_jobs():
    main, debug = parse_partitions(SINFO)
    assert (main.name, main.is_default, main.nodes, main.usable, main.idle) == (
        "main", True, 4, 3, 2,
    )  # fmt: skip
    assert main.gpus_per_node == 8
    assert (debug.name, debug.is_default, debug.nodes, debug.usable) == ("debug", False, 4, 0)
    assert debug.gpus_per_node == 4


@pytest.mark.parametrize(
    ("overrides", "state", "said"),
    [
        (["cluster.nodes=3"], "ok", "main: 4 nodes, 3 usable, 2 idle"),
        (["cluster.nodes=4"], "warning", "waits until 4 are usable"),
        (["cluster.nodes=3-9"], "ok", "main"),
        (["cluster.nodes=5"], "failed", "fewer than --nodes 5"),
        (["cluster.nodes=1", "cluster.gpus_per_node=8"], "ok", "main"),
        (["cluster.nodes=1", "cluster.gpus_per_node=9"], "failed", "8 GPUs a node"),
        (["cluster.nodes=1", "cluster.partition=debug"], "warning", "waits until 1"),
        (["cluster.nodes=1", "cluster.partition=debug,main"], "ok", "main"),
        (["cluster.nodes=1", "cluster.partition=gpu"], "failed", "there are: main, debug"),
    ],
)
def test_a_partition_must_have_the_nodes_and_gpus(overrides, state, said):
    check = partition_check(parse_partitions(SINFO), config(*overrides))
    assert check.state == state
    assert said in check.finding


def test_a_cluster_without_a_default_partition_wants_one_named():
    check = partition_check(parse_partitions(SINFO.replace("main*", "main")), config())
    assert (check.state, check.finding[:26]) == ("failed", "there is no default partit")


def test_a_folder_in_memory_fails_where_several_nodes_must_see_it(tmp_path, monkeypatch):
    for kind, state in [("tmpfs", "failed"), ("ext4", "warning"), ("nfs4", "ok")]:
        monkeypatch.setattr(doctor, "filesystem_kind", lambda path, kind=kind: kind)
        assert place("run directory", tmp_path, several=True).state == state
        assert place("run directory", tmp_path, several=False).state == "ok"


def test_the_disk_must_hold_the_checkpoints_and_one_more():
    assert disk(100 * GIB, 10 * GIB, 3).state == "ok"
    assert disk(39 * GIB, 10 * GIB, 3).state == "warning"
    assert disk(19 * GIB, 10 * GIB, 3).state == "failed"
    assert "19.0 GiB free, about 10.0 GiB a checkpoint" in disk(19 * GIB, 10 * GIB, 3).finding


def test_an_image_must_exist_and_the_run_directory_be_inside(tmp_path):
    image = tmp_path / "zeta.sif"
    asked = config(f"cluster.container.image={image}", f"cluster.container.mounts=[{tmp_path}:/x]")
    run_dir = tmp_path / "run"
    assert [check.state for check in container(asked, run_dir)] == ["failed"]
    image.touch()
    assert [check.state for check in container(asked, run_dir)] == ["ok"]
    assert [check.state for check in container(asked, Path("/elsewhere"))] == ["ok", "warning"]
    registry = config("cluster.container.image=docker://org/zeta:1")
    assert {check.state for check in container(registry, run_dir)} == {"warning"}
    assert list(container(config(), run_dir)) == []


def test_where_metrics_will_go_is_said(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert "online, project zeta" in wandb_mode(config("tracker.wandb.mode=auto")).finding
    assert "offline" in wandb_mode(config()).finding


def test_off_a_cluster_the_table_says_what_is_missing_and_the_status_is_1(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["demo", "--nodes", "1", "--container", "none.sif", f"run.dir={tmp_path / 'run'}"]
    assert entry_point(["launch", "doctor", *words, "data.shards=nowhere"]) == 1
    out = capsys.readouterr().out
    rows = {line[9:24].strip(): line[:9].strip() for line in out.splitlines()[:-2]}
    assert rows["config"] == rows["ranks"] == rows["W&B"] == "ok"
    assert rows["start"] == rows["Slurm"] == "failed"
    assert "nowhere" in out
    assert "sbatch, srun, scontrol not on PATH" in out
    assert out.splitlines()[-1] == "3 checks failed"
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_config_is_the_only_line(capsys):
    assert entry_point(["launch", "doctor", "demo", "--container", "x", "data.shard=x"]) == 1
    first, _, last = capsys.readouterr().out.splitlines()
    assert "did you mean data.shards?" in first
    assert last == "1 check failed"
