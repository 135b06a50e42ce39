"""The files of one rank of a checkpoint, held in memory, so that training can go on meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import torch

from zeta.checkpoint.hashed_file import FileRecord, write_hashed

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_BLOCK = 2**24


class HeldFiles:
    """Files in memory, of which every byte is as it will be on the disk.

    The memory serves again for the next files: as much as the largest set of them took is kept.
    """

    def __init__(self) -> None:
        self._free: list[bytearray] = []
        self._files: dict[str, _HeldFile] = {}

    def hold(self, path: str, content: object) -> None:
        """Copy `content` as a file for `torch.load`; `path` is relative to the checkpoint.

        Raises:
            MemoryError: there is no room for it.
        """
        file = self._files[path] = _HeldFile(self._free)
        before = torch.serialization.get_crc32_options()
        # torch.load does not read the checksums in the file, and the SHA-256 covers every byte.
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(content, cast(IO[bytes], file))
        finally:
            torch.serialization.set_crc32_options(before)

    def hold_text(self, path: str, text: str) -> None:
        """Hold a text file."""
        file = self._files[path] = _HeldFile(self._free)
        file.write(text.encode())

    def write(self, root: Path) -> list[FileRecord]:
        """Write every file under `root`, and return their records.

        Raises:
            OSError: a file could not be written.
        """
        records = []
        for name, file in self._files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            records.append(write_hashed(root, path, file.parts()))
        return records

    def drop(self) -> None:
        """Forget the files, but keep the memory."""
        for file in self._files.values():
            self._free += file.blocks
        self._files.clear()


class _HeldFile:
    """A file that is written once, from its start to its end, in blocks of memory."""

    def __init__(self, free: list[bytearray]) -> None:
        self._free = free
        self._size = 0
        self.blocks: list[bytearray] = []

    def write(self, data: ReadableBuffer) -> int:
        """Copy all of `data`, as `torch.save` asks."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            start = self._size % _BLOCK
            if start == 0:
                self.blocks.append(self._free.pop() if self._free else bytearray(_BLOCK))
            count = min(len(view) - done, _BLOCK - start)
            memoryview(self.blocks[-1])[start : start + count] = view[done : done + count]
            done += count
            self._size += count
        return done

    def flush(self) -> None:
        """Nothing is held back."""

    def parts(self) -> list[memoryview]:
        """Return the bytes of the file, in order."""
        starts = range(0, self._size, _BLOCK)
        ends = (min(start + _BLOCK, self._size) - start for start in starts)
        return [memoryview(block)[:end] for block, end in zip(self.blocks, ends, strict=True)]
