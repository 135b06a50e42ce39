"""slurm/pretrain.sbatch follows the same rule of restarts as `zeta launch local`.

One table for both. The script runs here as a plain program: `zeta`, `srun` and `scontrol` are a few
lines that end as the table says. Other tests run it on a real cluster.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launch.shipped import slurm_root
from tests.launch.restart_table import TABLE, Case

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


def ended(folder: Path, restarts: int, max_restarts: int) -> int | None:
    """Run the script once; returns what the job ends with, or None if it was requeued."""
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
        ["bash", *script], cwd=folder, env=outside | variables, capture_output=True, text=True
    )
    requeued = folder / "requeued"
    if requeued.exists():
        requeued.unlink()
        return None
    return job.returncode


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_restarts_follow_the_rule_of_the_local_launcher(case: Case, tmp_path):
    (tmp_path / "bin").mkdir()
    for name, body in PROGRAMS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    (tmp_path / "ends").write_text("".join(f"{code} {saves}\n" for code, saves in case.ends))
    (tmp_path / "starts").write_text("0\n")
    status, restarts = None, 0
    while status is None:
        status = ended(tmp_path, restarts, case.max_restarts)
        restarts += 1
    assert (int((tmp_path / "starts").read_text()), status) == (case.starts, case.status)
