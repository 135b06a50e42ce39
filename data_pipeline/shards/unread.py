"""What of a shard will not be read: images, labels and captions beside those that are used.

Names are split at their first dot, as webdataset does. So keys that hold dots put several images
under one key, and only one of them is read; which parts of a shard this leaves out is counted here,
with an example, for whoever indexes or verifies it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from data_pipeline.shards.sample import (
    IMAGE_SUFFIXES,
    NO_IMAGE,
    SampleError,
    pick_image,
    pick_roles,
    suffix_of,
)
from data_pipeline.shards.tar_reader import Member

_UNDER_ONE_KEY = {
    **dict.fromkeys(IMAGE_SUFFIXES, "image beside the one that is read under its key"),
    "cls": "label beside the one that is read under its key",
    "txt": "caption beside the one that is read under its key",
}
_ORDINARY = frozenset({"folder"})
"""Kinds of entries that every tar may hold."""


@dataclass(frozen=True)
class Unread:
    """Members or entries of shards that are not read, of one kind."""

    kind: str
    count: int
    example: str
    """Name of the first one; "" in indexes of earlier versions."""


@dataclass
class UnreadParts:
    """The collector of what is not read, over the samples of one shard."""

    counts: Counter[str] = field(default_factory=Counter)
    """Number of members by kind."""
    examples: dict[str, str] = field(default_factory=dict)
    """Name of the first member by kind."""
    _pictured: set[int] = field(default_factory=set)
    """Hashes of the keys that came with an image."""

    def note(self, kind: str, name: str) -> None:
        """Count one member or entry that is not read."""
        self.counts[kind] += 1
        self.examples.setdefault(kind, name)

    def note_sample(self, key: str, names: Iterable[str]) -> None:
        """Count the members of a sample that are not read; `names` are those of all its members."""
        by_suffix = {suffix_of(name): name for name in names}
        unread = _unread_suffixes(tuple(by_suffix))
        if unread is None:
            return
        self._pictured.add(hash(key))
        for suffix, kind in unread:
            self.note(kind, by_suffix[suffix])

    def reason(self, key: str, reason: str) -> str:
        """Return why a sample is rejected, once all samples of its shard were noted.

        A label without an image beside it may have one elsewhere in the shard.
        """
        if not reason.startswith(NO_IMAGE) or hash(key) not in self._pictured:
            return reason
        return (
            "its image lies elsewhere in the shard, but the members of a sample must lie side by "
            "side: pack them again with `tar --sort=name`, or write the shards again with `zeta "
            "shards build SHARDS OUT`"
        )


@lru_cache(maxsize=1024)
def _unread_suffixes(suffixes: tuple[str, ...]) -> tuple[tuple[str, str], ...] | None:
    """Return (suffix, kind) of what is not read of a sample; None for one without an image."""
    try:
        read = {pick_image(suffixes), *pick_roles(suffixes).values()}
    except SampleError:
        return None
    kinds = ((suffix, _UNDER_ONE_KEY.get(suffix.rpartition(".")[2])) for suffix in suffixes)
    return tuple((suffix, kind) for suffix, kind in kinds if kind and suffix not in read)


def kind_of_entry(member: Member) -> str:
    """Return the kind of a tar entry that belongs to no sample."""
    if member.regular:
        return "file without a suffix, or webdataset meta data"
    return "folder" if member.name.endswith("/") else "link or special file"


def joined(parts: Iterable[tuple[dict[str, int], dict[str, str]]]) -> tuple[Unread, ...]:
    """Return what is not read of several shards, from (counts, examples) of each."""
    counts, examples = Counter[str](), dict[str, str]()
    for of_shard, names in parts:
        counts.update(of_shard)
        examples = names | examples
    return tuple(Unread(kind, n, examples.get(kind, "")) for kind, n in sorted(counts.items()))


def unread_lines(unread: Iterable[Unread]) -> Iterator[str]:
    """Yield the lines that tell a user what is not read, and how to have it read."""
    dotted = False
    for item in unread:
        if item.kind in _ORDINARY or not item.count:
            continue
        dotted |= item.kind in _UNDER_ONE_KEY.values()
        example = f", as {item.example!r}" if item.example else ""
        yield f"not read: {item.count:,} x {item.kind}{example}"
    if dotted:
        yield (
            "names are split at their first dot, as webdataset does; if these are samples of their "
            "own, write their keys without dots (clip_0001.jpg, not clip.0001.jpg)"
        )
