"""Write files that are whole or absent, and read JSON that others may have written.

Files are written under a hidden name beside, then renamed. JSON is read within limits, and every
fault in it is one `ValueError` of one line: the file, the place, and what to do.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, TypeVar, get_args, get_origin, get_type_hints

Record = TypeVar("Record")

_LONGEST_INTEGER = 20
"""Most characters of an integer in JSON: what 64 bits hold, with a sign."""
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""Errors of a file system that cannot sync folders, such as some on FUSE: its renames last anyway,
or nothing that we can do makes them last."""


@contextmanager
def write_whole(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a stream whose content replaces `path` when the block ends without an error.

    Readers see the old file or the new one, never a part. After an error the old file stays, and
    the unfinished one is removed.

    Args:
        path: the file; its folder must exist.
        durable: wait until content and name are on the disk, so that both survive a power failure.

    Raises:
        OSError: the file cannot be written, or did not reach the disk.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with unfinished.open("wb") as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
            unfinished.replace(path)  # before it is closed, which would release a caller's lock
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_whole_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace `path` with `text` in UTF-8, as `write_whole` does."""
    with write_whole(path, durable=durable) as stream:
        stream.write(text.encode())


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Begin of a URL; `pathlib` leaves one slash of two."""
_LONGEST_NAME = 255
"""Most bytes of a name in a path, on the file systems in use."""
_VARIABLE = re.compile(r"\$(\w+|\{\w*\})")


def local_path(text: str | Path, what: str) -> Path:
    """Return the path of an output, `~` expanded.

    Args:
        text: the path as it was given; need not exist.
        what: what gave it, for messages: run.dir, OUT.

    Raises:
        ValueError: empty, a URL, a variable that no shell has expanded, the home of an unknown
            user: it would be written here, where nobody looks for it; or a name that is too long,
            or a link to itself.
    """
    if not str(text).strip():
        raise ValueError(f"{what} is empty; give a path (for the current folder, .)")
    path = Path(text)
    if _URL.match(str(text)):
        raise ValueError(
            f"{what} is {str(text)!r}, a URL; it must be a folder or file on a disk that is "
            "mounted here (for a run: one that all nodes see); write it there, and copy it later"
        )
    variable = _VARIABLE.search(str(text))
    if variable is not None and not path.exists():
        raise ValueError(
            f"{what} is {str(text)!r}, but {variable[0]} is not expanded here, so that no value of "
            "the environment gets into a config: write the path in full, or give it on the command "
            "line in double quotes, where your shell expands it"
        )
    long = next((part for part in path.parts if len(os.fsencode(part)) > _LONGEST_NAME), None)
    if long is not None:
        raise ValueError(
            f"{what} has a name of {len(os.fsencode(long))} bytes in it, {long[:20]}...; file "
            f"systems take {_LONGEST_NAME}: give a shorter one"
        )
    try:
        path = path.expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{what} is {str(text)!r}, but the home folder of {path.parts[0]} is not known: write "
            "the path in full"
        ) from error
    try:
        path.stat()
    except OSError as error:  # it need not exist; who writes there reports all else
        if error.errno == errno.ELOOP:
            raise ValueError(
                f"{what} is {str(text)!r}, a link that leads to itself: give another path"
            ) from error
    return path


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path, *, limit: int, what: str) -> Any:
    """Return the content of a JSON file that somebody else may have written, cut or damaged.

    Args:
        path: a regular file.
        limit: most bytes that are read; a larger file is refused.
        what: what to do about a bad file, as "delete it and type `zeta shards index DIR`".

    Raises:
        ValueError: the file is no regular file, too large, not UTF-8, not JSON, nested too deeply,
            or holds an integer beyond 64 bits or text that is not Unicode; one line that names
            the file, the place in it, and `what`.
        OSError: the file is absent or cannot be read.
    """
    return parse_json(_read_regular(path, limit, what), place=str(path), what=what)


def read_json_lines(path: Path, *, limit: int, what: str) -> Iterator[tuple[str, Any]]:
    """Yield the place ("PATH line N") and the value of each line of a JSON lines file.

    Blank lines are left out. Args and errors are those of `read_json`.
    """
    content = _read_regular(path, limit, what)
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            place = f"{path} line {number}"
            yield place, parse_json(line, place=place, what=what)


def parse_json(content: bytes | str, *, place: str, what: str) -> Any:
    """Return the value of JSON text; `place` names it in errors, see `read_json`."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(text, parse_int=_integer)
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        fault = f"line {error.lineno} column {error.colno}: {error.msg}"
    except UnicodeDecodeError as error:
        fault = f"byte {error.start}: not UTF-8"
    except UnicodeEncodeError:
        fault = "half of a surrogate pair in a text"
    except RecursionError:
        fault = "nested too deeply"
    except ValueError as error:
        fault = str(error)
    else:
        return value
    raise ValueError(f"{place} is damaged ({fault}); {what}")


def as_record(kind: type[Record], value: object, *, place: str, what: str) -> Record:
    """Return a dataclass made from a JSON object, with the type of every field checked.

    Fields may be int, float, str, bool, Any, lists and dicts of these, and unions with None; an
    integer fits a float, and a boolean fits no number.

    Raises:
        ValueError: the value is no object, lacks a field without a default, has another one, or
            one of another type; names `place`, the field, and `what`.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    fault = ""
    if not isinstance(value, dict):
        fault = f"a {type(value).__name__} in the place of an object"
    else:
        hints = _hints(kind)  # type: ignore[arg-type]
        required = (
            name
            for name, field in known.items()
            if field.default is MISSING and field.default_factory is MISSING
        )
        missing = [name for name in required if name not in value]
        strange = [name for name in value if name not in known]
        wrong = [name for name in value if name in known and not _fits(value[name], hints[name])]
        if missing:
            fault = f"{missing[0]} is missing"
        elif strange:
            fault = f"{strange[0][:80]!r} is not known"
        elif wrong:
            fault = f"{wrong[0]} is {json.dumps(value[wrong[0]])[:80]}"
        else:
            return kind(**value)
    raise ValueError(f"{place} is damaged ({fault}); {what}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    """Return the types of the fields of a class; kept, for an index has a record for each shard."""
    return get_type_hints(kind)


def _fits(value: object, hint: Any) -> bool:
    """Return whether a JSON value is of an annotated type."""
    if hint is Any:
        return True
    origin, args = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, arg) for arg in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, args[1]) for item in value.values())
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def _read_regular(path: Path, limit: int, what: str) -> bytes:
    """Return the bytes of a file; one that is not regular could have no end, or never answer."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; {what}")
    with path.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes, which are not read; {what}")
    return content


def _integer(text: str) -> int:
    # Far larger ones would fail where they are used, and far from the file that holds them.
    if len(text) > _LONGEST_INTEGER or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"an integer of {len(text)} digits, beyond 64 bits")
    return int(text)
