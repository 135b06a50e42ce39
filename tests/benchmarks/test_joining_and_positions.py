"""The programs behind tables of docs/speed.md run, and reckon what they say."""

import subprocess
import sys

import pytest

from tests.benchmarks.positions import POSITIONS


@pytest.mark.slow
def test_joining_is_compared_round_by_round_with_what_auto_chooses():
    # A process of its own: DeepSpeed keeps the groups of ranks that another test has closed.
    command = [sys.executable, "-m", "tests.benchmarks.joining"]
    command += ["--rounds", "2", "--steps", "1", "--sizes", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = said.splitlines()[-1:]
    assert line.startswith("64 channels, 4 blocks: 4 packs in one pass take ")
    assert line.endswith("auto joins 4")


@pytest.mark.slow
def test_positions_are_compared_with_fractional_ones():
    command = [sys.executable, "-m", "tests.benchmarks.positions", "--preset", "navit_ti16"]
    command += ["--images", "2", "--rounds", "1"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.split("|")] for line in said.splitlines()[3:]]
    assert [row[1] for row in rows] == [f"`{name}`" for name in POSITIONS]
    assert (rows[0][3], rows[0][5]) == ("1.000", "1.000")
    assert all(0.9 < float(row[5]) < 1.1 for row in rows)  # activations are counted, not timed
