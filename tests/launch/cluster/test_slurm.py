"""`zeta launch slurm`: the words that sbatch gets, and what is refused before it gets any.

`sbatch` is a script here that notes what it gets; tests/slurm/test_launch_slurm.py has a real one.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path

import pytest

from data_pipeline.shards.build import build_shards
from launch.cli import entry_point
from launch.cluster.slurm import job_for, most_ranks, ranks_per_node, submission_environment
from launch.config.load import load_config
from launch.shipped import slurm_root
from tests.data_pipeline.shard_fixtures import jpeg

SCRIPT = str(slurm_root() / "pretrain.sbatch")
KEY = "0123456789abcdef" * 2 + "01234567"
NASTY = 'it\'s a "x"; $(touch pwned) `touch pwned` %j, *'


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    samples = [(f"s{i}", {"jpg": jpeg(40, 48, i), "cls": str(i % 3).encode()}) for i in range(24)]
    build_shards(samples, folder, class_names=["a", "b", "c"])
    return folder


class Sbatch:
    """Stands for Slurm: numbers the jobs from 41 on, or refuses them from some on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write('echo $((40 + $(ls "${0%/*}"/words.* | wc -l)))')

    def write(self, answer: str) -> None:
        program = self.folder / "sbatch"
        program.write_text(
            '#!/bin/bash\nnumber=$(ls "${0%/*}" | wc -l)\n'
            'printf "%s\\0" "$@" > "${0%/*}/words.$number"\nenv -0 > "${0%/*}/env"\n' + answer
        )
        program.chmod(0o755)

    def jobs(self) -> list[list[str]]:
        files = sorted(self.folder.glob("words.*"), key=lambda path: path.stat().st_mtime_ns)
        return [path.read_text().split("\0")[:-1] for path in files]

    def environment(self) -> dict[str, str]:
        words = (self.folder / "env").read_text().split("\0")[:-1]
        return dict(word.partition("=")[::2] for word in words)


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Sbatch:
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    return Sbatch(folder)


def config(*overrides, recipe="demo"):
    return load_config(recipe, ["data.shards=x", *overrides])


def launch(*words: object) -> int:
    return entry_point(["launch", "slurm", *map(str, words)])


def test_a_gpu_job_has_one_task_for_each_gpu():
    words = ["navit_b16_classification", "data.shards=x"]
    job = job_for(config("cluster.nodes=2-4", "cluster.gpus_per_node=8", recipe=words[0]), words)
    assert job.command[0] == "sbatch"
    assert {"--nodes=2-4", "--gpus-per-node=8", "--ntasks-per-node=8"} <= set(job.command)
    assert list(job.command[-3:]) == [SCRIPT, *words]
    assert not [word for word in job.command if "requeue" in word or "dependency" in word]


@pytest.mark.parametrize(
    ("nodes", "ranks", "flags"),
    [
        ("1-8", 8, {"--export=ALL", "--ntasks-per-node=8"}),
        ("1-9", 8, {"--export=ALL,SLURM_NTASKS_PER_NODE=8", "--mincpus=96"}),
        ("1-2", 1, {"--export=ALL,SLURM_NTASKS_PER_NODE=1", "--mincpus=12"}),
        ("9", 1, {"--export=ALL", "--ntasks-per-node=1"}),
    ],
)
def test_sbatch_does_not_cut_a_range_of_nodes_to_the_tasks_of_its_least(nodes, ranks, flags):
    asked = [f"cluster.nodes={nodes}", f"cluster.tasks_per_node={ranks}"]
    job = job_for(config(*asked, "cluster.cpus_per_task=12"), [])
    tasks = {word for word in job.command if re.match("--(export|ntasks|mincpus)", word)}
    assert tasks == flags


def test_the_largest_world_size_is_checked():
    gpus = config("cluster.nodes=2-4", "cluster.gpus_per_node=8", recipe="megavit_1b")
    assert most_ranks(gpus) == 32
    cpus = config("cluster.nodes=3", "cluster.tasks_per_node=2")
    assert most_ranks(cpus) == 6
    assert ranks_per_node(config()) == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster.gpus_per_node=8"], "cluster.nodes is not set"),
        (["cluster.nodes=2"], "cluster.gpus_per_node is not set"),
        (["cluster.nodes=2", "train.device=cpu", "cluster.gpus_per_node=8"], "train.device is cpu"),
        (
            ["cluster.nodes=2", "cluster.gpus_per_node=8", "cluster.tasks_per_node=2"],
            "each of the 8 GPUs of a node has one rank",
        ),
    ],
)
def test_nodes_and_ranks_must_be_said_once(overrides, said):
    with pytest.raises(ValueError, match=said):
        most_ranks(config(*overrides, recipe="navit_b16_classification"))


