import logging
from dataclasses import replace

import pytest
import torch

from tests.zeta.models import plain_navit
from zeta.models import attention
from zeta.models.attention import Segments, attend
from zeta.models.attention import segments as segment_attention
from zeta.models.attention import varlen as attention_varlen
from zeta.models.attention.segments import _by_autograd
from zeta.models.initialization import initialize
from zeta.models.layers import Block, BlockShape, ParallelBlock

LENGTHS = (9, 1, 16, 0, 9, 30, 9)


def qkv(tokens, heads=2, channels=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, tokens, heads, channels)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def plain(q, k, v, lengths, tail):
    out, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        if length:
            o = plain_navit.attention(*(t[rows].permute(1, 0, 2) for t in (q, k, v)))
            out.append(o.unflatten(1, q.shape[1:]))
        start += length
    return torch.cat([*out, q.new_zeros(tail, *q.shape[1:])])


@pytest.mark.parametrize("tail", [0, 5])
@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (257, 3), (40,) * 9, (700, 2)])
def test_each_segment_attends_to_itself_alone_forward_and_backward(lengths, tail):
    x = qkv(sum(lengths) + tail)
    segments = Segments.from_lengths(lengths, "cpu", tail)
    weight = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(1))
    weight[sum(lengths) :] = 0
    (expected,) = torch.autograd.grad((plain(*x, lengths, tail) * weight).sum(), x)
    out = attend(*x, segments)
    (got,) = torch.autograd.grad((out * weight).sum(), x)
    torch.testing.assert_close(out, plain(*x, lengths, tail), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_operator_and_its_autograd_twin_agree():
    """The twin is what a device without the operator (CUDA in fp32) runs."""
    x = qkv(sum(LENGTHS) + 5)
    segments = Segments.from_lengths(LENGTHS, "cpu", 5)
    ends = segments.cu_seqlens
    ours, twin = attend(*x, segments), _by_autograd(*x, ends, ends)
    torch.testing.assert_close(ours, twin, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), x),
        torch.autograd.grad((twin * weight).sum(), x),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_cross_attention_gives_every_segment_its_own_queries():
    x = qkv(sum(LENGTHS) + 4)
    segments = Segments.from_lengths(LENGTHS, "cpu", 4)
    q = torch.randn(2 * len(segments.lengths), 2, 8)
    out = attend(q, x[1], x[2], segments, queries_per_segment=2)
    start = 0
    for i, length in enumerate(LENGTHS):
        rows, queries = slice(start, start + length), slice(2 * i, 2 * i + 2)
        if length:
            kv = (t[rows].permute(1, 0, 2) for t in x[1:])
            expected = plain_navit.attention(q[queries].permute(1, 0, 2), *kv).unflatten(1, (2, 8))
            torch.testing.assert_close(out[queries], expected, atol=1e-6, rtol=1e-5)
        else:
            assert out[queries].eq(0).all()
        start += length


def test_bf16_is_within_its_rounding_of_fp32():
    x = qkv(sum(LENGTHS))
    segments = Segments.from_lengths(LENGTHS, "cpu")
    low = attend(*x.bfloat16(), segments)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), attend(*x, segments), atol=3e-2, rtol=3e-2)


def test_queries_and_keys_take_the_dtype_of_the_values():
    x = qkv(sum(LENGTHS))
    segments = Segments.from_lengths(LENGTHS, "cpu")
    assert attend(x[0], x[1], x[2].bfloat16(), segments).dtype == torch.bfloat16


