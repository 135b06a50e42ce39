"""Rename published weights as NaViT's, with an account of every tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zeta.stored_tensors import StoredTensor, rows_of, stacked, zeros

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Renaming:
    """Published weights that are taken one by one; what is left at the end is refused.

    Args:
        tensors: weights by their published names.
        prefix: beginning of the names of the encoder; other tensors are not its.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], prefix: str = "") -> None:
        self._left = dict(tensors)
        self._prefix = prefix
        self.made: dict[str, StoredTensor] = {}
        self.notes: list[str] = []

    def has(self, name: str) -> bool:
        """Return whether a tensor of the encoder is there and not yet taken."""
        return self._prefix + name in self._left

    def take(self, name: str) -> StoredTensor:
        """Return a tensor of the encoder, and cross it off.

        Raises:
            ValueError: it is not there.
        """
        if not self.has(name):
            raise ValueError(f"{self._prefix}{name} is missing in the weights")
        return self._left.pop(self._prefix + name)

    def move(self, ours: str, theirs: str, *, bias: bool = False) -> None:
        """Take a weight and its bias, if any; with `bias`, make one of zeros where there is none.

        Args:
            ours: name of a layer in NaViT.
            theirs: published name of the layer.
            bias: whether ours always has one.
        """
        weight = self.made[f"{ours}.weight"] = self.take(f"{theirs}.weight")
        if self.has(f"{theirs}.bias"):
            self.made[f"{ours}.bias"] = self.take(f"{theirs}.bias")
        elif bias:
            self.made[f"{ours}.bias"] = zeros(weight.shape[:1], weight.dtype)

    def outer(self, ours: str, theirs: str) -> None:
        """Take a layer beside the encoder, whose name has not the encoder's prefix."""
        prefix, self._prefix = self._prefix, ""
        self.move(ours, theirs)
        self._prefix = prefix

    def patches(self, theirs: str) -> None:
        """Take the patch embedding, a convolution or a linear layer over channels-last patches."""
        self.move("embeds.proj", theirs)
        self.made["embeds.proj.weight"] = as_linear(self.made["embeds.proj.weight"])

    def stack(self, ours: str, theirs: Sequence[str], *, bias: bool = False) -> None:
        """Take several layers as one, their rows end to end; all have a bias or none has."""
        weight = stacked([self.take(f"{name}.weight") for name in theirs])
        self.made[f"{ours}.weight"] = weight
        if any(self.has(f"{name}.bias") for name in theirs):
            self.made[f"{ours}.bias"] = stacked([self.take(f"{name}.bias") for name in theirs])
        elif bias:
            self.made[f"{ours}.bias"] = zeros(weight.shape[:1], weight.dtype)

    def qkv(self, ours: str, query: str, key: str, value: str) -> str:
        """Take the projections of queries, keys and values; return which have a bias.

        Raises:
            ValueError: a combination that NaViT does not have.
        """
        names = (query, key, value)
        weights = [self.take(f"{name}.weight") for name in names]
        self.made[f"{ours}.qkv.weight"] = stacked(weights)
        there = "".join(c for c, name in zip("qkv", names, strict=True) if self.has(f"{name}.bias"))
        biases = [self.take(f"{name}.bias") for name in names if self.has(f"{name}.bias")]
        if there == "qkv":
            self.made[f"{ours}.qkv.bias"] = stacked(biases)
            return "all"
        if there == "qv":
            self.made |= {f"{ours}.q_bias": biases[0], f"{ours}.v_bias": biases[1]}
            return "qv"
        if there:
            raise ValueError(
                f"{self._prefix}{query}: biases on {', '.join(there)} alone, which NaViT does not "
                "have"
            )
        return "none"

    def leave(self, beginning: str, why: str) -> None:
        """Leave out all tensors whose whole names begin so, and note it."""
        names = [name for name in self._left if name.startswith(beginning)]
        for name in names:
            del self._left[name]
        if names:
            count = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.notes.append(f"{names[0]}{count} left out: {why}")

    def leave_own(self, beginning: str, why: str) -> None:
        """Leave out tensors of the encoder, as `leave`."""
        self.leave(self._prefix + beginning, why)

    def finish(self) -> dict[str, StoredTensor]:
        """Return the weights under NaViT's names.

        Raises:
            ValueError: a tensor was not taken, or one is not of floats; by name.
        """
        if self._left:
            name = next(iter(self._left))
            more = f", nor {len(self._left) - 1} more" if len(self._left) > 1 else ""
            raise ValueError(f"NaViT does not have what {name} belongs to{more}")
        kinds = sorted({str(t.dtype).removeprefix("torch.") for t in self.made.values()})
        if len(kinds) > 1:
            self.notes.append(f"weights of several types, kept as they are: {', '.join(kinds)}")
        return self.made


def as_linear(weight: StoredTensor) -> StoredTensor:
    """Return a convolution [C, channels, p, p] as a linear layer [C, p * p * channels]."""
    if len(weight.shape) == 2:
        return weight
    dim, channels, height, width = weight.shape
    shape = (dim, height * width * channels)
    return weight.changed(lambda kernel: kernel.permute(0, 2, 3, 1).flatten(1), shape)


def grid_table(table: StoredTensor, grid: tuple[int, int], prefix: int) -> StoredTensor:
    """Return a position table [..., prefix + h * w, C] as [1, h, w, C], without the prefix.

    Raises:
        ValueError: it has another number of rows.
    """
    height, width = grid
    rows, dim = table.shape[-2:]
    if rows != prefix + height * width:
        raise ValueError(
            f"the position table has {rows} rows, but config.json says {height} x {width} patches"
            f"{f' after {prefix} more' if prefix else ''}"
        )

    def change(whole: Tensor) -> Tensor:
        return whole.reshape(rows, dim)[prefix:].reshape(1, height, width, dim)

    return table.changed(change, (1, height, width, dim))


def token_with_position(token: StoredTensor, table: StoredTensor, row: int) -> StoredTensor:
    """Return a prefix token [1, n, C] plus its rows of the table [..., N, C]."""
    count, dim = token.shape[-2:] if len(token.shape) > 1 else (1, token.shape[0])

    def change(own: Tensor) -> Tensor:
        rows = table.read().reshape(-1, dim)[row : row + count]
        return own.reshape(1, count, dim) + rows.to(torch.promote_types(own.dtype, rows.dtype))

    return token.changed(change, (1, count, dim))


def attention_pool(renaming: Renaming, name: str) -> None:
    """Take SigLIP's attention pool, whose `MultiheadAttention` stacks queries, keys and values."""
    renaming.made["attn_pool.latent"] = renaming.take(f"{name}.probe")
    for kind in ("weight", "bias"):
        packed = renaming.take(f"{name}.attention.in_proj_{kind}")
        third = packed.shape[0] // 3
        renaming.made[f"attn_pool.q.{kind}"] = rows_of(packed, 0, third)
        renaming.made[f"attn_pool.kv.{kind}"] = rows_of(packed, third, 3 * third)
    renaming.move("attn_pool.proj", f"{name}.attention.out_proj")
    renaming.move("attn_pool.norm", f"{name}.layernorm")
    for layer in ("fc1", "fc2"):
        renaming.move(f"attn_pool.mlp.{layer}", f"{name}.mlp.{layer}")


def check_floats(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError for a tensor of another type than the floats that weights have."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} is of type {tensor.dtype}: zeta reads fp32, fp16 and bf16")
