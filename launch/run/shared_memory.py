"""Check the shared memory in which the workers of the loader keep their locks."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

_FOLDER = Path("/dev/shm")
_KIB_A_WORKER, _KIB_BESIDES = 16, 64
"""Room that locks take: 8 workers were seen to start with 192 KiB and 32 with 512 KiB. Packs are
handed over in memory without a name, which needs no room there (`loading.pack_buffers`), so the 64
MB that a container has by default are enough."""


def check_shared_memory(workers: int, folder: Path = _FOLDER) -> None:
    """Check that a rank's workers can start, instead of a traceback of multiprocessing.

    Args:
        workers: number of processes of the loader.
        folder: where the operating system keeps shared memory.

    Raises:
        ValueError: nothing can be written there, or it is too small.
        OSError: it is full at the moment.
    """
    if workers == 0 or not folder.is_dir():
        return
    advice = (
        "give the container more (docker run --shm-size=1g; for apptainer --bind /dev/shm), or set "
        "data.workers=0"
    )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise ValueError(
                f"the loader's workers keep their locks in {folder}, and nothing can be written "
                f"there ({error.strerror}): {advice}"
            ) from error
    needed = _KIB_A_WORKER * workers + _KIB_BESIDES
    usage = shutil.disk_usage(folder)
    if usage.total < needed * 1024:
        raise ValueError(
            f"the locks of {workers} workers of the loader take {needed} KiB in {folder}, which "
            f"has {usage.total // 1024} KiB: {advice}"
        )
    if usage.free < needed * 1024:
        words = (
            f"{os.strerror(errno.ENOSPC)}: {usage.free // 1024} KiB are free for the {needed} KiB "
            f"of locks of {workers} workers; remove files that others left there, or set "
            "data.workers=0"
        )
        raise OSError(errno.ENOSPC, words, str(folder))
