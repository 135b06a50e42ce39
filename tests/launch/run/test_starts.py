from __future__ import annotations

import json

import pytest
import torch

from launch.run.starts import device_name, note_start, places
from zeta.distributed import RankInfo, World


class _OtherRanks(World):
    """A world of three ranks on two hosts, seen from the first."""

    def gather(self, value):
        host, device = value
        return [(host, device), (host, device), ("elsewhere", "NVIDIA H100")]


def test_a_line_of_starts_holds_the_hosts_and_how_many_ranks_have_each_device(tmp_path):
    world = _OtherRanks(RankInfo(), torch.device("cpu"))
    where = places(world)
    cpu = device_name(torch.device("cpu"))
    assert where["hosts"][1:] == ["elsewhere"]
    assert where["devices"] == {cpu: 2, "NVIDIA H100": 1}
    for facts in (None, where):
        note_start(tmp_path / "starts.jsonl", 7, 3, facts)
    old, new = (json.loads(line) for line in (tmp_path / "starts.jsonl").open())
    assert sorted(old) == ["ranks", "step", "time"]
    assert (new["step"], new["ranks"], new["hosts"]) == (7, 3, where["hosts"])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor : 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name : other\n", "Some CPU @ 2 GHz"),
        ("model name\t:\nflags : x\n", "flax64"),
        (None, "flax64"),
    ],
)
def test_a_cpu_has_the_name_that_linux_gives_it_or_else_its_architecture(
    tmp_path, monkeypatch, text, name
):
    monkeypatch.setattr("platform.machine", lambda: "flax64")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert device_name(torch.device("cpu"), tmp_path / "cpuinfo") == f"CPU {name}"
