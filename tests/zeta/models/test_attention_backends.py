"""Every attention back-end: on the CPU against the reference, or by its arguments and shapes."""

import copy
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import attention as torch_attention
from torch.nn.attention import flex_attention

from zeta.models.attention import BACKENDS, Segments, attend, obstacle, prepare
from zeta.models.attention import backends as attention_backends
from zeta.models.attention import dense as attention_dense
from zeta.models.attention import flex as attention_flex
from zeta.models.attention import varlen as attention_varlen
from zeta.models.attention.backends import Measured, fastest, known, measured_choice
from zeta.models.initialization import initialize
from zeta.models.layers import Block, BlockShape

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
MIXED = (9, 1, 16, 0, 15, 30, 9, 28)
CASES = [(MIXED, 0), (MIXED, 5), ((12,) * 6, 0), ((12,) * 6, 3), ((1,), 2), ((257, 3), 0)]


def inputs(tokens, queries=None, heads=2, channels=16):
    generator = torch.Generator().manual_seed(0)
    rows = (queries or tokens, tokens, tokens)
    return [torch.randn(n, heads, channels, generator=generator).requires_grad_() for n in rows]


def results(backend, xs, segments, **options):
    """Output and gradients; what is read of the tail has no weight."""
    out = attend(*xs, segments, backend, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    tail = segments.lengths[-1] if not options else options["queries_per_segment"]
    weight[len(weight) - tail :] = 0
    out = out * (weight != 0)
    return out, *torch.autograd.grad((out * weight).sum(), xs)


@pytest.mark.parametrize(("lengths", "tail"), CASES)
def test_dense_batches_equal_the_reference_forward_and_backward(lengths, tail):
    xs = inputs(sum(lengths) + tail)
    segments = Segments.from_lengths(lengths, "cpu", tail)
    for ours, theirs in zip(
        results("dense", xs, segments), results("sdpa_segments", xs, segments), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 3])
def test_dense_batches_take_queries_for_every_segment(queries):
    segments = Segments.from_lengths(MIXED, "cpu", 4)
    xs = inputs(sum(MIXED) + 4, queries * len(segments.lengths))
    both = [
        results(backend, xs, segments, queries_per_segment=queries)
        for backend in ("dense", "sdpa_segments")
    ]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_in_dense_batches_the_tail_has_neither_output_nor_gradient():
    segments = Segments.from_lengths((5, 7), "cpu", 6)
    xs = inputs(18)
    out = attend(*xs, segments, "dense")
    assert out[12:].eq(0).all()
    for grad in torch.autograd.grad(out.square().sum(), xs):
        assert grad[12:].eq(0).all()
        assert grad[:12].ne(0).any()


def test_a_pack_without_images_gives_zeros_and_gradients_of_zero():
    segments = Segments.from_lengths((0, 0), "cpu", 6)
    xs = inputs(6)
    out = attend(*xs, segments, "dense")
    assert out.eq(0).all()
    grads = torch.autograd.grad(out.sum(), [xs[0], xs[2]])
    assert all(grad.eq(0).all() for grad in grads)


INTERPRETED = """
import torch
from tests.zeta.models.test_attention_backends import CASES, inputs, results
from dataclasses import replace
from zeta.models.attention import Segments, attend, backends

short = replace(backends.BACKENDS["short"], obstacle=lambda *_: None)  # there is no device
backends.BACKENDS["short"] = short
shapes = [(*case, 16) for case in CASES]
shapes += [((20, 74, 64, 65, 33), 9, 64), ((20, 66, 130), 70, 72), ((7, 40), 0, 88)]
for lengths, tail, channels in shapes:
    segments = Segments.from_lengths(lengths, "cpu", tail)
    xs = inputs(sum(lengths) + tail, channels=channels)
    both = [results(backend, xs, segments) for backend in ("short", "sdpa_segments")]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    if tail:
        assert attend(*xs, segments, "short")[-tail:].eq(0).all()
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux on x86-64 and arm64")
def test_the_kernel_for_short_images_equals_the_reference_forward_and_backward():
    """By Triton's interpreter, which must be asked for before Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_dense_groups_hold_every_image_once_and_little_padding():
    lengths = [int(n) for n in torch.randint(0, 300, (200,), generator=torch.manual_seed(0))]
    groups = attention_dense.groups(lengths)
    members = sorted(i for group in groups for i in group.members)
    assert members == [i for i, length in enumerate(lengths) if length]
    for group in groups:
        shortest = min(lengths[i] for i in group.members)
        assert shortest >= group.length * (1 - attention_dense.MOST_PADDING)
    assert len(attention_dense.groups([50] * 9)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("lengths", "tail"), [*CASES, ((100, 200, 300, 7, 129), 40)])
