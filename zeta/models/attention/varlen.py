"""Attention within segments by fused kernels that take boundaries: FlashAttention 2 to 4, cuDNN.

All take queries [Q, H, D], keys and values [T, H, D] and boundaries as they are: no copy, and
launches that depend on the number of tokens and segments alone.

`torch.nn.attention.varlen.varlen_attn` chooses between FlashAttention 2 and cuDNN by itself: cuDNN
on compute capability 9 and 10, where a segment may have more than 128 queries. In `REPLANNING`
releases cuDNN built its plan anew at every call, some 42 ms (pytorch#191576, found behind #187770:
the cache of plans was read and never filled). There, FlashAttention 2 is called by name.
FlashAttention 3 and 4 come from packages of their own, which torch puts in the place of its
FlashAttention 2, for the whole process.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import attention as torch_attention

from zeta.models.attention.segments import Queries, Segments

REPLANNING = ("2.12", "2.14")
"""First release of torch that may replan at every call, and first that does not. The cache is
filled since #191576 of July 2026, which 2.14 contains. That 2.12 takes cuDNN at all is not known;
there, the way around it computes the same."""
_HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None
_LEAST_CUDNN = 91800
_CUDNN_FROM = 256
"""A longest segment, in queries, for which `varlen_attn` takes cuDNN: it does so above 128."""


def replans(version: str) -> bool:
    """Return whether cuDNN's varlen attention makes its plan anew at every call of this torch."""
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    first, sound = (tuple(map(int, name.split("."))) for name in REPLANNING)
    return first <= release < sound


_REPLANS = replans(torch.__version__)


Told = TypeVar("Told", bound=Callable[..., object])


def constant_when_traced(function: Told) -> Told:
    """Let compiled code keep what a function returned while it was traced.

    It does what `torch.compiler.assume_constant_result` does, which imports the compiler at once: 3
    seconds at the start of every command.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


@constant_when_traced
def capability(device: torch.device) -> int | None:
    """Return the major compute capability of a CUDA device; None: there is no device here."""
    return torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else None


def varlen_obstacle(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Return why varlen cannot compute such values, with `channels` a head; None: it can."""
    return _flash_obstacle(device, dtype, channels) or (
        None if _HAS_VARLEN else f"torch {torch.__version__} has no torch.nn.attention.varlen"
    )


def varlen(q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, queries: Queries, keys: Segments) -> Tensor:
    """Compute attention by the kernel that torch chooses; by FlashAttention 2 where it replans."""
    if _REPLANS:
        return flash(q_QHD, k_THD, v_THD, queries, keys)
    return _varlen_attn(q_QHD, k_THD, v_THD, queries, keys, queries.max_seqlen, keys.max_seqlen)


def fa2_obstacle(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Return why FlashAttention 2 cannot compute such values; None: it can."""
    return _flash_obstacle(device, dtype, channels)


def flash(q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, queries: Queries, keys: Segments) -> Tensor:
    """Compute attention by FlashAttention: torch's own, or the package that `activate` put there.

    It is the operator below `varlen_attn`, called directly: that one would take cuDNN instead.
    """
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q_QHD,
        k_THD,
        v_THD,
        queries.cu_seqlens,
        keys.cu_seqlens,
        queries.max_seqlen,
        keys.max_seqlen,
        0.0,  # dropout
        False,  # causal
        False,  # debug mask
    )[0]
    return out


def cudnn_obstacle(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Return why cuDNN's varlen attention cannot compute such values; None: it can."""
    found = varlen_obstacle(device, dtype, channels)
    if found:
        return found
    if _REPLANS or not _takes_cudnn():
        return (
            f"torch {torch.__version__} has none, or makes its plan anew at every call "
            f"(pytorch#191576); install torch {REPLANNING[1]} or newer"
        )
    if channels > 128:
        return f"a head has {channels} channels; cuDNN takes up to 128 backward"
    if (version := torch.backends.cudnn.version() or 0) < _LEAST_CUDNN:
        return f"it needs cuDNN 9.18 or newer, and torch found {version or 'none'}"
    return capability_obstacle(device, (9, 10))


def cudnn(q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, queries: Queries, keys: Segments) -> Tensor:
    """Compute self-attention by cuDNN, for segments of any length.

    The bounds of the lengths are raised to where `varlen_attn` takes cuDNN; bounds they stay.
    """
    most = max(_CUDNN_FROM, keys.max_seqlen)
    return _varlen_attn(q_QHD, k_THD, v_THD, queries, keys, most, most)


def package_obstacle(
    module: str, package: str, capabilities: tuple[int, ...], most_channels: int
) -> Callable[[torch.device, torch.dtype, int], str | None]:
    """Return the check of a FlashAttention that comes with `package` and is imported as `module`.

    Args:
        module: dotted name that torch imports it by.
        package: what to install.
        capabilities: major compute capabilities that it has kernels for.
        most_channels: largest head.
    """

    def obstacle(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
        found = _flash_obstacle(device, dtype, channels)
        if found:
            return found
        if channels > most_channels:
            return f"a head has {channels} channels; it takes up to {most_channels}"
        if lacking := _lacks():
            return f"torch {torch.__version__} has no {lacking}"
        if not _importable(module):
            return f"its package is not installed: pip install {package}"
        return capability_obstacle(device, capabilities)

    return obstacle


def activate(implementation: str | None) -> None:
    """Let FA3 or FA4 compute in the place of torch's FlashAttention, in the whole process.

    None puts torch's own back. Nothing is done if it is as asked already.
    """
    if _lacks():
        return  # older than the choice: torch's own is all there is
    if torch_attention.current_flash_attention_impl() == implementation:
        return
    if implementation is None:
        torch_attention.restore_flash_attention_impl()
    else:
        torch_attention.activate_flash_attention_impl(implementation)


def _lacks() -> str | None:
    """Return a function of this choice that torch does not have: 2.10 cannot go back."""
    verbs = ("current", "activate", "restore")
    names = (f"{verb}_flash_attention_impl" for verb in verbs)
    return next((name for name in names if not hasattr(torch_attention, name)), None)


def _varlen_attn(
    q_QHD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    queries: Queries,
    keys: Segments,
    max_queries: int,
    max_keys: int,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends = queries.cu_seqlens, keys.cu_seqlens
    out = varlen_attn(q_QHD, k_THD, v_THD, *ends, max_queries, max_keys)
    assert isinstance(out, Tensor)
    return out


def _flash_obstacle(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, the tokens are on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, the values are {dtype}"
    if channels % 8 or channels > 256:
        return f"a head has {channels} channels; it takes multiples of 8 up to 256"
    return None


def capability_obstacle(device: torch.device, wanted: tuple[int, ...]) -> str | None:
    """Return that the device has none of these major compute capabilities; None: it has one."""
    found = capability(device)
    if found in wanted:
        return None
    names = " or ".join(f"{major}.x" for major in wanted)
    has = "there is no device" if found is None else f"the device has {found}.x"
    return f"it needs compute capability {names}, {has}"


def _takes_cudnn() -> bool:
    """Return whether the installed `varlen_attn` has a path to cuDNN."""
    from torch.nn.attention import varlen as module

    return hasattr(module, "_can_use_cudnn")


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent
        return False
