"""Images and tar shards made by other software than the code under test."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return a smooth RGB picture with some texture: it survives JPEG and resizing."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth).astype(float) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def jpeg(height: int = 40, width: int = 60, seed: int = 0) -> bytes:
    return encode(photo(height, width, seed))


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x010F] = "camera maker"
    block[0x0112] = orientation
    return block


def tar_bytes(
    members: Iterable[tuple[str, bytes] | tarfile.TarInfo], format: int = tarfile.PAX_FORMAT
) -> bytes:
    """Return a tar of (name, content) pairs and of entries without content, by `tarfile`."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return stream.getvalue()


def entry(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))
    return path


def labelled(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Return the members of `count` labelled JPEGs; image n is 20 + n pixels wide, class n % 3."""
    members = []
    for number in range(first, first + count):
        members.append((f"{number:04d}.cls", str(number % 3).encode()))
        members.append((f"{number:04d}.jpg", jpeg(24, 20 + number, number)))
    return members


def error_as_nobody(folder: Path, function: Callable[[], object]) -> str:
    """Return the message of the ValueError of `function` for a user without special rights."""
    for path in list(folder.parents)[:3]:  # of several processes of tests, each has a folder
        path.chmod(0o755)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            function()
        except ValueError as error:
            os.write(send, str(error).encode())
        finally:
            os._exit(0)
    os.close(send)
    os.waitpid(child, 0)
    with os.fdopen(receive, "rb") as stream:
        return stream.read().decode()


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Return `data` with a few bytes changed, a piece cut out, doubled, or its end removed."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        if not changed:
            break
        at = int(rng.integers(len(changed)))
        count = int(rng.integers(1, 600))
        match int(rng.integers(6)):
            case 0 | 1:
                changed[at] = int(rng.integers(256))
            case 2:
                changed[at : at + 4] = bytes(rng.choice([0, 0x7F, 0x80, 0xFF], 4).tolist())
            case 3:
                del changed[at : at + count]
            case 4:
                changed[at:at] = changed[at : at + count]
            case _:
                del changed[at:]
    return bytes(changed)
