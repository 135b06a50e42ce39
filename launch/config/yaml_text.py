"""Read YAML that others wrote, within limits that are checked before a parser recurses into it."""

from __future__ import annotations

from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

_MOST_CHARACTERS = 2**20
_DEEPEST = 32
"""Most mappings and lists inside each other. The C parser of 100,000 brackets overflows its stack,
which ends the process; a config has six."""
_SECTIONS = "must hold sections and keys, such as 'train: {max_steps: 10}'"


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """Return the mapping that a YAML text holds, references unresolved; empty for an empty text.

    Args:
        text: one document.
        source: its file, for messages.

    Raises:
        ValueError: no valid YAML, no mapping with names as keys, or beyond the limits of size and
            depth; names the source and, where there is one, line and column.
    """
    try:
        is_mapping = check_yaml(text, source)
    except yaml.YAMLError as error:
        raise ValueError(_invalid(source, error)) from error
    if is_mapping is None:
        return {}
    if not is_mapping:
        raise ValueError(f"{source} {_SECTIONS}")
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OverflowError) as error:
        raise ValueError(_invalid(source, error)) from error
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ValueError(f"{source} {_SECTIONS}")
    return {str(key): value for key, value in tree.items()}


def check_yaml(text: str, source: str) -> bool | None:
    """Check the size and depth of a YAML text without building anything of it.

    Returns:
        Whether it is a mapping; None: it is empty.

    Raises:
        ValueError: too long or too deep; names the source, line and column.
        yaml.YAMLError: no valid YAML.
    """
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(
            f"{source} has {len(text):,} characters of YAML, more than {_MOST_CHARACTERS:,}: it is "
            "no config; give a recipe, or the config.yaml of a run"
        )
    depth, is_mapping = 0, None
    for event in yaml.parse(text, yaml.SafeLoader):  # the parser in Python, which does not recurse
        is_null = isinstance(event, yaml.ScalarEvent) and event.value in ("", "~", "null")
        if isinstance(event, yaml.NodeEvent) and is_mapping is None and not is_null:
            is_mapping = isinstance(event, yaml.MappingStartEvent)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST:
            assert event.start_mark is not None, "an event of a text has its place"
            raise ValueError(
                f"{source} is not valid YAML of a config: more than {_DEEPEST} brackets or "
                f"sections are open inside each other (line {event.start_mark.line + 1}, column "
                f"{event.start_mark.column + 1}); close them, or leave them out"
            )
    return is_mapping


def _invalid(source: str, error: Exception) -> str:
    return f"{source} is not valid YAML: {' '.join(str(error).split())}; correct it there"
