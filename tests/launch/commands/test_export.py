"""A new export format is one module and one entry in the table: the command does the rest."""

import json

import pytest
import torch

from launch.cli import entry_point
from tests.launch.made_runs import CLASSES, make_run, weights_of
from zeta.export.formats import COMBINED, FORMATS, FormatEntry, obstacles
from zeta.models.config import ModelConfig, load_pretrained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(autouse=True)
def plain_format(monkeypatch):
    """The table with a format that zeta does not have, alone and beside zeta's."""
    entry = FormatEntry("tests.zeta.export.plain_format", "people who like numbers")
    monkeypatch.setitem(FORMATS, "plain", entry)
    monkeypatch.setitem(COMBINED, "zeta+plain", ("zeta", "plain"))


def export(run, out, form, *options):
    return entry_point(["export", str(run), str(out), "--format", form, *options])


def test_a_new_format_is_written_by_the_command_and_shown_in_its_card(run, tmp_path, capsys):
    assert export(run, tmp_path / "out", "plain") == 0
    assert "exported" in capsys.readouterr().out
    numbers = [float(line) for line in (tmp_path / "out/plain.txt").read_text().split()]
    assert torch.equal(torch.tensor(numbers), weights_of(4)["head.weight"].flatten())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert set(config.pop("sha256")) == {"plain.txt"}
    assert config == {"plain": {"classes": CLASSES, "alone": True}}
    card = (tmp_path / "out/README.md").read_text()
    assert "With a text editor: open plain.txt, 16 numbers a class." in card
    assert "from_pretrained" not in card
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "config.json", "plain.txt")
    }


def test_a_new_format_lies_beside_that_of_zeta(run, tmp_path):
    assert export(run, tmp_path / "out", "zeta+plain") == 0
    loaded = load_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(loaded["head.weight"], weights_of(4)["head.weight"])
    assert (tmp_path / "out/zeta.safetensors").is_file()
    assert (tmp_path / "out/plain.txt").is_file()


def test_an_export_in_a_new_format_is_replaced_but_not_with_other_files_in_it(
    run, tmp_path, capsys
):
    out = tmp_path / "out"
    assert export(run, out, "plain") == 0
    assert export(run, out, "zeta") == 1
    assert f"{out} holds an export already: give --overwrite" in capsys.readouterr().err
    assert (out / "plain.txt").exists()
    assert export(run, out, "zeta", "--overwrite") == 0
    assert not (out / "plain.txt").exists()
    assert export(run, out, "plain", "--overwrite") == 0
    (out / "thesis.tex").write_text("years of work")
    assert export(run, out, "zeta", "--overwrite") == 1
    assert "holds something that is not an exported model" in capsys.readouterr().err
    assert (tmp_path / "out/thesis.tex").is_file()


def test_a_new_format_refuses_a_model_and_training_can_warn_of_it(tmp_path, capsys):
    run = make_run(tmp_path / "run", registers=2)
    assert export(run, tmp_path / "out", "plain") == 1
    assert "model.registers is set: plain text has none" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    arguments = ModelConfig(preset="navit_b16", num_classes=3, registers=2).resolve()
    assert obstacles(arguments) == {"plain": "model.registers is set: plain text has none"}


def test_help_and_refusals_name_the_new_format(run, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        entry_point(["export", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "plain: for people who like numbers" in said
    assert "zeta+plain: zeta and plain side by side" in said
    with pytest.raises(SystemExit, match="2"):
        export(run, tmp_path / "out", "gguf")
    assert "plain" in capsys.readouterr().err
