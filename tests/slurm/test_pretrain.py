"""`sbatch slurm/pretrain.sbatch CONFIG` with the real `zeta`: what no restart can mend.

test_recovery.py runs it to its end, and through all that can be mended.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.runs import Run, make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("images") / "shards")


def test_a_config_error_ends_the_job_with_93_and_its_message(cluster, shards, tmp_path):
    run = Run(cluster, tmp_path, shards)
    run.submit("train.lr=1")
    record = run.wait_for_end()
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "93:0", "0")
    assert run.ends() == [("FAILED", "93:0")]
    last = run.log.splitlines()[-1]
    assert "unknown config key train.lr" in last
    assert "did you mean optim.lr?" in last


@pytest.mark.slow
def test_shards_that_are_not_there_end_the_job_with_93(cluster, tmp_path):
    run = Run(cluster, tmp_path, tmp_path / "nowhere")
    run.submit()
    record = run.wait_for_end()
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "93:0", "0")
    assert run.ends() == [("FAILED", "93:0")]
    assert str(tmp_path / "nowhere") in run.log