def test_flex_equals_the_reference_forward(lengths, tail):
    """It has no gradient on a CPU, so that `attend` refuses it there."""
    segments = Segments.from_lengths(lengths, "cpu", tail)
    xs = [x.detach() for x in inputs(sum(lengths) + tail)]
    queries = attention_varlen.Queries.of(segments)
    used = sum(lengths)
    out = attention_flex.flex(*xs, queries, segments)[:used]
    torch.testing.assert_close(out, attend(*xs, segments)[:used], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(100, 200, 300, 7, 129), (128, 128), (5,) * 70, (1000,)])
def test_the_block_mask_lists_exactly_the_blocks_that_hold_a_pair(lengths):
    segments = Segments.from_lengths(lengths, "cpu", 40)
    same_TT = segments.index_T[:, None] == segments.index_T
    side = -(-len(same_TT) // attention_flex.BLOCK) * attention_flex.BLOCK
    padded = torch.zeros(side, side, dtype=torch.bool)
    padded[: len(same_TT), : len(same_TT)] = same_TT
    tiles = padded.unflatten(0, (-1, attention_flex.BLOCK)).unflatten(2, (-1, attention_flex.BLOCK))
    listed = attention_flex.block_mask(segments).to_dense()[0, 0].bool()
    assert torch.equal(listed, tiles.any(3).any(1))


@pytest.fixture
def on_cuda(monkeypatch):
    """Tensors without memory on a device of compute capability 9, with every package there is."""
    monkeypatch.setattr(attention_varlen, "capability", lambda device: 9)
    monkeypatch.setattr(attention_varlen, "_importable", lambda module: True)
    monkeypatch.setattr(attention_varlen, "activate", lambda name: None)
    # What the oldest torch lacks, too.
    monkeypatch.setattr(attention_varlen, "_takes_cudnn", lambda: True)
    monkeypatch.setattr(attention_varlen, "_lacks", lambda: None)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def fake(tokens, heads=2, channels=64):
    return torch.empty(tokens, heads, channels, device="cuda", dtype=torch.bfloat16)


def fake_segments(lengths):
    ends = torch.empty(len(lengths) + 1, device="cuda", dtype=torch.int32)
    index = torch.empty(sum(lengths), device="cuda", dtype=torch.int64)
    return Segments(ends, lengths, 16, index)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "sdpa_segments"])
def test_each_back_end_gives_the_right_shapes_on_cuda_without_a_device(
    backend, on_cuda, monkeypatch
):
    for name in ("varlen_fa2", "varlen_fa3", "varlen_fa4"):
        monkeypatch.setattr(
            attention_backends,
            "BACKENDS",
            attention_backends.BACKENDS
            | {name: attention_backends.Backend(attention_varlen.flash, lambda *_: None)},
        )
    # Without it, FlexAttention would start the compiler, which takes no tensors without memory.
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    segments = fake_segments((9, 16, 9, 6))
    # Its gradient is traced forward, which would need a device.
    learns = backend != "flex"
    q, k, v = (fake(40).requires_grad_(learns) for _ in range(3))
    out = attend(q, k, v, segments, backend)
    assert (out.shape, out.dtype, out.device.type) == (v.shape, v.dtype, "cuda")
    assert out.requires_grad is learns
    pooled = attend(q[:4], k, v, segments, backend, queries_per_segment=1)
    assert (pooled.shape, pooled.device.type) == ((4, 2, 64), "cuda")


def recorded(monkeypatch):
    """Record the names of the kernels that are called, with their longest segment."""
    from torch.nn.attention import varlen as module

    calls = []

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k):
        calls.append(("varlen_attn", max_q, max_k))
        return torch.empty_like(q)

    def flash(q, k, v, queries, keys):
        calls.append(("flash", queries.max_seqlen, keys.max_seqlen))
        return torch.empty_like(q)

    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention_varlen, "flash", flash)
    return calls


