"""A sample of a WebDataset shard: the members that share a key, and what they mean.

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
)  # fmt: skip
"""Suffixes that mark the image of a sample, the preferred one first."""

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_INTEGER = re.compile(r"[0-9]{1,10}")
_MAX_LABEL = 2**31 - 1


class SampleError(ValueError):
    """A sample that cannot be used; the message is the reason, without the sample's name."""


@dataclass(frozen=True)
class Sample:
    """The bytes of one sample."""

    key: str
    members: dict[str, bytes]
    """Content by suffix, in the order of the shard."""

    @property
    def image(self) -> bytes:
        """The encoded image; `SampleError` if the sample has none."""
        return self.members[pick_image(self.members)]

    def label(self, class_names: Sequence[str] | None) -> int:
        """Return the class index from ``.cls``, or from ``label`` in ``.json``; -1 if absent.

        A class is an integer, or a name if `class_names` is given. `SampleError` if the label
        cannot be understood.
        """
        if "cls" in self.members:
            return parse_label(self.members["cls"], class_names)
        if "json" in self.members:
            return label_in_json(self.members["json"], class_names)
        return -1

    @property
    def caption(self) -> str | None:
        """Text of ``.txt``, or of ``caption`` in ``.json``; `SampleError` unless it is UTF-8."""
        if "txt" in self.members:
            try:
                return self.members["txt"].decode("utf-8")
            except UnicodeDecodeError as error:
                raise SampleError(f"caption is not UTF-8 (byte {error.start})") from None
        value = _load_json(self.members["json"]).get("caption") if "json" in self.members else None
        return value if isinstance(value, str) else None


def split_name(name: str) -> tuple[str, str] | None:
    """Return (key, suffix) of a member name; None for names that webdataset passes over."""
    match = _NAME.fullmatch(name)
    if match is None or ("__" in name and _META.match(name)):
        return None
    return match[1], match[2].lower()


def suffix_of(name: str) -> str:
    """Return the suffix of a name that `split_name` accepts."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def pick_image(suffixes: Iterable[str]) -> str:
    """Return which suffix is the image: a plain one (``jpg``) before a longer (``left.jpg``).

    `SampleError` if there is none.
    """
    candidates = [suffix for suffix in suffixes if suffix.rpartition(".")[2] in _RANK]
    if not candidates:
        raise SampleError("no image among its members")
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda suffix: ("." in suffix, _RANK[suffix.rpartition(".")[2]]))


_RANK = {suffix: rank for rank, suffix in enumerate(IMAGE_SUFFIXES)}


def parse_label(value: bytes | str | int, class_names: Sequence[str] | None) -> int:
    """Return the class index of an integer, or of a name in `class_names`; else `SampleError`.

    Digits are always an index, even where classes are named by numbers.
    """
    try:
        text = value.decode("utf-8").strip() if isinstance(value, bytes) else str(value).strip()
    except UnicodeDecodeError:
        raise SampleError("label is not UTF-8") from None
    if _INTEGER.fullmatch(text):
        label = int(text)
        limit = _MAX_LABEL if class_names is None else len(class_names) - 1
        if label > limit:
            raise SampleError(f"label {label} is above the last class, {limit}")
        return label
    if class_names is None:
        raise SampleError(f"label {text[:80]!r} is a name, and there is no classes.json")
    if text not in class_names:
        raise SampleError(f"label {text[:80]!r} is a name, and it is not in classes.json")
    return class_names.index(text)


def label_in_json(content: bytes, class_names: Sequence[str] | None) -> int:
    """Return the class index under ``label`` in a JSON object; -1 if absent or null."""
    if b'"label"' not in content:
        return -1
    value = _load_json(content).get("label")
    if value is None:
        return -1
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise SampleError(f"label in json is a {type(value).__name__}, not an integer or a name")
    return parse_label(value, class_names)


def _load_json(content: bytes) -> dict[str, object]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"json cannot be read ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise SampleError("json is not an object")
    return value
