"""Every field of a config: its key, type, default and documentation, read from the dataclasses.

The documentation of a field is the string literal under it. Python does not keep it at run time, so
it is read from the source.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from launch.config.keys import expected_type, field_types
from launch.config.load import FREE_SECTIONS, ZetaConfig
from zeta.config_field import free_fields


@dataclass(frozen=True)
class ConfigField:
    """One setting, as `zeta config` and docs/config.md describe it."""

    key: str
    """Dotted name, as on the command line."""
    type: str
    """Type in words."""
    default: Any
    """Default value."""
    free: bool
    """Whether a run may be resumed with another value."""
    doc: str
    """Documentation, as one paragraph."""


def config_fields() -> Iterator[ConfigField]:
    """Yield all fields in the order of the dataclasses, section by section."""
    free = free_fields(ZetaConfig)
    for key, default, doc in _walk(ZetaConfig(), ""):
        is_free = key in free or key.startswith(FREE_SECTIONS)
        yield ConfigField(key, expected_type(ZetaConfig, key), default, is_free, doc)


def section_doc(key: str) -> str:
    """Return the first paragraph of the docstring of the dataclass at a dotted key."""
    node: type = ZetaConfig
    for name in key.split("."):
        node = field_types(node)[name]
    return " ".join((inspect.getdoc(node) or "").split("\n\n")[0].split())


def _walk(section: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    docs = dict[str, str]()
    for config_type in reversed(type(section).__mro__[:-1]):  # a subclass documents its own fields
        docs |= field_docs(config_type)
    for item in fields(section):
        value = getattr(section, item.name)
        if is_dataclass(value):
            yield from _walk(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, docs.get(item.name, "")


def field_docs(config_type: type) -> dict[str, str]:
    """Return the documentation of each field of a dataclass that has one, each as one paragraph."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(config_type))).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for item, following in zip(node.body, node.body[1:], strict=False):
        match item, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = " ".join(text.split())
    return docs