def test_a_torch_that_replans_calls_flash_attention_by_name(on_cuda, monkeypatch):
    calls = recorded(monkeypatch)
    x, segments = fake(40), fake_segments((9, 16, 9, 6))
    for replans in (False, True):
        monkeypatch.setattr(attention_varlen, "_REPLANS", replans)
        attend(x, x, x, segments, "varlen")
    assert calls == [("varlen_attn", 16, 16), ("flash", 16, 16)]


def test_cudnn_is_asked_for_by_bounds_that_torch_takes_it_for(on_cuda, monkeypatch):
    calls = recorded(monkeypatch)
    x, segments = fake(40), fake_segments((9, 16, 9, 6))
    attend(x, x, x, segments, "varlen_cudnn")
    attend(x[:4], x, x, segments, "varlen_cudnn", queries_per_segment=1)
    assert calls == [("varlen_attn", 256, 256), ("varlen_attn", 1, 16)]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.10.0", False),
        ("2.11.0+cu130", False),
        ("2.12.1", True),
        ("2.13.0+cu130", True),
        ("2.14.0", False),
        ("2.15.0.dev20261101", False),
        ("3.0.0", False),
    ],
)
def test_releases_that_replan_at_every_call_are_known_by_name(version, expected):
    assert attention_varlen.replans(version) is expected


@pytest.mark.parametrize(
    ("backend", "channels", "patches", "reason"),
    [
        ("varlen_cudnn", 64, {"_REPLANS": True}, r"pytorch#191576\); install torch 2\.14 or newer"),
        ("varlen_cudnn", 64, {"_takes_cudnn": lambda: False}, r"torch \S+ has none"),
        ("varlen_fa3", 64, {"_lacks": lambda: "a_function"}, r"torch \S+ has no a_function"),
        ("short", 68, {}, "a head has 68 channels; it takes multiples of 8 from 16 to 128"),
        ("varlen_cudnn", 256, {}, "a head has 256 channels; cuDNN takes up to 128"),
        ("varlen_cudnn", 64, {"capability": lambda d: 8}, r"9\.x or 10\.x, the device has 8\.x"),
        ("varlen_cudnn", 64, {"_LEAST_CUDNN": 99999}, "it needs cuDNN 9.18 or newer"),
        ("varlen_fa3", 64, {"capability": lambda d: 10}, r"capability 9\.x, the device has 10\.x"),
        ("varlen_fa3", 64, {"capability": lambda d: None}, "there is no device"),
        ("varlen_fa3", 64, {"_importable": lambda m: False}, "pip install flash-attn-3"),
        ("varlen_fa4", 64, {"_importable": lambda m: False}, "pip install flash-attn-4"),
        ("varlen_fa4", 136, {}, "a head has 136 channels; it takes up to 128"),
        ("varlen_fa4", 20, {}, "multiples of 8"),
        ("flex", 8, {}, "a head has 8 channels; it takes 16 or more"),
    ],
)
def test_what_cannot_run_is_refused_by_name_with_its_reason(
    backend, channels, patches, reason, on_cuda, monkeypatch
):
    for name, value in patches.items():
        monkeypatch.setattr(attention_varlen, name, value)
    x = fake(40, channels=channels)
    with pytest.raises(ValueError, match=rf"backend {backend} cannot run here: .*{reason}"):
        attend(x, x, x, fake_segments((9, 16, 9, 6)), backend)


def test_on_this_machine_the_packages_that_are_missing_are_named():
    for module in ("no_such_package", "no_such_package.cute.interface"):
        assert not attention_varlen._importable(module)
    assert attention_varlen._importable("torch.nn.attention")


def test_on_a_cpu_the_fused_back_ends_say_that_they_need_a_device():
    x = torch.randn(4, 1, 16)
    for backend in BACKENDS:
        if backend.startswith(("varlen", "flex")):
            with pytest.raises(ValueError, match=f"{backend} cannot run here: .*CUDA device"):
                attend(x, x, x, Segments.from_lengths((4,), "cpu"), backend)


def test_a_torch_that_cannot_go_back_to_its_own_kernel_is_left_alone(monkeypatch):
    """As 2.10, which can take another FlashAttention and has no way back."""
    monkeypatch.delattr(torch_attention, "restore_flash_attention_impl", raising=False)
    monkeypatch.setattr(
        torch_attention, "current_flash_attention_impl", lambda: "FA3", raising=False
    )
    assert attention_varlen._lacks() is not None
    attention_varlen.activate(None)


