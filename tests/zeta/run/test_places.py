"""A run that is given in the place of an export is recognised, and the right command named."""

import os
from pathlib import Path

import pytest

from zeta import NaViT
from zeta.models.config import load_pretrained
from zeta.run.places import find_run


@pytest.fixture
def run(tmp_path):
    """The folders of a run with one checkpoint."""
    run = tmp_path / "my run"
    checkpoint = run / "checkpoints/step_00000012"
    checkpoint.mkdir(parents=True)
    for file in (run / "config.yaml", checkpoint / "config.yaml", checkpoint / "trainer.json"):
        file.touch()
    return run


def test_a_run_in_the_place_of_an_export_is_told_how_to_export(run):
    command = f"zeta export '{run}' OUT"
    expected = {
        run: f"{run} is the directory of a run, not an export: write one with `{command}`",
        run / "checkpoints": f"is the folder of the checkpoints of a run.*`{command}`",
        run / "checkpoints/step_00000012": f"is a checkpoint of a run.*`{command} --step 12`",
    }
    for path, message in expected.items():
        with pytest.raises(ValueError, match=message):
            NaViT.from_pretrained(path)
    (run / "export").mkdir()
    (run / "export/config.json").touch()
    with pytest.raises(ValueError, match=f"`{command}`, or give {run}/export$"):
        NaViT.from_pretrained(run)


def test_a_path_to_nothing_or_to_a_file_is_called_that(run):
    with pytest.raises(ValueError, match="nowhere does not exist; give a folder that"):
        load_pretrained(run / "nowhere")
    with pytest.raises(ValueError, match=r"trainer.json is a file; give the folder that"):
        load_pretrained(run / "checkpoints/step_00000012/trainer.json")


def test_from_inside_a_run_the_command_names_it_all_the_same(run, monkeypatch):
    commands = {"": "zeta export . OUT", "checkpoints": f"zeta export '{run}' OUT"}
    for folder, command in commands.items():
        monkeypatch.chdir(run / folder)
        place = find_run(Path(os.curdir))
        assert place is not None
        assert place.export_command == command


def test_other_folders_with_a_config_are_no_run(tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "outputs").mkdir()
    assert find_run(tmp_path) is None
    assert find_run(tmp_path / "outputs") is None
    (tmp_path / "trainer.json").touch()  # a copy of a checkpoint, away from its run
    assert find_run(tmp_path) is None
