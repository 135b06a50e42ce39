"""YAML that others wrote is read within limits, and refused in one line that names its place."""

from __future__ import annotations

import random

import pytest

from launch.config.load import load_config
from launch.config.yaml_text import check_yaml, parse_yaml
from launch.shipped import configs_root

SHARDS = "data.shards=shards/train"
BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
CORPUS = {
    "one number": "5",
    "one word": "word",
    "a list": "[1, 2]",
    "100,000 brackets": "[" * 100_000 + "]" * 100_000,
    "unclosed brackets": "{a: " * 100_000,
    "dashes": "- " * 50_000,
    "deep sections": "\n".join(f"{' ' * i}a:" for i in range(300)),
    "a bomb of aliases": BOMB,
    "an alias of itself": "train: &a {max_steps: *a}",
    "5,000 digits": f"train: {{max_steps: {'9' * 5000}}}",
    "400 digits": f"train: {{max_steps: {'9' * 400}}}",
    "400 digits below zero": f"optim: {{lr: -{'9' * 400}}}",
    "hexadecimal digits": f"train: {{max_steps: 0x{'f' * 20_000}}}",
    "digits in a list": f"optim: {{betas: [{'9' * 400}, 0.9]}}",
    "digits in a mapping": f"optim: {{params: {{momentum: {'9' * 400}}}}}",
    "a tag": "run: {name: !!python/object/apply:os.system ['true']}",
    "a key that is a list": "? [a, b]\n: c",
    "two documents": "run: {name: a}\n---\nrun: {name: b}",
    "a control character": "run: {name: 'a\x01'}",
    "too long": "# " + "x" * 2**20,
}


@pytest.mark.parametrize("text", CORPUS.values(), ids=CORPUS.keys())
def test_a_recipe_that_once_failed_is_refused_in_one_line_that_names_it(tmp_path, text):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml") as refused:
        load_config(str(recipe), [SHARDS])
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("text", ["", "null\n", "---\n", "# nothing\n", "~"])
def test_an_empty_recipe_holds_nothing(text):
    assert parse_yaml(text, "here") == {}


def test_depth_is_refused_with_line_and_column():
    with pytest.raises(ValueError, match=r"here .*line 2, column 35"):
        check_yaml("a: 1\nb: " + "[" * 500, "here")
    assert parse_yaml("{a: " * 9 + "1" + "}" * 9, "here")["a"]["a"] is not None


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        (f"train.max_steps={'9' * 400}", "train.max_steps is a number of about 400 digits"),
        (f"train.max_steps={'9' * 5000}", "train.max_steps"),
        ("train.max_steps=1e300", "train.max_steps is a number of about 300 digits"),
        (f"optim.lr={'9' * 400}", "optim.lr is a number of about 400 digits"),
        ("optim.betas=" + "[" * 100_000, "optim.betas on the command line is not valid YAML"),
        ("optim.betas=" + "[" * 500, "optim.betas on the command line is not valid YAML"),
        (f"optim.params={{a: 0x{'f' * 9999}}}", "optim.params is a number of about"),
    ],
)
def test_a_value_on_the_command_line_is_refused_by_key(setting, part):
    with pytest.raises(ValueError, match=part) as refused:
        load_config("demo", [SHARDS, setting])
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_text_on_the_command_line_may_look_like_anything():
    for text in ("{0..9}.tar", "[[[[[", "2020-13-45", "9" * 5000, "*.tar", "a: b"):
        assert load_config("demo", [f"data.shards={text}"]).data.shards == text or text == "[[[[["


def test_no_mutation_of_a_recipe_ends_otherwise_than_in_a_config_or_one_line(tmp_path):
    rng = random.Random(16)
    shipped = (configs_root() / "demo.yaml").read_text()
    pieces = ["[", "{", "}", "]", ":", "&a ", "*a", "!!int ", "<<: ", "- ", "'", "9" * 400, "\t"]
    pieces += ["${", "${run.name}", "${oc.env:HOME}", "0x", ".inf", "? ", "|", "\x00", "é", "---\n"]
    recipe = tmp_path / "mine.yaml"
    for _ in range(60):
        text = list(shipped)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text))
            text[at : at + rng.choice((0, 1, 30))] = rng.choice(pieces) * rng.choice((1, 2, 60))
        recipe.write_text("".join(text))
        try:
            load_config(str(recipe), [SHARDS])
        except ValueError as error:
            said = str(error)
        else:
            said = str(recipe)
        assert "\n" not in said
        assert len(said) < 2000
