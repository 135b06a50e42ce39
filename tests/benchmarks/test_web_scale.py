"""The program of the plan at web scale runs to its end on a toy."""

from __future__ import annotations

import argparse
import json

from tests.benchmarks.web_scale import ComputedRows, measure


def test_a_toy_of_the_web_is_started_planned_restored_and_balanced(capsys):
    measure(
        argparse.Namespace(
            samples=200_000,
            shards=200,
            ranks=8,
            packs=16,
            views="1,4",
            balance="8x30",
            parts="start,count,index,plan,balance",
        )
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {line["what"]: line for line in lines}
    assert len(found) == len(lines) == 7
    for views in (1, 4):
        spread = found[f"8 lanes of 16, {views} views"]
        assert spread["fill"] > 0.99
        assert 1 <= spread["straggler_mean"] < 1.02
        assert found[f"plan of a rank, {views} views"]["state_bytes_a_lane"] < 1024


def test_computed_rows_are_the_same_whoever_asks_for_them():
    rows = ComputedRows(10_000)
    some = rows[20:30]
    assert (rows[some["offset"].astype(int) // 10_240] == some).all()
    assert rows[[9_999]]["width"] > 0
