"""The list of bad nodes, and whether a job can do without them; Slurm's commands are played."""

import json
import os

import pytest

from launch.cluster.excluded_nodes import note_excluded, too_few_left

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_PARTITION": "gpus"}


def test_a_node_is_one_line_with_time_and_reason_and_lines_add_up(tmp_path):
    path = tmp_path / "run" / "excluded_nodes"
    note_excluded(path, {"n2": "ECC\nerrors"})
    note_excluded(path, {"n4": "no word", "n5": "disk"})
    lines = [line.split(" ", 2) for line in path.read_text().splitlines()]
    assert [(node, reason) for node, _, reason in lines] == [
        ("n2", "ECC errors"),
        ("n4", "no word"),
        ("n5", "disk"),
    ]
    assert all(time.endswith("Z") and "T" in time for _, time, _ in lines)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A partition of n1 to n4 and a job that asked for so many and avoids some already."""

    def answer(least, avoided="(null)"):
        wanted = {6: "cpu=1,node=9", 7: f"cpu=8,mem=1M,node={least},gpu=1"}  # it lists all jobs
        jobs = [{"job_id": job, "tres_req_str": tres} for job, tres in wanted.items()]
        programs = {
            "squeue": f"printf '%s' '{json.dumps({'jobs': jobs})}'",
            "sinfo": "printf 'n1\\nn2\\nn3\\nn4\\n'",
            "scontrol": 'if [ "$2" = hostnames ]; then printf "n3\\nn4\\n"; '
            f"else echo 'JobId=7 NumNodes=2 ExcNodeList={avoided} Reason=x'; fi",
        }
        for name, body in programs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return answer


@pytest.mark.parametrize(
    ("least", "avoided", "bad", "left"),
    [(1, "(null)", "n1", None), (3, "(null)", "n1", None), (4, "(null)", "n1", 3),
     (1, "n[3-4]", "n1", None), (2, "n[3-4]", "n1", 1)],
)  # fmt: skip
def test_a_job_that_would_wait_forever_is_told_apart(slurm, least, avoided, bad, left):
    slurm(least, avoided)
    said = too_few_left(JOB, {bad: "ECC"})
    if left is None:
        assert said == ""
    else:
        assert f"partition gpus has {left} node" in said
        assert f"this job needs {least}" in said


def test_where_slurm_cannot_be_asked_the_job_is_given_the_chance(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert too_few_left(JOB, {"n1": "ECC"}) == ""
    assert too_few_left({}, {"n1": "ECC"}) == ""