@pytest.mark.skipif(attention_varlen._lacks() is not None, reason="this torch has no way back")
def test_flash_attention_3_is_put_in_place_once_and_taken_back(monkeypatch):
    """By a stand-in for the package, which torch's own registry calls."""
    from torch.nn.attention import _registry

    calls = []

    class Handle:
        def remove(self):
            calls.append("removed")

    def register():
        calls.append("registered")
        return Handle()

    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA3", register)
    try:
        for _ in range(2):
            prepare("varlen_fa3")
        assert torch_attention.current_flash_attention_impl() == "FA3"
        prepare("varlen")  # whatever is active is torch's choice
        assert torch_attention.current_flash_attention_impl() == "FA3"
        prepare("varlen_fa2")
        assert torch_attention.current_flash_attention_impl() is None
    finally:
        attention_varlen.activate(None)
    assert calls == ["registered", "removed"]


def row(tokens, torch_release="2.14", card="H200", channels=64, **times):
    return Measured(card, torch_release, "2026-11-23", channels, tokens, times)


def test_on_an_h200_auto_takes_the_kernel_for_short_images_where_it_was_faster(monkeypatch):
    for release in ("2.11.0", "2.14.1", "2.15.0"):
        rows = known(attention_backends.MEASURED, release)
        monkeypatch.setattr(attention_backends, "_KNOWN", rows)
        for channels in (64, 72, 88, 128):
            assert measured_choice("NVIDIA H200", channels, 64) == "short"
            assert measured_choice("NVIDIA H100 80GB HBM3", channels, 64) == "short"
            assert measured_choice("NVIDIA H200", channels, 256) is None
        assert measured_choice("NVIDIA H200", 80, 64) is None
    assert known(attention_backends.MEASURED, "2.10.0") == ()


def test_a_row_counts_for_its_release_card_and_head_and_at_the_nearest_length(monkeypatch):
    """Rows with a kernel of zeta's own count for later releases too."""
    rows = (
        row(51, varlen=2.0, varlen_cudnn=1.0, dense=0.5),
        row(1024, varlen=2.0, varlen_cudnn=3.0, flex=1.5),
        row(51, "2.13", varlen=2.0, flex=0.1),
        row(256, "2.13", varlen=2.0, short=3.0),
        row(256, "2.15", varlen=2.0, short=0.1),
    )
    assert known(rows, "2.14.1+cu130") == (*rows[:2], rows[3])
    monkeypatch.setattr(attention_backends, "_KNOWN", known(rows, "2.14.1"))
    assert measured_choice("NVIDIA H200", 64, 64) == "varlen_cudnn"
    assert measured_choice("NVIDIA H200", 64, 2048) == "flex"
    assert measured_choice("NVIDIA H200", 64, 256) is None  # varlen won
    assert measured_choice("NVIDIA H200", 72, 64) is None
    assert measured_choice("NVIDIA A100-SXM4-80GB", 64, 64) is None
    assert measured_choice("NVIDIA H200", 64, 0) is None
    assert fastest(row(51, varlen=1.0, flex=2.0)) is None


def test_auto_takes_the_winner_where_it_can_run_and_varlen_elsewhere(on_cuda, monkeypatch):
    calls = recorded(monkeypatch)
    monkeypatch.setattr(attention_backends, "_KNOWN", (row(16, varlen=2.0, varlen_cudnn=1.0),))
    monkeypatch.setattr(attention_backends, "_card", lambda device: "NVIDIA H200")
    x, segments = fake(40), fake_segments((9, 16, 9, 6))
    measured = Segments(*list(vars(segments).values())[:4], mean_seqlen=16)
    attend(x, x, x, measured)
    attend(x[:4], x, x, measured, queries_per_segment=1)  # cuDNN takes no cross-attention here
    monkeypatch.setattr(attention_varlen, "capability", lambda device: 8)
    attend(x, x, x, measured)
    assert calls == [("varlen_attn", 256, 256), ("varlen_attn", 1, 16), ("varlen_attn", 16, 16)]


