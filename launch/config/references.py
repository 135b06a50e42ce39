"""References of one config value to another, `${run.name}`: the only expansion that configs have.

OmegaConf also expands `${oc.env:NAME}` and other functions. A config is saved in the run directory,
in every checkpoint, log and model card, and sent to W&B, so a recipe of somebody else could publish
any secret of the environment that way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from launch.config.keys import has_key

_BEGIN = re.compile(r"(\\*)\$\{")
_KEY = re.compile(r"\$\{\s*([A-Za-z_]\w*(?:\.\w+)*)\s*\}")
_MOST = 8
"""Most references in one value, and most that lead on to each other: so that no value grows beyond
all bounds by references to references."""


def check_references(settings: Iterable[tuple[str, str, Any]], root: type) -> None:
    """Check that the values of a config refer to its own keys only.

    Args:
        settings: (source, dotted key, value); of one key the last counts.
        root: dataclass of the whole config.

    Raises:
        ValueError: a function such as `${oc.env:NAME}`, an unknown key, too many references, or a
            circle of them; names key, value and source.
    """
    found: dict[str, list[str]] = {}
    for source, key, value in settings:
        found[key] = []
        for text in _texts(value):
            found[key] += _references(text, key, source, root)
    for key in found:
        _check_chain(key, found)


def _texts(value: Any) -> Iterable[str]:
    """Yield every text in a value, names in mappings included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(name)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _references(text: str, key: str, source: str, root: type) -> list[str]:
    """Return the keys that a text refers to."""
    names = []
    for begin in _BEGIN.finditer(text):
        if len(begin[1]) % 2:  # escaped
            continue
        reference = _KEY.match(text, begin.end() - 2)
        if reference is None or not has_key(root, reference[1]):
            shown = text[begin.end() - 2 : begin.end() + 40].partition("}")
            raise ValueError(
                f"{key} holds {shown[0]}{shown[1]} ({source}), but only keys of the config can be "
                "referred to, as in ${run.name}: variables of the environment and other functions "
                "are never expanded, since a config is saved and logged; write the value itself, "
                "or let your shell expand it on the command line, unless it is a secret"
            )
        names.append(reference[1])
    if len(names) > _MOST:
        raise ValueError(
            f"{key} holds {len(names)} references to other keys ({source}); use at most {_MOST}"
        )
    return names


def _check_chain(key: str, found: Mapping[str, list[str]]) -> None:
    """Raise ValueError if the references from a key lead back to it, or too far."""
    level, seen = [key], 0
    while level := list(dict.fromkeys(name for each in level for name in found.get(each, ()))):
        seen += 1
        if key in level or seen > _MOST:
            raise ValueError(
                f"{key} refers to {', '.join('${' + name + '}' for name in level[:3])}, and that "
                f"{'back to it' if key in level else 'to more and more keys'}: write the value "
                "of one of them in full"
            )
