"""The bytes of the members of a sample, compared with the index of their shard as they are read."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.shards.checksum import DamagedSample, checksum
from data_pipeline.shards.sources.sample import FilePart, IndexedPart, SourceSample


def read_members(sample: SourceSample) -> dict[str, bytes]:
    """Return the content of each member, by suffix.

    Bytes that an index knows are read once, compared, and the members cut from them: what is
    returned is what was compared.

    Raises:
        ValueError: a file cannot be read, or became shorter.
        DamagedSample: the bytes of a sample of a shard do not have the checksum of its index.
    """
    data = {run: _compared(run, sample.key) for run in sample.indexed}

    def content(part: FilePart | bytes) -> bytes:
        if isinstance(part, bytes):
            return part
        if (run := sample.run_of(part)) is None:
            return _read(part)
        start = part.offset - run.part.offset
        return data[run][start : start + part.nbytes]

    return {suffix: content(part) for suffix, part in sample.members.items()}


def _compared(run: IndexedPart, key: str) -> bytes:
    data = _read(run.part)
    if checksum(data) != run.checksum:
        raise DamagedSample(run.part.offset, run.part.nbytes, key, run.part.path)
    return data


def _read(part: FilePart) -> bytes:
    try:
        with Path(part.path).open("rb") as stream:
            stream.seek(part.offset)
            data = stream.read(part.nbytes)
    except OSError as error:
        raise ValueError(
            f"cannot read {part.path}: {error.strerror}; make it readable, or remove it from "
            "the source and build into a new folder"
        ) from error
    if len(data) != part.nbytes:
        raise ValueError(f"{part.path} became shorter while shards were built; run the build again")
    return data
