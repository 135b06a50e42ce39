"""Memory-mapped files that are read once, from end to end: their pages need not stay in memory."""

from __future__ import annotations

import ctypes
from pathlib import Path

_DONTNEED = 4  # MADV_DONTNEED of Linux's sys/mman.h
_EVERY = 16 << 20
"""Bytes that are read before pages are given back: a look at the table of mappings takes 1 ms."""


class MappedFiles:
    """The files below a folder that this process has mapped, and only reads.

    What is read through a mapping counts as this process's memory until the mapping ends. Giving
    the pages back changes nothing that can be seen: the next look reads them again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = f"{folder.resolve()}/"
        self._read = 0

    def was_read(self, nbytes: int) -> None:
        """Note that so many bytes were read; now and then give back the pages of all files."""
        self._read += nbytes
        if self._read >= _EVERY:
            self._read = 0
            self.give_back()

    def give_back(self) -> None:
        """Give the pages back. Does nothing where there is no /proc (macOS)."""
        table = Path("/proc/self/maps")
        if not table.exists():
            return
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for line in table.read_text().splitlines():
            # 7f0b2c000000-7f0b2c400000 rw-p 00000000 00:2a 1234   /runs/first/checkpoints/...
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith(self._folder):
                start, end = (int(address, 16) for address in fields[0].split("-"))
                madvise(start, end - start, _DONTNEED)
