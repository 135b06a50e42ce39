"""The versions of torch and DeepSpeed that zeta supports, checked before either is used."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec

from zeta.exit_codes import RunError

TORCH = "torch>=2.10"
"""Versions that are accepted; `pyproject.toml` says the same. The tests run with that of
`constraints.txt`, and `make test-oldest` with the oldest, which has not passed as a whole yet."""
DEEPSPEED = "deepspeed>=0.19.8,<0.20"
"""As `TORCH`. Much of what zeta uses of it is private, so the next minor version may lack it."""


class UnsupportedVersionError(RunError, ImportError):
    """A library is missing or has a version that zeta does not support; the text names the fix."""


def check_installed(*requirements: str) -> None:
    """Check the installed versions of libraries, from their metadata: none is imported.

    A pre-release counts as its release: containers ship torch as 2.10.0a0.

    Raises:
        UnsupportedVersionError: a library is not installed or has another version.
    """
    try:
        from packaging.requirements import Requirement
        from packaging.version import Version
    except ModuleNotFoundError:
        return  # torch, einops and safetensors are enough to load an export
    for text in requirements:
        wanted = Requirement(text)
        try:
            found = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            if find_spec(wanted.name) is not None:
                continue  # a build without metadata, whose version nobody knows
            state = "not installed"
        else:
            if Version(found).base_version in wanted.specifier:
                continue
            state = f"installed as {found}"
        raise UnsupportedVersionError(
            f"{wanted.name} is {state}, and zeta supports {text.removeprefix(wanted.name)}: "
            f"pip install '{text}'"
        )
