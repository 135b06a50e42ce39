"""Check the shared memory through which the workers of the loader hand over their packs."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

from data_pipeline.config import DataConfig

_FOLDER = Path("/dev/shm")
_PACKS_A_WORKER = 2
"""Packs of a worker that lie in shared memory at a time, at least."""


def check_shared_memory(data: DataConfig, folder: Path = _FOLDER) -> None:
    """Check that a rank's workers can hand over packs, which fails in the middle of a run else.

    Args:
        data: the resolved config: patch size, token budget and number of workers.
        folder: where the operating system keeps shared memory.

    Raises:
        ValueError: nothing can be written there, or it is too small for the packs.
        OSError: it is full at the moment.
    """
    if data.workers == 0 or not folder.is_dir():
        return
    advice = (
        "give the container more (docker run --shm-size=8g; for apptainer --bind /dev/shm), or set "
        "data.workers=0"
    )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise ValueError(
                f"the loader's workers hand over packs through {folder}, and nothing can be "
                f"written there ({error.strerror}): {advice}"
            ) from error
    assert data.patch_size is not None, "the config is resolved"
    needed = _PACKS_A_WORKER * data.workers * data.token_budget * data.patch_size**2 * 3
    usage = shutil.disk_usage(folder)
    if usage.total < needed:
        raise ValueError(
            f"the packs of {data.workers} workers take {needed / 1e6:,.0f} MB in {folder}, which "
            f"has {usage.total / 1e6:,.0f} MB: {advice}"
        )
    if usage.free < needed:
        words = (
            f"{os.strerror(errno.ENOSPC)}: {usage.free / 1e6:,.0f} MB are free for the "
            f"{needed / 1e6:,.0f} MB of packs of {data.workers} workers; remove files that others "
            f"left there, or set data.workers=0"
        )
        raise OSError(errno.ENOSPC, words, str(folder))
