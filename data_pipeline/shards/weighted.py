"""Shards as a config names them: one spec, or several weighted specs that are mixed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from data_pipeline.shards.manifest import (
    ALL_SHARDS,
    Manifest,
    Shard,
    ShardSpec,
    Share,
    WeightedSource,
)
from data_pipeline.shards.sample_rows import join_rows


def open_shards(
    spec: ShardSpec | Sequence[Mapping[str, object]], share: Share = ALL_SHARDS
) -> Manifest:
    """Open `data.shards`: a spec as `Manifest.open` takes it, or a list of `{path, weight}`.

    `share` is the part of the shards that is compared with the index, see `Manifest.open`.

    Raises:
        ValueError: an entry has no path or no positive weight, entries with and without weights
            are mixed, or `Manifest.open` raises.
    """
    if isinstance(spec, str) or not isinstance(spec, Sequence):
        return Manifest.open(spec, share)
    weighted = [entry for entry in spec if isinstance(entry, Mapping)]
    plain = [entry for entry in spec if not isinstance(entry, Mapping)]
    if not weighted:
        return Manifest.open(plain, share)
    if plain:
        raise ValueError(
            f"data.shards gives weights to some sources and none to {plain[0]!r}; write every "
            "entry as {path: ..., weight: ...}, or none"
        )
    entries = [_entry(entry) for entry in weighted]
    return _join([(path, weight, Manifest.open(path, share)) for path, weight in entries])


def _entry(entry: Mapping[str, object]) -> tuple[ShardSpec, float]:
    unknown = sorted(set(map(str, entry)) - {"path", "weight"})
    if unknown or "path" not in entry:
        raise ValueError(
            f"data.shards has the entry {dict(entry)}; each needs path and weight, and nothing else"
        )
    path, weight = entry["path"], entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(
            f"data.shards: the weight of {path} is {weight!r}; it must be a number above 0 "
            "(to sample nothing of it, leave the source out)"
        )
    if not isinstance(path, str | Sequence):
        raise ValueError(f"data.shards: path is {path!r}; give a path, a glob or a list of them")
    return path, float(weight)


def _join(parts: list[tuple[ShardSpec, float, Manifest]]) -> Manifest:
    """Join the manifests end to end; a shard that two sources name is a shard of each."""
    shards, sources, first = list[Shard](), list[WeightedSource](), 0
    class_names = parts[0][2].class_names
    for spec, weight, manifest in parts:
        if manifest.class_names != class_names:
            raise ValueError(
                f"data.shards: {parts[0][0]} and {spec} have different class maps (classes.json); "
                "sources that train together need the same one"
            )
        sources.append(
            WeightedSource(str(spec), len(shards), len(shards) + len(manifest.shards), weight)
        )
        shards += [replace(shard, first=shard.first + first) for shard in manifest.shards]
        first += len(manifest.samples)
    manifests = [manifest for _, _, manifest in parts]
    digest = hashlib.sha256("\n".join(manifest.fingerprint for manifest in manifests).encode())
    contents = [manifest.content_digest for manifest in manifests]
    older = hashlib.sha256("\n".join(m.older_fingerprint for m in manifests).encode())
    return Manifest(
        shards=tuple(shards),
        samples=join_rows([manifest.samples for manifest in manifests]),
        class_names=class_names,
        fingerprint=digest.hexdigest(),
        highest_label=max(manifest.highest_label for manifest in manifests),
        older_fingerprint=older.hexdigest(),
        checksums=join_rows([manifest.known_checksums for manifest in manifests]),
        content_digest=hashlib.sha256("\n".join(contents).encode()).hexdigest()
        if all(contents)
        else "",
        sources=tuple(sources),
        label_lists=sum(manifest.label_lists for manifest in manifests),
        most_labels=max(manifest.most_labels for manifest in manifests),
        old_index=next((m.old_index for m in manifests if m.old_index is not None), None),
    )
