"""A sample of a WebDataset shard: the members that share a key, and their meaning.

Member names split as in webdataset: ``dir/key.some.ext`` has the key ``dir/key`` and the suffix
``some.ext``, everything after the first dot of the base name, in lower case. A name is a label
for bytes; it is never used as a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

IMAGE_SUFFIXES = (
    "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "image", "img",
    "jfif", "jpe", "pgm", "pnm", "pbm",
)  # fmt: skip
"""Suffixes that mark the image of a sample, the preferred one first."""

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_INTEGER = re.compile(r"[0-9]{1,10}")
_SEPARATOR = re.compile(r"[\s,]+")
_INTEGERS = re.compile(r"[0-9]{1,10}([\s,]+[0-9]{1,10})+")
_MAX_LABEL = 2**31 - 1
_MOST_LABELS = 10_000
_MAX_LABEL_BYTES = 2**20


NO_IMAGE = "no image among its members"
"""Begin of the reason why a sample without an image is rejected."""


class SampleError(ValueError):
    """The error for an unusable sample; the message is the reason, without the sample's name."""


@dataclass(frozen=True)
class Sample:
    """The bytes of one sample."""

    key: str
    members: dict[str, bytes]
    """Content by suffix, in the order of the shard."""
    fault: str = ""
    """Reason why the bytes cannot be trusted; then there are no members."""

    @property
    def image(self) -> bytes:
        """The encoded image; `SampleError` without one."""
        return self.members[pick_image(self.members)]

    def labels(self, class_names: Sequence[str] | None) -> tuple[int, ...] | None:
        """Return the class indices from ``.cls``, or from ``label`` or ``labels`` in ``.json``.

        Return None if there is neither. A class is an integer, or a name in `class_names`.

        Raises:
            SampleError: the labels are malformed.
        """
        roles = pick_roles(self.members)
        if "cls" in roles:
            return parse_labels(self.members[roles["cls"]], class_names)
        if "json" in roles:
            return labels_in_json(self.members[roles["json"]], class_names)
        return None

    @property
    def caption(self) -> str | None:
        """Text of ``.txt``, or of ``caption`` in ``.json``; None if it is absent or blank.

        Raises:
            SampleError: the text is not UTF-8.
        """
        roles = pick_roles(self.members)
        if "txt" in roles:
            try:
                text = self.members[roles["txt"]].decode("utf-8")
            except UnicodeDecodeError as error:
                raise SampleError(f"caption is not UTF-8 (byte {error.start})") from None
            return text if text.strip() else None
        return caption_in_json(self.members[roles["json"]]) if "json" in roles else None


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, suffix) of a member name; None for names that webdataset skips."""
    match = _NAME.fullmatch(name)
    if match is None or ("__" in name and _META.match(name)):
        return None
    return match[1], match[2].lower()


def suffix_of(name: str) -> str:
    """Return the suffix of a name that `split_name` accepts."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def pick_image(suffixes: Iterable[str]) -> str:
    """Return the suffix of the image; a plain one (``jpg``) comes before ``left.jpg``.

    Raises:
        SampleError: no suffix is that of an image.
    """
    suffixes = tuple(suffixes)
    candidates = [suffix for suffix in suffixes if suffix.rpartition(".")[2] in _RANK]
    if not candidates:
        others = {suffix.rpartition(".")[2] for suffix in suffixes} - set(_ROLES)
        found = f" (.{', .'.join(sorted(others)[:3])})" if others else ""
        raise SampleError(f"{NO_IMAGE}{found[:60]}")
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda suffix: ("." in suffix, _RANK[suffix.rpartition(".")[2]]))


_RANK = {suffix: rank for rank, suffix in enumerate(IMAGE_SUFFIXES)}
_ROLES = ("cls", "txt", "json")


def pick_roles(suffixes: Iterable[str]) -> dict[str, str]:
    """Return the suffix of the label (cls), caption (txt) and facts (json), as far as they exist.

    The plain suffix comes first. A key with dots (``photo.v2.jpg``, ``photo.v2.txt``) leaves none:
    then it is the member beside the image (``v2.txt`` for ``v2.jpg``), or the only label or
    caption (``output.cls`` for ``input.jpg``). Facts of another name may be anything.
    """
    listed = tuple(suffixes)
    roles = {role: role for role in _ROLES if role in listed}
    dotted = [s for s in listed if "." in s and s.rpartition(".")[2] in _ROLES]
    if not dotted:
        return roles
    try:
        stem = pick_image(listed).rpartition(".")[0]
    except SampleError:
        stem = ""
    for role in _ROLES:
        named = [suffix for suffix in dotted if suffix.endswith(f".{role}")]
        beside = f"{stem}.{role}"
        if role in roles or not named:
            continue
        if beside in named:
            roles[role] = beside
        elif len(named) == 1 and role != "json":
            roles[role] = named[0]
    return roles


