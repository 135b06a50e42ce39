"""slurm/pretrain.sbatch follows the same rule of restarts as `zeta launch local`.

One table for both. The script runs here as a plain program: `zeta`, `srun` and `scontrol` are a few
lines that end as the table says. Other tests run it on a real cluster.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launch.run.restarts import as_rank_means
from launch.shipped import slurm_root
from tests.launch.restart_table import TABLE, Case
from zeta.exit_codes import ExitCode

PROGRAMS = {
    "zeta": '[[ $3 == --for-script ]] && printf "run_dir:run\\0" || echo run',
    "srun": """
        [[ " $* " == *" train "* ]] || exit 0  # what comes before the ranks is well
        start=$(($(cat starts) + 1)); echo $start >starts
        read -r code saves <<<"$(sed -n ${start}p ends)"
        [[ $saves == True ]] && mkdir -p run/checkpoints && echo step_$start >run/checkpoints/latest
        exit "$code"
    """,
    "scontrol": """
        case $1 in
        show) echo n1 ;;
        --oneliner) echo "NodeName=n1 NodeAddr=127.0.0.1 State=IDLE" ;;
        requeue) touch requeued ;;
        esac
    """,
}


def ended(folder: Path, restarts: int, max_restarts: int, **more: str) -> int | None:
    """Run the script once; returns what the job ends with, or None if it was requeued.

    `more`: variables that Slurm sets besides.
    """
    variables = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_RESTART_COUNT": str(restarts),
        "ZETA_MAX_RESTARTS": str(max_restarts),
    }
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    script = [slurm_root() / "pretrain.sbatch", "demo"]
    job = subprocess.run(
        ["bash", *script],
        cwd=folder,
        env=outside | variables | more,
        capture_output=True,
        text=True,
    )
    requeued = folder / "requeued"
    if requeued.exists():
        requeued.unlink()
        return None
    return job.returncode


def programs(folder: Path, ends: str) -> None:
    """Write the programs; `ends`: a line for each start of the ranks."""
    (folder / "bin").mkdir()
    for name, body in PROGRAMS.items():
        program = folder / "bin" / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    (folder / "ends").write_text(ends)
    (folder / "starts").write_text("0\n")


def test_a_job_that_is_turned_away_leaves_the_count_of_the_one_that_runs(tmp_path):
    programs(tmp_path, "93 False\n")
    (tmp_path / "run").mkdir()
    record = tmp_path / "run/slurm_restarts"
    record.write_text("2 step_00000400\n")  # of the job that has the run directory
    assert ended(tmp_path, 0, 5) == 93
    assert record.read_text() == "2 step_00000400\n"


@pytest.mark.parametrize("code", [138, 140, 143])
def test_ranks_that_were_told_to_leave_before_they_were_up_count_as_saved(code, tmp_path):
    assert as_rank_means(code) == ExitCode.REQUEUE
    programs(tmp_path, f"{code} False\n")
    # A link of a chain ends with what its ranks ended with.
    assert ended(tmp_path, 0, 5, SLURM_JOB_DEPENDENCY="singleton") == ExitCode.REQUEUE


@pytest.mark.parametrize("code", [1, 134, 137, 139])
def test_crashes_stay_crashes(code, tmp_path):
    assert as_rank_means(code) == code
    programs(tmp_path, f"{code} False\n")
    assert ended(tmp_path, 0, 5, SLURM_JOB_DEPENDENCY="singleton") == code


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_restarts_follow_the_rule_of_the_local_launcher(case: Case, tmp_path):
    programs(tmp_path, "".join(f"{code} {saves}\n" for code, saves in case.ends))
    status, restarts = None, 0
    while status is None:
        status = ended(tmp_path, restarts, case.max_restarts)
        restarts += 1
    assert (int((tmp_path / "starts").read_text()), status) == (case.starts, case.status)
