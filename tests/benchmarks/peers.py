"""The libraries that zeta is measured against, which only the benchmarks need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def peer_imports() -> Iterator[None]:
    """End the program in one line, not in a traceback, if an import inside fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is missing: pip install 'zeta[bench]'") from None
