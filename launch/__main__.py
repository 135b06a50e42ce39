"""`python -m launch` is `zeta`: what launchers start, so that ranks need no script on PATH."""

from __future__ import annotations

import sys

from launch.cli import entry_point

if __name__ == "__main__":
    sys.exit(entry_point())