def test_the_mean_length_leaves_out_empty_images_and_the_tail():
    assert Segments.from_lengths((60, 0, 40, 0), "cpu", 900).mean_seqlen == 64
    assert Segments.from_lengths((0,), "cpu", 9).mean_seqlen == 0


def test_auto_may_take_only_back_ends_whose_launches_fit_every_pack():
    """A CUDA graph of one pack is replayed for others."""
    for name in attention_backends.AUTOMATIC:
        assert attention_backends.BACKENDS[name].fixed_launches
    assert not attention_backends.BACKENDS["dense"].fixed_launches
    assert not attention_backends.BACKENDS["sdpa_segments"].fixed_launches


def test_the_choice_on_cuda_is_traced_without_a_break(monkeypatch):
    """Compiled blocks must not stop for the choice; a device is not needed to trace it."""

    def choice(x):
        name, _ = attention_backends.automatic(CUDA, torch.bfloat16, 64, segments)
        return x + (name == "short") + 2 * (name == "varlen")

    segments = Segments.from_lengths((50, 60), "cpu")
    monkeypatch.setattr(attention_varlen, "capability", lambda device: 9)
    measured = 1 if known(attention_backends.MEASURED, torch.__version__) else 2  # 2.10 was not
    for card, wanted in (("NVIDIA H200", measured), ("another", 2)):
        torch._dynamo.reset()
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, card=card: card)
        compiled = torch.compile(choice, backend="eager", fullgraph=True)
        assert compiled(torch.zeros(1)).item() == wanted


@pytest.mark.slow
def test_dense_batches_work_within_a_compiled_block():
    torch._dynamo.reset()
    plain = Block(BlockShape(dim=32, heads=2, dim_head=16, mlp_dim=48, backend="dense"))
    initialize(plain, 0)
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="eager")
    for lengths in ((5, 9, 5), (4, 4, 11), (19, 0, 0)):
        x = torch.randn(20, 32, generator=torch.Generator().manual_seed(len(lengths)))
        outs = [
            block(x, Segments.from_lengths(lengths, "cpu", 20 - sum(lengths)))
            for block in (plain, compiled)
        ]
        torch.testing.assert_close(outs[1], outs[0], atol=1e-6, rtol=1e-5)


def test_every_back_end_has_an_answer_on_every_device():
    for name in BACKENDS:
        for device in (CPU, CUDA):
            found = obstacle(name, device, torch.float32, 64)
            assert found is None or isinstance(found, str)


def test_a_dry_run_can_count_the_memory_of_dense_batches():
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(24, 2, 16, requires_grad=True) for _ in range(3))
        out = attend(q, k, v, Segments.from_lengths((9, 8, 4), "cpu", 3), "dense")
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [grad.shape for grad in grads] == [q.shape] * 3


ON_CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@pytest.mark.parametrize("channels", [64, 72])
@pytest.mark.parametrize("queries", [None, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_back_end_present_agrees_with_the_reference_in_bf16(
    backend, queries, channels, device
):
    if reason := obstacle(backend, torch.device(device), torch.bfloat16, channels):
        pytest.skip(reason)
    lengths = (9, 1, 160, 0, 150, 300, 33)
    count = queries and queries * (len(lengths) + 1)
    xs = [x.detach().bfloat16() for x in inputs(sum(lengths) + 70, count, 4, channels)]
    options = {"queries_per_segment": queries} if queries else {}
    both = []
    try:
        for where, dtype, name in (
            ("cpu", torch.float32, "sdpa_segments"),
            (device, torch.bfloat16, backend),
        ):
            own = [x.to(where, dtype).requires_grad_() for x in xs]
            out = attend(*own, Segments.from_lengths(lengths, where, 70), name, **options)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            weight[len(weight) - (queries or 70) :] = 0
            grads = torch.autograd.grad((out.float() * weight.to(where)).sum(), own)
            both.append([(out.float().cpu() * (weight != 0)), *(g.float().cpu() for g in grads)])
    finally:
        attention_varlen.activate(None)
    for got, expected in zip(*reversed(both), strict=True):
        torch.testing.assert_close(got, expected, atol=5e-2, rtol=5e-2)


@pytest.mark.slow
def test_attention_is_imported_without_the_compiler():
    """It takes some seconds, at the start of every command."""
    code = "import sys, zeta.models.attention; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
