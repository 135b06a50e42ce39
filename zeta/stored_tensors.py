"""Tensors that are read when they are needed, and the files that they are read from or streamed to.

The safetensors library writes a file from tensors that are all in memory. Here a file is written
tensor by tensor, so that a model may be larger than the memory of the machine that exports it.
The format is a JSON header after its length in 8 bytes, then the bytes of the tensors
(https://github.com/huggingface/safetensors, "Format"); the library reads what is written here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Name of each type of weights in a safetensors file."""
_ALIGNMENT = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies on disk, or is computed from one that does."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Reads the tensor: of `shape`, on the CPU, of this type or another."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in a file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def changed(
        self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None
    ) -> StoredTensor:
        """Return this tensor with `change` applied when it is read, which may give a new shape."""
        return StoredTensor(shape or self.shape, self.dtype, lambda: change(self.read()))

    def load(self) -> Tensor:
        """Read it as a contiguous tensor of its type.

        Raises:
            ValueError: it has values that its type cannot represent.
        """
        read = self.read().detach()
        tensor = read.to(self.dtype).contiguous()
        narrower = self.dtype.itemsize < read.dtype.itemsize
        if narrower and not tensor.isfinite().all() and read.isfinite().all():
            raise ValueError(
                f"{read.abs().max():.3g} is more than {_NAMES[self.dtype]} can hold: choose bf16 "
                "or fp32"
            )
        return tensor


def load_records(path: Path, **options: Any) -> Any:
    """Return the tensors and plain records of a file that `torch.save` wrote; nothing is executed.

    Args:
        path: a file that somebody may have changed.
        options: options of `torch.load`.

    Raises:
        ValueError: the file is damaged, or holds objects other than these; names it.
        OSError: the file cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged archives and strange pickles raise errors of many kinds
        what = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            f"{path} holds no tensors that can be loaded: it was changed since it was saved "
            f"({type(error).__name__}: {what})"
        ) from error


def in_memory(tensors: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """Return tensors that are in memory already, such as a state dict, as stored ones."""
    return {
        name: StoredTensor(tuple(tensor.shape), tensor.dtype, tensor.cpu)
        for name, tensor in tensors.items()
    }


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
    """Return a tensor of zeros."""
    return StoredTensor(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def stacked(parts: Sequence[StoredTensor]) -> StoredTensor:
    """Return tensors laid end to end along their first dimension, in the widest of their types."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    dtype = reduce(torch.promote_types, (part.dtype for part in parts))
    return StoredTensor(shape, dtype, lambda: torch.cat([part.read() for part in parts]))


def halves(tensor: StoredTensor) -> tuple[StoredTensor, StoredTensor]:
    """Return the first and the second half of a tensor's rows."""
    middle = tensor.shape[0] // 2
    return rows_of(tensor, 0, middle), rows_of(tensor, middle, tensor.shape[0])


def rows_of(tensor: StoredTensor, start: int, stop: int) -> StoredTensor:
    """Return the rows from `start` to `stop` of a tensor."""
    return tensor.changed(lambda whole: whole[start:stop], (stop - start, *tensor.shape[1:]))


def ones(shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
    """Return a tensor of ones."""
    return StoredTensor(shape, dtype, lambda: torch.ones(shape, dtype=dtype))


def total_bytes(tensors: Mapping[str, StoredTensor]) -> int:
    """Return the bytes that tensors take in files, headers left out."""
    return sum(tensor.nbytes for tensor in tensors.values())


def write_safetensors(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write a safetensors file with one tensor in memory at a time.

    Raises:
        OSError: the file cannot be written; names it.
        ValueError: a tensor has values that its type cannot represent; names it.
    """
    # The widest types first, so that every tensor begins at a multiple of its own width.
    names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
    with _naming(path), path.open("wb") as file:
        file.write(_header(names, tensors))
        for name in names:
            _write_tensor(file, name, tensors[name])


def write_sharded(
    directory: Path, stem: str, tensors: Mapping[str, StoredTensor], max_bytes: int
) -> None:
    """Write `stem.safetensors`, or several files and their index where it would be too large.

    The files are `stem-00001-of-00003.safetensors` and so on. The index, which maps each tensor to
    its file, is `stem.safetensors.index.json`, as Hugging Face's libraries lay them out.

    Args:
        directory: folder to write to.
        stem: name of the files without their ending.
        tensors: the tensors by name, in the order in which they are written.
        max_bytes: most bytes of one file; a larger tensor has a file of its own.

    Raises:
        OSError, ValueError: as `write_safetensors`.
    """
    shards = _shards(tensors, max_bytes)
    if len(shards) == 1:
        write_safetensors(directory / f"{stem}.safetensors", tensors)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": weight_map}
    path = directory / f"{stem}.safetensors.index.json"
    with _naming(path):
        path.write_text(json.dumps(index, indent=1) + "\n")


def _shards(tensors: Mapping[str, StoredTensor], max_bytes: int) -> list[list[str]]:
    """Cut the names into runs of at most `max_bytes`."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _header(names: list[str], tensors: Mapping[str, StoredTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: IO[bytes], name: str, stored: StoredTensor) -> None:
    try:
        tensor = stored.load()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    assert tuple(tensor.shape) == stored.shape, f"{name} is {tensor.shape}, not {stored.shape}"
    file.write(tensor.flatten().view(torch.uint8).numpy().data)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError: that of a failed write, on a full disk, has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
