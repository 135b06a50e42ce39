"""A seeded mutator of bytes and of JSON, and the property that what reads the result must hold."""

from __future__ import annotations

import copy
import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from launch.errors import USER_ERRORS, message

Result = TypeVar("Result")

_SECONDS = 30
"""Time after which an input counts as endless; they take milliseconds."""
_BYTES = (
    b"\x00", b"\xff", b"\xff\xfe", b"\n", b"{", b"}", b"[", b"]", b'"', b"null", b"-1", b"NaN",
    b"1e999", b"9" * 400, b"[" * 2000, b"\\ud800", b"../", b"/dev/zero", b"\xc3\x28",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "1", "../../x", "/etc/passwd", "\ud800", "a\nb", "${oc.env:HOME}", [], [0], [None],
    [[]], {}, {"a": 1}, {"": None},
)  # fmt: skip


class EndlessError(BaseException):
    """Something reads an input for ever; no `except Exception` hides it."""


def mutated_bytes(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Yield damaged forms of `content`: bits, cuts, runs that are lost, doubled, zeroed or new."""
    rng = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            at = rng.randrange(len(damaged) + 1)
            run = min(rng.choice((1, 2, 7, 64, 512, 4096)), len(damaged) - at)
            match rng.randrange(7):
                case 0 if at < len(damaged):
                    damaged[at] ^= 1 << rng.randrange(8)
                case 1:
                    del damaged[at:]
                case 2:
                    del damaged[at : at + run]
                case 3:
                    damaged[at:at] = damaged[at : at + run]
                case 4:
                    damaged[at : at + run] = bytes(run)
                case 5:
                    damaged[at : at + rng.choice((0, run))] = rng.choice(_BYTES)
                case _:
                    damaged[at : at + run] = rng.randbytes(run)
        yield bytes(damaged)


def mutated_json(value: Any, count: int, seed: int) -> Iterator[Any]:
    """Yield forms of a JSON value in which one entry is of another type, gone, new or doubled."""
    rng = random.Random(seed)
    for _ in range(count):
        changed = copy.deepcopy(value)
        places = list(_places(changed))
        holder, key = rng.choice(places)
        match rng.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("", "x", "a/b", "version"))] = rng.choice(_VALUES)
            case 2:
                other, where = rng.choice(places)
                holder[key] = copy.deepcopy(other[where])
            case _:
                holder[key] = rng.choice(_VALUES)
        yield changed


def mutated_text_of_json(value: Any, count: int, seed: int) -> Iterator[bytes]:
    """Yield damaged texts of a JSON value: half of them of other values, half of other bytes."""
    for changed in mutated_json(value, count // 2, seed):
        yield json.dumps(changed).encode()
    yield from mutated_bytes(json.dumps(value, indent=1).encode(), count - count // 2, seed)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (holder, key) of every entry of dicts and lists, the outer ones first."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def outcome(function: Callable[[], Result], box: Path) -> Result | str:
    """Return the result of `function`, or the message of an error that users can correct.

    Fails if it raises an error of another kind or of several lines, goes on for ever, or writes
    outside `box`, its folder: beside it, or into the working directory.
    """
    beside, here = _names(box.parent, box), _names(Path.cwd(), box)

    def end(*_: object) -> None:
        raise EndlessError(f"not done after {_SECONDS} s")

    previous = signal.signal(signal.SIGALRM, end)
    signal.alarm(_SECONDS)
    said = None
    try:
        found: Result | str = function()
    except USER_ERRORS as error:
        found = said = message(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    if said is not None:
        assert said.strip()
        assert "\n" not in said, said
        assert len(said) < 4000, said[:4000]
    assert _names(box.parent, box) == beside
    assert _names(Path.cwd(), box) == here
    return found


def _names(folder: Path, box: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path not in (box, folder / "__pycache__")}