def test_every_setting_of_a_cluster_is_a_flag():
    job = job_for(
        config(
            "cluster.nodes=1", "cluster.partition=p q", "cluster.account=a", "cluster.qos=low",
            "cluster.time=1-00:00:00", "cluster.cpus_per_task=12", "cluster.mem=0",
            "cluster.constraint=[a|b]*2", "cluster.exclude=n[1,3]",
        ),
        [],
    )  # fmt: skip
    assert set(job.command[5:-1]) == {
        "--ntasks-per-node=1", "--nodes=1", "--partition=p q", "--account=a", "--qos=low",
        "--time=1-00:00:00", "--cpus-per-task=12", "--mem=0", "--constraint=[a|b]*2",
        "--exclude=n[1,3]",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("time", "signal"), [("4:00", "--signal=USR1@60"), ("0:20:00", None), ("24:00:00", None)]
)
def test_a_short_job_is_not_told_to_save_as_soon_as_it_starts(time, signal):
    command = job_for(config("cluster.nodes=1", f"cluster.time={time}"), []).command
    found = [word for word in command if word.startswith("--signal")]
    assert found == ([] if signal is None else [signal])


def test_the_jobs_of_a_chain_have_the_name_of_their_run_and_no_other():
    first, again, other = (
        job_for(config("cluster.nodes=1", f"run.dir={name}"), [], chained=True)
        for name in ("a", "a", "b")
    )
    assert {"--no-requeue", "--dependency=singleton"} <= set(first.command)
    names = [
        next(word for word in job.command if word.startswith("--job-name="))
        for job in (first, again, other)
    ]
    assert names[0] == names[1] != names[2]
    assert re.fullmatch(r"--job-name=a-[0-9a-f]{6}", names[0])


def test_a_backslash_would_lose_the_log_and_is_refused():
    with pytest.raises(ValueError, match="backslash"):
        job_for(config("cluster.nodes=1", "run.dir=a\\b"), [])


def test_what_tells_of_another_job_does_not_reach_this_one():
    inherited = {
        "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3", "SLURM_CPUS_PER_TASK": "2",
        "SLURM_JOB_DEPENDENCY": "singleton", "SLURM_CONF": "/c", "SBATCH_ACCOUNT": "a", "A": "b",
    }  # fmt: skip
    environment = submission_environment(inherited)
    environment.pop("PATH", None)  # where this Python has a `zeta` beside it
    assert environment == {"SLURM_CONF": "/c", "SBATCH_ACCOUNT": "a", "A": "b"}


def test_a_job_is_submitted_and_said_in_json(sbatch, shards, capsys):
    assert launch("demo", "--nodes", 2, "--json", f"data.shards={shards}", "run.dir=my run") == 0
    said = json.loads(capsys.readouterr().out)
    run_dir = Path.cwd() / "my run"
    log = run_dir / "logs/slurm-41.log"
    assert said == {"job_id": 41, "run_dir": str(run_dir), "log": str(log)}
    (words,) = sbatch.jobs()
    assert f"--output={run_dir}/logs/slurm-%j.log" in words
    assert words[-5:] == [
        SCRIPT, "demo", f"data.shards={shards}", "run.dir=my run", "cluster.nodes=2",
    ]  # fmt: skip
    assert log.parent.is_dir()  # Slurm would not make it


def test_no_name_is_read_by_a_shell(sbatch, shards, capsys):
    settings = [f"run.name={NASTY}", f"run.dir=runs/{NASTY}", f"data.shards={shards}"]
    options = ["--partition", NASTY, "--account", NASTY, "--container", NASTY]
    assert launch("demo", "--nodes", 1, *options, *settings) == 0
    (words,) = sbatch.jobs()
    assert f"--partition={NASTY}" in words
    escaped = NASTY.replace("%", "%%")
    assert f"--output={Path.cwd()}/runs/{escaped}/logs/slurm-%j.log" in words
    assert "--job-name=it_s_a__x_____touch_pwned___touch_pwned___j___" in words
    assert words[words.index(SCRIPT) + 2 :][:3] == settings
    assert f"cluster.container.image={NASTY}" in words
    assert not list(Path.cwd().rglob("pwned"))
    assert f"runs/{NASTY}/logs/slurm-41.log" in capsys.readouterr().out


def test_a_dry_run_prints_command_and_script_and_leaves_nothing(sbatch, shards, capsys):
    assert launch("demo", "--nodes", 1, "--dry-run", "--time", 90, f"data.shards={shards}") == 0
    out = capsys.readouterr().out
    command, _, script = out.partition("\n\n")
    assert command.startswith("sbatch --parsable --export=ALL ")
    assert "--time=90:00 " in command  # minutes, for Slurm and for YAML
    assert script == Path(SCRIPT).read_text()
    assert sbatch.jobs() == []
    assert list(Path.cwd().iterdir()) == []


def test_a_dry_run_in_json_has_the_words_that_would_be_run(sbatch, shards, capsys):
    words = ["demo", "--nodes", 1, f"data.shards={shards}", f"run.name={NASTY}", "run.dir=run"]
    assert launch(*words, "--dry-run", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["job_id"], said["run_dir"], said["log"]) == (None, str(Path.cwd() / "run"), None)
    assert list(Path.cwd().iterdir()) == []
    assert launch(*words) == 0
    (got,) = sbatch.jobs()
    assert said["command"] == ["sbatch", *got]


