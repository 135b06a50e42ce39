"""What needs a CUDA device: `make test-gpu`."""

import copy

import pytest
import torch

from tests.zeta.packs import make_pack
from zeta import MegaVit, NaViT
from zeta.models.attention import Segments, attend
from zeta.train.engine import compile_blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTHS = (9, 1, 160, 0, 300, 33)


@pytest.mark.parametrize("tail", [0, 70])
@pytest.mark.parametrize("channels", [64, 128])
def test_varlen_agrees_with_the_reference_in_bf16_forward_and_backward(tail, channels):
    tokens = sum(LENGTHS) + tail
    x = torch.randn(3, tokens, 4, channels, generator=torch.manual_seed(0)).bfloat16()
    weight = torch.randn(tokens, 4, channels)
    weight[sum(LENGTHS) :] = 0
    results = []
    for device, backend, dtype in (("cpu", "auto", torch.float32), ("cuda", "varlen", x.dtype)):
        own = x.to(device, dtype).requires_grad_()
        out = attend(*own, Segments.from_lengths(LENGTHS, device, tail), backend)
        (grad,) = torch.autograd.grad((out.float() * weight.to(device)).sum(), own)
        results.append((out.float().cpu()[: sum(LENGTHS)], grad.float().cpu()))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)


def test_one_query_a_segment_agrees_with_the_reference_in_bf16():
    kv = torch.randn(2, sum(LENGTHS), 4, 64, generator=torch.manual_seed(0)).bfloat16()
    q = torch.randn(len(LENGTHS) + 1, 4, 64).bfloat16()
    outs = [
        attend(
            q.to(device, dtype),
            *kv.to(device, dtype),
            Segments.from_lengths(LENGTHS, device),
            queries_per_segment=1,
        )
        .float()
        .cpu()[:-1]
        for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16))
    ]
    torch.testing.assert_close(outs[1], outs[0], atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("model_class", [NaViT, MegaVit])
def test_a_model_trains_in_bf16_close_to_the_cpu_in_fp32(model_class, compiled):
    torch._dynamo.reset()
    prefix = int(model_class is MegaVit)
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(5)]
    pack = make_pack(images, 8, 400, 7, prefix)
    reference = model_class(64, 8, 5, 128, 3, 2, 256)
    model = copy.deepcopy(reference).cuda()
    if compiled:
        compile_blocks(model)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = model(pack.to("cuda"))
    expected = reference(pack)
    torch.testing.assert_close(out.float().cpu()[:5], expected[:5], atol=5e-2, rtol=5e-2)
    out[:5].float().square().sum().backward()
    expected[:5].square().sum().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        got, wanted = ours.grad.cpu(), theirs.grad
        assert (got - wanted).norm() <= 0.1 * wanted.norm() + 1e-4


def test_memory_on_cuda_grows_with_the_tokens_not_with_their_square():
    added = []
    model = NaViT(128, 8, 10, 128, 2, 2, 256).cuda()
    for count in (16, 64):
        pack = make_pack([torch.zeros(3, 128, 128, dtype=torch.uint8)] * count, 8, count * 256, 64)
        pack = pack.to("cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            model(pack).float().sum().backward()
        added.append(torch.cuda.max_memory_allocated() - before)
    assert added[1] < 5 * added[0]
