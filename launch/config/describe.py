"""Recipes and configs as text: the list of recipes, all values of one, docs/config.md.

Everything here returns text; `zeta config` prints it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from launch.config.fields import ConfigField, config_fields, section_doc
from launch.config.load import DEFAULT, Setting, compose, read_settings
from launch.config.moved_keys import with_moved_keys
from launch.shipped import configs_root, recipe_names
from zeta.objectives import objective_class

_WIDTH = 100


def recipe_lines() -> list[str]:
    """Return one line a shipped recipe: its name, and the first sentence of its first comment."""
    names = recipe_names()
    width = max(len(name) for name in names) + 2
    return [f"{name:<{width}}{first_sentence(_recipe_text(name))}" for name in names]


def first_sentence(text: str) -> str:
    """Return the first sentence of the comment at the top of a YAML file; "" without one."""
    comment = re.match(r"(?:#.*\n)+", text)
    words = " ".join(line.lstrip("# ") for line in comment[0].splitlines()) if comment else ""
    return re.split(r"(?<=\.) |:$", words, maxsplit=1)[0].strip()


def config_yaml(name_or_path: str, overrides: Sequence[str] = ()) -> str:
    """Return the values of a recipe as YAML, each with its documentation and its source.

    The result is itself a recipe, with the same config.

    Raises:
        ValueError: see `launch.config.load.load_config`; `data.shards` may be missing.
    """
    settings = read_settings(name_or_path, overrides)
    config = compose(settings)
    objective_class(config.objective.kind)  # refuses one that cannot be imported
    values = OmegaConf.to_container(OmegaConf.structured(config))
    sources = _sources(list(with_moved_keys(settings)))
    lines = [f"# All values of {name_or_path}; at the end of a line, where its value comes from."]
    open_sections: list[str] = []
    for item in config_fields():
        *sections, name = item.key.split(".")
        common = sum(1 for _ in _equal_prefix(sections, open_sections))
        for depth, section in enumerate(sections[common:], start=common):
            lines += [""] if depth == 0 else []
            lines.append(f"{'  ' * depth}{section}:")
        open_sections = sections
        indent = "  " * len(sections)
        value: Any = values
        for part in (*sections, name):
            value = value[part]
        lines += textwrap.wrap(
            item.doc, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
        )
        lines.append(f"{indent}{name}: {_flow(value)}  # {_source_of(item.key, sources)}")
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """Return docs/config.md: every field by section, with type, default and documentation."""
    lines = [
        "# Settings",
        "",
        "Every value that a recipe or the command line can set. This page is generated from the",
        "dataclasses in the code by `zeta config --markdown`. `zeta config RECIPE` prints the",
        "values that a recipe gives them.",
        "",
        "A *free* setting may be changed when a run is resumed; a *fixed* one may not, because it",
        "decides which samples a step holds or what the model computes. In the column of defaults,",
        "`null` means that the value is left to the model, the shards or the machine.",
    ]
    by_section: dict[str, list[ConfigField]] = {}
    for item in config_fields():
        by_section.setdefault(item.key.rpartition(".")[0], []).append(item)
    for section, items in by_section.items():
        lines += ["", f"## {section}", "", section_doc(section), ""]
        lines += [
            "| key | type | default | on resume | meaning |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [_row(item) for item in items]
    return "\n".join(lines) + "\n"


def _row(item: ConfigField) -> str:
    cells = (
        f"`{item.key}`",
        item.type,
        f"`{_flow(item.default)}`",
        "free" if item.free else "fixed",
        item.doc,
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _recipe_text(name: str) -> str:
    return (configs_root() / f"{name}.yaml").read_text(encoding="utf-8")


def _sources(settings: Sequence[Setting]) -> dict[str, str]:
    """Return a short name of the source of each key's last setting."""
    return {key: _shorten(source) for source, key, _ in settings}


def _shorten(source: str) -> str:
    if source == DEFAULT:
        return "name of the recipe"
    kind, _, where = source.partition(" ")
    path = Path(where)
    if kind == "in" and path.is_relative_to(configs_root()):
        return f"configs/{path.relative_to(configs_root())}"
    return where.removeprefix("the ")


def _source_of(key: str, sources: dict[str, str]) -> str:
    """Return the source of a key; for a mapping, the sources of all its items."""
    found = [source for set_key, source in sources.items() if set_key == key]
    found += [source for set_key, source in sources.items() if set_key.startswith(f"{key}.")]
    return ", ".join(dict.fromkeys(found)) or "default"


def _equal_prefix(left: Sequence[str], right: Sequence[str]) -> Iterator[str]:
    for one, other in zip(left, right, strict=False):
        if one != other:
            return
        yield one


def _flow(value: object) -> str:
    """Return a value on one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
