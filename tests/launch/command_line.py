"""The `zeta` command as a process of its own, for tests of whole runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def zeta(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `zeta ARGUMENTS` in a folder, with one thread a process."""
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