def parse_labels(content: bytes, class_names: Sequence[str] | None) -> tuple[int, ...]:
    """Return the class indices of a ``.cls`` member, without repeats.

    The member is one integer or name; several integers, separated by spaces or commas; or a JSON
    list of integers and names. An empty list is an image of none of the classes.

    Raises:
        SampleError: the member is malformed, or names a class that does not exist.
    """
    if len(content) > _MAX_LABEL_BYTES:
        raise SampleError(f"label of {len(content)} bytes; at most {_MAX_LABEL_BYTES} are read")
    try:
        text = content.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise SampleError("label is not UTF-8") from None
    if text.startswith("[") and text not in _positions(class_names or ()):
        try:
            return _label_set(json.loads(text), class_names)
        except (ValueError, RecursionError) as error:
            if isinstance(error, SampleError):
                raise
            raise SampleError(f"label {text[:80]!r} is not a JSON list") from None
    if _INTEGERS.fullmatch(text):
        return _label_set(_SEPARATOR.split(text), class_names)
    return (parse_label(text, class_names),)


def parse_label(value: str | int, class_names: Sequence[str] | None) -> int:
    """Return the class index of an integer, or of a name in `class_names`; else `SampleError`.

    Digits are always an index, even if the names of classes are numbers.
    """
    text = str(value).strip()
    if _INTEGER.fullmatch(text):
        label = int(text)
        limit = _MAX_LABEL if class_names is None else len(class_names) - 1
        if label > limit:
            raise SampleError(f"label {label} is above the last class, {limit}")
        return label
    if class_names is None:
        raise SampleError(f"label {text[:80]!r} is a name, but there is no classes.json")
    label_of = _positions(class_names)
    if text not in label_of:
        raise SampleError(f"label {text[:80]!r} is a name that is not in classes.json")
    return label_of[text]


_known: tuple[Sequence[str], dict[str, int]] = ((), {})


def _positions(class_names: Sequence[str]) -> dict[str, int]:
    """Return the index of each name; kept for the next call, which has the same names."""
    global _known
    names, positions = _known
    if names is not class_names:
        positions = {name: index for index, name in enumerate(class_names)}
        _known = class_names, positions
    return positions


def labels_in_json(content: bytes, class_names: Sequence[str] | None) -> tuple[int, ...] | None:
    """Return the class indices under ``label`` or ``labels`` in a JSON object.

    `label` may be an integer, a name, or a list of these. `labels`, a key with other uses too,
    counts only if it is a list of valid labels. Return None if there is neither.
    """
    if b'"label' not in content:
        return None
    record = _load_json(content)
    value, values = record.get("label"), record.get("labels")
    if value is not None:
        return _label_set(value if isinstance(value, list) else [value], class_names)
    if not isinstance(values, list) or not all(type(item) in (int, str) for item in values):
        return None
    if class_names is None and not all(isinstance(item, int) for item in values):
        return None
    return _label_set(values, class_names)


def caption_in_json(content: bytes) -> str | None:
    """Return the text under ``caption`` in a JSON object; None if it is absent or blank.

    Raises:
        SampleError: the text is not valid Unicode (JSON can spell half of a surrogate pair).
    """
    if b'"caption"' not in content:
        return None
    value = _load_json(content).get("caption")
    if not isinstance(value, str) or not value.strip():
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleError(f"caption is not valid Unicode (character {error.start})") from None
    return value


def _label_set(values: object, class_names: Sequence[str] | None) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise SampleError(f"label is a {type(values).__name__}, not an integer, name or list")
    if len(values) > _MOST_LABELS:
        raise SampleError(f"{len(values)} labels; an image has at most {_MOST_LABELS}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | str):
            what = type(value).__name__
            raise SampleError(f"label is a {what}, not an integer or a name")
    return tuple(dict.fromkeys(parse_label(value, class_names) for value in values))


def _load_json(content: bytes) -> dict[str, object]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"json cannot be read ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise SampleError("json is not an object")
    return value
