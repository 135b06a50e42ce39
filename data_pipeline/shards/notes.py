"""Warnings about data that can be used, but perhaps not as it is meant."""

from __future__ import annotations

import warnings


class DataWarning(UserWarning):
    """A fault in the data that no rule can mend; the command line shows it as one line."""


def warn(text: str) -> None:
    """Warn about the data."""
    warnings.warn(text, DataWarning, stacklevel=3)
