"""The command line: its help, its errors and its exit statuses, as a shell sees them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from importlib import metadata

import pytest
from PIL import Image

from launch.cli import build_parser, entry_point, parse_arguments
from launch.commands.completion import completion_script


def zeta(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def commands() -> list[tuple[str, ...]]:
    found = []

    def walk(parser, path):
        groups = [action for action in parser._actions if hasattr(action, "choices")]
        groups = [action for action in groups if isinstance(action.choices, dict)]
        if not groups:
            found.append(path)
        for group in groups:
            for name, inner in group.choices.items():
                walk(inner, (*path, name))

    walk(build_parser(), ())
    return found


def test_the_commands_of_today_are_there():
    assert set(commands()) == {
        ("demo",),
        ("config",),
        ("shards", "build"),
        ("shards", "index"),
        ("shards", "verify"),
        ("shards", "stats"),
        ("shards", "shrink"),
        ("data", "plan"),
        ("data", "bench"),
        ("data", "audit"),
        ("train",),
        ("launch", "local"),
        ("launch", "check"),
        ("launch", "sizes"),
        ("launch", "preflight"),
        ("launch", "status"),
        ("launch", "watch"),
        ("wandb-sync",),
        ("launch", "slurm"),
        ("launch", "doctor"),
        ("export",),
        ("import",),
        ("finetune",),
        ("eval",),
        ("embed",),
        ("predict",),
        ("completion",),
        ("report",),
        ("experiment",),
    }


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_each_command_has_help_with_an_example_of_itself(command):
    result = zeta(*command, "--help")
    assert result.returncode == 0
    example = result.stdout.partition("example:")[2]
    assert f"zeta {' '.join(command)}" in example


def test_help_answers_at_once_and_loads_no_heavy_library():
    code = (
        "import sys; from launch.cli import build_parser; build_parser().format_help();"
        "print([m for m in ('torch', 'numpy', 'omegaconf', 'deepspeed') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]", loaded.stderr
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        zeta("--help")
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.5


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("shards",),
        ("shards", "build"),
        ("shards", "build", "a", "b", "c"),
        ("launch", "local", "demo", "--nproc", "0"),
        ("launch", "local", "demo", "--nproc", "2", "--nonsense"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_how_it_is_used(arguments):
    result = zeta(*arguments)
    assert result.returncode == 2
    assert "usage: zeta" in result.stderr


@pytest.mark.slow
def test_a_user_error_is_one_message_and_a_traceback_only_with_debug(tmp_path):
    missing = tmp_path / "nowhere"
    result = zeta("shards", "build", missing, tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.startswith("zeta: error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(missing) in result.stderr
    for arguments in (["--debug", "shards", "build"], ["shards", "build", "--debug"]):
        result = zeta(*arguments, missing, tmp_path / "out")
        assert result.returncode == 1
        assert "Traceback" in result.stderr


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    # `zeta ... | true`, with output in more pieces than one pipe buffer holds
    code = (
        "import sys, launch.cli as cli\n"
        "def run(args):\n"
        "    for _ in range(100000): print('x' * 100)\n"
        "    return 0\n"
        "class Args: command = 'report'\n"
        "Args.run = staticmethod(run)\n"
        "cli.parse_arguments = lambda words: Args\n"
        "sys.exit(cli.entry_point([]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=30)


@pytest.mark.parametrize(
    "words",
    [
        ["demo", "--nproc", "2", "a=1", "b=2"],
        ["demo", "a=1", "--nproc", "2", "b=2"],
        ["demo", "a=1", "b=2", "--nproc", "2"],
        ["--nproc", "2", "demo", "a=1", "b=2"],
    ],
)
def test_settings_may_stand_before_and_after_options(words):
    args = parse_arguments(["launch", "local", *words])
    assert (args.config, args.nproc, args.overrides) == ("demo", 2, ["a=1", "b=2"])


@pytest.mark.slow
def test_a_wrong_setting_in_training_is_never_restarted():
    for command in (["train", "demo"], ["launch", "local", "demo", "--nproc", "2"]):
        result = zeta(*command, "data.shards=x", "optim.lr=fast")
        assert result.returncode == 93
        assert result.stderr.count("optim.lr is 'fast'") == 1


@pytest.mark.slow
def test_images_become_shards_and_numbers_that_a_program_can_read(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            image = Image.new("RGB", (40 + number, 30), (number, 0, 0))
            image.save(tmp_path / "photos" / name / f"{number}.jpg")
    (tmp_path / "photos" / "cat" / "broken.jpg").write_bytes(b"no image")
    built = zeta("shards", "build", tmp_path / "photos", tmp_path / "shards", "--json")
    assert built.returncode == 0, built.stderr
    numbers = json.loads(built.stdout)
    assert (numbers["images"], numbers["rejected"], numbers["classes"]) == (6, 1, 2)
    indexed = zeta("shards", "index", tmp_path / "shards", "--json")
    assert json.loads(indexed.stdout) == numbers
    told = zeta("shards", "index", tmp_path / "shards")
    assert "6 images of 2 classes in 1 shard" in told.stdout
    assert "manifest_rejected.jsonl" in told.stdout
    planned = zeta("data", "plan", "demo", "--json", f"data.shards={tmp_path / 'shards'}")
    numbers = json.loads(planned.stdout)
    assert numbers["images"] == 6
    assert numbers["run"]["epochs"] == pytest.approx(numbers["run"]["images"] / 6)
    plan = ("data", "plan", "demo", f"data.shards={tmp_path / 'shards'}", "--images-per-s")
    assert re.search(r"\ntime +\S+ \w+ at 50 images/s", zeta(*plan, "50").stdout)
    assert "--images-per-s: '0' is not a number above 0" in zeta(*plan, "0").stderr


def test_a_name_that_is_no_utf8_is_shown_and_what_to_do(monkeypatch, capsys):
    def write(args: object) -> int:
        "runs/r\udcff/checkpoints".encode()
        return 0

    monkeypatch.setattr("launch.commands.report.run", write)
    assert entry_point(["report", "runs/x"]) == 1
    said = capsys.readouterr().err
    assert "a name is not valid UTF-8 and cannot be written: 'runs/r\\udcff/checkpoints'" in said
    assert "rename the file or folder" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evl"], "zeta: error: no command 'evl' (did you mean eval?): there are demo, config,"),
        (["nonsense"], "zeta: error: no command 'nonsense': there are demo, "),
        (["launch", "statis"], "zeta launch: error: no command 'statis' (did you mean status?)"),
        (
            ["eval", "e", "i", "--resolutons", "9"],
            "no option --resolutons (did you mean --reso",
        ),
        (["train", "demo", "--dryrun"], "(did you mean --dry-run?): `zeta train --help` lists"),
        (["train"], "the following arguments are required: CONFIG\n"),
        (["embed", "e", "i"], "the following arguments are required: OUT\n"),
    ],
)
def test_a_wrong_command_or_option_is_answered_by_the_nearest(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_versions_are_told_without_loading_torch(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--version"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("zeta ")
    assert f"torch {metadata.version('torch')}" in said


def test_the_help_tells_settings_from_arguments_and_options(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["train", "--help"])
    said = capsys.readouterr().out
    arguments, options, settings = (
        said.index(title) for title in ("positional arguments:", "options:", "settings:")
    )
    assert arguments < said.index("CONFIG  ") < options < settings < said.index("key=value   ")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ev"], ["eval"]),
        (["launch", "s"], ["slurm", "sizes", "status"]),
        (["launch", "local", "first_"], ["first_pairs", "first_run", "first_views"]),
        (["train", "demo", "optim.warmup_sh"], ["optim.warmup_share="]),
        (["--debug", "eval", "exports/train", "--per"], ["--per-image"]),
        (["export", "runs/a", "out", "--format", "ti"], ["timm"]),
    ],
)
def test_the_shell_completes_commands_options_recipes_and_settings(words, found):
    script = completion_script(build_parser(), "bash")
    typed = " ".join(f"'{word}'" for word in ["zeta", *words])
    asked = f"COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _zeta; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\n{asked}"], capture_output=True, text=True
    )
    assert done.stdout.split() == found, done.stderr