def test_the_operator_passes_torch_s_own_checks():
    x = qkv(12)
    ends = torch.tensor((0, 5, 10, 12), dtype=torch.int32)
    torch.library.opcheck(
        torch.ops.zeta.segment_attention.default,
        (*(t.detach().requires_grad_() for t in x), ends, ends),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_varlen_on_cpu_is_refused_and_unknown_names_are_listed():
    x = qkv(4)
    segments = Segments.from_lengths((4,), "cpu")
    with pytest.raises(ValueError, match="varlen cannot run here: it needs a CUDA device"):
        attend(*x, segments, "varlen")
    with pytest.raises(ValueError, match="backend is 'flash'; choose one of auto"):
        attend(*x, segments, "flash")
    with pytest.raises(ValueError, match="do not fit"):
        attend(x[0][:3], x[1], x[2], segments)


def test_varlen_gives_the_right_shapes_on_cuda_without_a_device():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        v = torch.empty(40, 2, 64, device="cuda", dtype=torch.bfloat16)
        q = torch.empty(40, 2, 64, device="cuda")
        ends = torch.empty(5, device="cuda", dtype=torch.int32)
        segments = Segments(ends, (9, 16, 9, 6), 16, ends)
        out = attend(q, q, v, segments, "varlen")
        assert (out.shape, out.dtype, out.device.type) == (v.shape, v.dtype, "cuda")
        pooled = attend(q[:4], v, v, segments, "varlen", queries_per_segment=1)
        assert pooled.shape == (4, 2, 64)
        with pytest.raises(ValueError, match="computes in bf16 or fp16"):
            attend(q, q, q, segments, "varlen")


@pytest.mark.parametrize(
    ("dtype", "channels", "reason"),
    [
        (torch.float32, 64, "it computes in bf16 or fp16, the values are torch.float32"),
        (torch.bfloat16, 20, "a head has 20 channels; it takes multiples of 8 up to 256"),
        (torch.float16, 264, "a head has 264 channels"),
    ],
)
def test_falling_back_from_varlen_is_logged_once_with_its_reason(
    dtype, channels, reason, caplog, monkeypatch
):
    from torch._subclasses.fake_tensor import FakeTensorMode

    ran = []
    monkeypatch.setattr(attention, "_reported_fallbacks", set())
    # Stands in for the reference, which would read lengths from a device that is not there.
    monkeypatch.setattr(segment_attention, "sdpa_segments", lambda q, *rest: ran.append(q) or q)
    with FakeTensorMode(allow_non_fake_inputs=True), caplog.at_level(logging.WARNING):
        v = torch.empty(15, 2, channels, device="cuda", dtype=dtype)
        ends = torch.empty(3, device="cuda", dtype=torch.int32)
        segments = Segments(ends, (9, 6), 16, ends)
        for _ in range(2):
            attend(v, v, v, segments)
        attend(v, v, v, segments, "sdpa_segments")  # as asked: nothing to report
        with pytest.raises(ValueError, match=f"varlen cannot run here: {reason}"):
            attend(v, v, v, segments, "varlen")
    assert len(ran) == 3
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"falls back from varlen to sdpa_segments: {reason}" in caplog.text


def test_without_a_device_there_is_nothing_to_fall_back_from(caplog):
    with caplog.at_level(logging.DEBUG):
        attend(*qkv(4), Segments.from_lengths((4,), "cpu"))
    assert caplog.records == []


def test_a_torch_without_the_kernel_is_named(monkeypatch):
    monkeypatch.setattr(attention_varlen, "_HAS_VARLEN", False)
    obstacle = attention.obstacle("varlen", torch.device("cuda"), torch.bfloat16, 64)
    assert obstacle == f"torch {torch.__version__} has no torch.nn.attention.varlen"


def _rotary(places_T, channels):
    angles_TD = places_T[:, None] * torch.logspace(0, -1, channels // 2)
    return angles_TD.cos(), angles_TD.sin()


@pytest.mark.parametrize("kind", [Block, ParallelBlock])
def test_rotary_positions_turn_a_block_by_relative_places_alone(kind):
    block = kind(BlockShape(dim=16, heads=2, dim_head=8, mlp_dim=24))
    initialize(block, 0)
    segments = Segments.from_lengths((5, 3), "cpu", 2)
    x_TC = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    places_T = torch.arange(10.0)

    def output(places_T):
        with torch.no_grad():
            return block(x_TC, replace(segments, rotary=_rotary(places_T, 8)))[:8]

    plain = block(x_TC, segments)[:8].detach()
    assert torch.equal(output(torch.zeros(10)), plain)
    turned = output(places_T)
    assert not torch.allclose(turned, plain, atol=1e-3)
    torch.testing.assert_close(output(places_T + 7), turned, atol=1e-5, rtol=1e-5)
