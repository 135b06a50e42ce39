"""The benchmark of a GPU, its whole path at toy sizes on the CPU."""

import json
import subprocess
import sys

import pytest

from tests.benchmarks.gpu import attention, report
from tests.benchmarks.gpu.__main__ import SECTIONS, main, section
from tests.benchmarks.gpu.common import Options


@pytest.mark.parametrize("name", SECTIONS)
def test_each_section_measures_at_toy_sizes_without_a_device(name, tmp_path, capsys):
    main(["--toy", "--device", "cpu", "--sections", name, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())[name]
    log = (tmp_path / f"{name}.log").read_text()[-2000:]
    assert found, log
    assert not [row for row in found if "failed" in row], log
    measured = [row for row in found if row.keys() & {"ms", "step_s"}]
    assert measured, found
    assert all("not measured" in row for row in found if row not in measured)
    assert measured[0]["case"] in capsys.readouterr().out


def test_lengths_of_one_size_have_none_of_another_and_photographs_have():
    assert set(attention.lengths_of(4000, 51, same=True)) == {51}
    varied = attention.lengths_of(4000, 51, same=False)
    assert len(set(varied)) > 5
    assert 45 < sum(varied) / len(varied) < 57


def test_what_the_time_did_not_reach_is_said_to_be_not_measured(tmp_path):
    rows = section("model", Options("cpu", True, tmp_path), deadline=0.0)
    assert "not measured" in report.table({}, {"model": rows})


def test_a_section_that_fails_is_in_the_table_and_no_end_of_the_program(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    main(["--toy", "--device", "cpu", "--sections", "model,peers", "--out", str(tmp_path)])
    assert (tmp_path / "gpu.txt").read_text().count("failed: it ended with 1") == 2


def test_an_unknown_section_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["--sections", "speed"])
    assert "choose from train, model" in capsys.readouterr().err


def test_the_program_starts_by_its_name():
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--help"]
    assert "--sections" in subprocess.run(command, capture_output=True, text=True).stdout
