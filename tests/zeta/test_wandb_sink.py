"""W&B, with its real client, offline: one run over restarts, and no step twice."""

import json
import os
import struct
import subprocess
import sys

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from tests.zeta.training import ROOT
from zeta.train_config import WandbConfig
from zeta.wandb_sink import WandbSink, resolve_mode, stable_run_id

_BLOCK = 32768
_LOG = """
import json, sys
from pathlib import Path
from zeta.sinks import OnlyNew
from zeta.train_config import WandbConfig
from zeta.wandb_sink import WandbSink, stable_run_id
folder, last, steps = json.loads(sys.argv[1])
folder = Path(folder)
sink = WandbSink(
    WandbConfig(mode="offline", project="p"), name="n", folder=folder,
    run_id=stable_run_id(folder / "wandb_run_id"), run_config={"train": {"seed": 3}},
)
sink = OnlyNew(sink, {"train/loss": last})
for step in steps:
    sink.log(step, {"train/loss": step / 10})
sink.close()
"""


def _log(folder, last, steps):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder)}
    arguments = json.dumps([str(folder), last, steps])
    subprocess.run([sys.executable, "-c", _LOG, arguments], env=environment, check=True, timeout=90)


def _records(path):
    """Read a .wandb file: a LevelDB log (7 bytes of header, blocks of 32 KiB) of protobufs."""
    data, position, partial = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        room = _BLOCK - position % _BLOCK
        if room < 7:
            position += room
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        partial += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or last part
            record = Record()
            record.ParseFromString(partial)
            yield record
            partial = b""


def _history(path):
    for record in _records(path):
        if record.WhichOneof("record_type") == "history":
            yield {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }


@pytest.mark.slow
def test_restarts_share_one_run_and_replayed_steps_are_not_logged_again(tmp_path):
    _log(tmp_path, 0, [1, 2, 3])
    _log(tmp_path, 3, [2, 3, 4])  # resumed from the checkpoint of step 1
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    assert {path.stem for path in files} == {f"run-{run_id}"}
    logged = [line for path in files for line in _history(path)]
    assert [line["trainer/step"] for line in logged] == [1, 2, 3, 4]
    assert [line["train/loss"] for line in logged] == [0.1, 0.2, 0.3, 0.4]
    records = list(_records(files[0]))
    metrics = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert {m.glob_name or m.name for m in metrics} >= {"trainer/step", "*"}
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.project, run.display_name) == ("p", "n")


def test_the_run_id_is_made_once(tmp_path):
    first = stable_run_id(tmp_path / "wandb_run_id")
    assert len(first) == 8
    assert stable_run_id(tmp_path / "wandb_run_id") == first


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("online", {"WANDB_MODE": "disabled"}, "online"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_auto_is_online_only_with_a_key_and_never_asks(tmp_path, mode, environment, expected):
    environment = {"NETRC": str(tmp_path / "none"), **environment}
    assert resolve_mode(mode, environment) == expected


def test_a_key_in_netrc_counts(tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine api.wandb.ai\n  login user\n  password abc\n")
    assert resolve_mode("auto", {"NETRC": str(netrc)}) == "online"


@pytest.mark.slow
def test_a_failure_of_wandb_does_not_stop_training(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    sink = WandbSink(
        WandbConfig(mode="online"),
        name="n",
        folder=tmp_path,
        run_id="x",
        run_config={},
    )
    sink.log(1, {"train/loss": 1.0})
    sink.close()
    assert "training goes on without it" in caplog.text