def test_a_chain_is_so_many_jobs(sbatch, shards, capsys):
    assert launch("demo", "--nodes", 1, "--chain", 3, f"data.shards={shards}") == 0
    jobs = sbatch.jobs()
    assert len(jobs) == 3
    assert jobs[0] == jobs[1] == jobs[2]
    assert "jobs 41 to 43" in capsys.readouterr().out


def test_the_key_of_wandb_is_in_the_environment_and_nowhere_else(
    sbatch, shards, capsys, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert launch("demo", "--nodes", 1, f"data.shards={shards}") == 0
    assert launch("demo", "--nodes", 1, "--dry-run", f"data.shards={shards}") == 0
    assert sbatch.environment()["WANDB_API_KEY"] == KEY
    printed = capsys.readouterr()
    files = [path.read_text() for path in Path.cwd().rglob("*") if path.is_file()]
    assert KEY not in "".join([printed.out, printed.err, *files, *itertools.chain(*sbatch.jobs())])


def test_what_slurm_refuses_is_said_in_its_words(sbatch, shards, capsys):
    sbatch.write(
        "echo 'sbatch: error: invalid partition specified: x' >&2\n"
        "echo 'sbatch: error: Batch job submission failed: Invalid partition name' >&2\nexit 1\n"
    )
    assert launch("demo", "--nodes", 1, "--partition", "x", f"data.shards={shards}") != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "invalid partition specified: x; Batch job submission failed" in line
    assert list(Path.cwd().iterdir()) == []


def test_a_refusal_takes_away_what_was_made_for_the_job_and_nothing_else(sbatch, shards):
    sbatch.write("exit 1\n")
    kept = Path("a/kept")
    kept.mkdir(parents=True)
    assert launch("demo", "--nodes", 1, f"data.shards={shards}", "run.dir=a/b/run") != 0
    assert list(Path("a").rglob("*")) == [kept]
    logs = Path("old/logs")
    logs.mkdir(parents=True)
    assert launch("demo", "--nodes", 1, f"data.shards={shards}", "run.dir=old") != 0
    assert logs.is_dir()


def test_a_chain_that_is_refused_midway_names_what_was_submitted(sbatch, shards, capsys):
    sbatch.write("((number > 2)) && { echo 'sbatch: error: limit' >&2; exit 1; }\necho 41\n")
    assert launch("demo", "--nodes", 1, "--chain", 3, f"data.shards={shards}") != 0
    assert "1 of 3 jobs were submitted (41), then sbatch refused" in capsys.readouterr().err
    (run,) = Path("runs").iterdir()
    assert (run / "logs").is_dir()  # the one that was submitted logs there


def test_without_sbatch_a_dry_run_still_works(sbatch, shards, capsys, monkeypatch):
    (sbatch.folder / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(sbatch.folder))
    assert launch("demo", "--nodes", 1, f"data.shards={shards}") != 0
    assert "sbatch is not on PATH" in capsys.readouterr().err
    assert list(Path.cwd().iterdir()) == []
    assert launch("demo", "--nodes", 1, "--dry-run", f"data.shards={shards}") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no_such_recipe", "--nodes", "1"], "no config 'no_such_recipe'"),
        (["demo", "--nodes", "many"], "cluster.nodes is 'many'"),
        (["demo", "--nodes", "1", "--cluster", "moon"], "no cluster 'moon'"),
        (["demo", "--nodes", "3"], "3 ranks but train.packs_per_step is 2"),
        (["demo", "--nodes", "1", "data.shards=nowhere"], "nowhere"),
    ],
)
def test_what_every_rank_would_refuse_is_not_submitted(sbatch, shards, capsys, words, said):
    assert launch(*words[:1], f"data.shards={shards}", *words[1:]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert sbatch.jobs() == []
    assert list(Path.cwd().iterdir()) == []


def test_a_finished_run_is_not_submitted_again(sbatch, shards, capsys, monkeypatch):
    from launch.run.checks import CheckedRun

    monkeypatch.setattr(CheckedRun, "already_finished", "is already finished, at step 4")
    assert launch("demo", "--nodes", 1, f"data.shards={shards}") == 0
    assert "already finished" in capsys.readouterr().out
    assert sbatch.jobs() == []


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        (["data.workers=3"], True),
        (["data.workers=3", "cluster.cpus_per_task=4"], False),
        (["data.workers=0"], False),
    ],
)
def test_loader_workers_without_cores_of_their_own_are_warned_of(
    settings, warned, shards, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)  # where no earlier run of the demo lies
    words = ("--nodes", 1, f"data.shards={shards}", *settings, "--dry-run")
    assert launch("demo", *words) == 0
    said = capsys.readouterr().err
    assert ("3 loader workers may have to share one core: give --cpus-per-task 4" in said) == warned
