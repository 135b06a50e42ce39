"""The benchmark of a GPU, its whole path at toy sizes on the CPU."""

import json
import subprocess
import sys

import pytest

from tests.benchmarks.gpu import attention, goals, report, sizes, train
from tests.benchmarks.gpu.__main__ import SECTIONS, main, run_alone, section
from tests.benchmarks.gpu.common import Options

IN_PROCESS = [name for name in SECTIONS if name not in ("train", "sizes")]


@pytest.mark.parametrize("name", IN_PROCESS)
def test_each_section_measures_at_toy_sizes_without_a_device(name, tmp_path):
    run_alone(name, Options("cpu", True, tmp_path))
    found = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    assert not [row for row in found if "failed" in row]
    measured = [row for row in found if row.keys() & {"ms", "step_s"}]
    assert measured, found
    assert all("not measured" in row for row in found if row not in measured)
    assert measured[0]["case"] in report.table({}, {name: found})
    named = [rows for section, _, *rows, _ in goals.RATIOS if section == name]
    for case in (case for rows in named for case in rows):
        assert any(row["case"].startswith(case) for row in found), case


@pytest.mark.slow
def test_the_program_trains_as_shipped_in_a_process_of_its_own_and_prints_its_goal(
    tmp_path, capsys
):
    main(["--toy", "--device", "cpu", "--sections", "train", "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["train"]
    assert "failed" not in row, (tmp_path / "train.log").read_text()
    assert goals.undelayed(row) >= row["mfu"] > 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[3].startswith("zeta train navit_b16")
    assert (tmp_path / "gpu.txt").read_text() in printed


def test_every_size_of_the_goals_is_trained_with_nothing_overridden_but_the_preset(
    tmp_path, monkeypatch
):
    """Besides it: the data, the folder, and what lets a run end after a few steps."""
    commands = []

    def run(command, **_):
        commands.append(command[3:])
        return subprocess.CompletedProcess(command, 1, "", "not here")

    monkeypatch.setattr(train.subprocess, "run", run)
    monkeypatch.setattr(train, "write_shards", lambda folder, *_: folder)
    options = Options("cuda", False, tmp_path)
    found = [*train.rows(options), *sizes.rows(options)]
    assert [row["case"] for row in found] == [f"zeta train {preset}" for preset in goals.GOALS]
    ends = {word.split("=")[0] for word in train.TO_END} | {"train.max_steps"}
    for words in commands:
        assert words[:2] == ["train", "navit_b16_classification"]
        assert {word.split("=")[0] for word in words[2:]} - ends == {
            "data.shards",
            "run.dir",
            "model.preset",
        }


def test_goals_and_ratios_say_what_was_reached_and_what_was_not_measured():
    trained = {"step_s": 2.0, "data_wait_s": 0.5}
    found = {
        "train": [
            {"case": "zeta train navit_b16", "mfu": 0.42, **trained},
            {"case": "zeta train navit_l16", "mfu": 0.60, **trained},
        ],
        "sizes": [
            {"case": "zeta train navit_so400m14", "mfu": 0.1},
            {"case": "zeta train navit_g14", "failed": "out of memory"},
            {"case": "zeta train navit_s16", "mfu": 0.2},
        ],
        "engine": [
            {"case": "navit_l16 ZeRO 2, 32,768", "ms": 100.0},
            {"case": "navit_l16 ZeRO 3, 32,768", "ms": 120.0},
        ],
    }
    lines = list(goals.lines(found))
    rows = {line.split()[0]: line for line in lines[: lines.index("")]}
    assert rows["navit_b16"].split()[1:3] == ["0.420", "0.560"]
    assert rows["navit_b16"].endswith("floor reached")
    assert rows["navit_l16"].endswith("aim reached")
    assert rows["navit_so400m14"].endswith("below the floor")
    assert rows["navit_g14"].endswith("not measured")
    assert rows["navit_s16"].endswith("no goal")
    (line,) = (line for line in lines if line.startswith("navit_l16 ZeRO 3"))
    assert line.endswith(": 1.20 times as long a step (goal: 1.25 at most)")
    assert sum(line.endswith(": not measured") for line in lines) == 3


def test_lengths_of_one_size_have_none_of_another_and_photographs_have():
    assert set(attention.lengths_of(4000, 51, same=True)) == {51}
    varied = attention.lengths_of(4000, 51, same=False)
    assert len(set(varied)) > 5
    assert 45 < sum(varied) / len(varied) < 57


def test_what_the_time_did_not_reach_is_said_to_be_not_measured(tmp_path):
    rows = section("model", Options("cpu", True, tmp_path), deadline=0.0)
    assert "not measured: the time was up before it began" in report.table({}, {"model": rows})


def test_a_section_that_fails_is_in_the_table_and_no_end_of_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    main(["--toy", "--device", "cpu", "--sections", "model,peers", "--out", str(tmp_path)])
    assert (tmp_path / "gpu.txt").read_text().count("failed: it ended with 1") == 2


def test_an_unknown_section_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["--sections", "speed"])
    assert "choose from train, engine" in capsys.readouterr().err
