"""What keeps the models usable at scale: memory, compilation, CUDA shapes, meta construction."""

import copy
import random
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.zeta.packs import make_pack
from zeta import MegaVit, NaViT
from zeta.train.engine import compile_blocks

MEMORY_PROGRAM = """
import sys, torch
from pathlib import Path
from zeta import NaViT

def peak():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) // 1024

torch.set_num_threads(1)
images = int(sys.argv[1])
model = NaViT(128, 8, 10, 32, 2, 2, 64, dim_head=16)
model([torch.zeros(3, 8, 8)]).sum().backward()
pixels = [torch.zeros(3, 128, 128, dtype=torch.uint8)] * images
before = peak()
model(pixels).sum().backward()
print(peak() - before)
"""


def added_mebibytes(images):
    """Peak memory that forward and backward of this many images of 256 tokens add."""
    command = [sys.executable, "-c", MEMORY_PROGRAM, str(images)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_memory_grows_with_the_tokens_not_with_their_square():
    few, many = added_mebibytes(16), added_mebibytes(64)
    tokens = 64 * 256
    assert many < 6 * few  # 4 times the tokens; the square would be 16 times
    assert many < tokens**2 / 2**20, "a T x T mask of single bytes alone would take this much"


def small(**changes):
    arguments = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 24, "depth": 2}
    arguments |= {"heads": 3, "mlp_dim": 40, "dim_head": 8}
    return NaViT(**(arguments | changes))


def packs():
    for sizes in ([(32, 32), (8, 40)], [(8, 8)] * 5, [(24, 16), (64, 32), (16, 16)], []):
        yield make_pack([torch.randn(3, *size) for size in sizes], 8, 64, 6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"layer_scale": 0.1, "stochastic_depth": 0.3}])
def test_new_packs_do_not_recompile_the_blocks(options):
    torch._dynamo.reset()
    model, counter = small(**options), CompileCounter()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    for pack in packs():
        model(pack).sum().backward()
    # Blocks share their code; those with another stochastic depth rate are code of their own.
    assert counter.frame_count == (2 if options else 1)


@pytest.mark.slow
def test_lists_of_any_token_count_compile_at_most_twice():
    torch._dynamo.reset()
    model, counter = small(), CompileCounter()
    for block in model.blocks:
        block.compile(backend=counter)
    for sizes in ([(32, 32)], [(8, 40)], [(24, 16)], [(64, 64)]):
        model([torch.randn(3, *size) for size in sizes])
    assert counter.frame_count <= 2


KINDS = {
    "navit": (NaViT, {}, [(8, 8), (32, 32), (8, 40), (24, 16), (48, 16)]),
    "navit with prefix": (NaViT, {"registers": 2, "layer_scale": 0.1}, [(8, 8), (32, 32), (8, 40)]),
    "megavit": (MegaVit, {}, [(32, 32)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_twelve_different_packs_compile_once_for_real_and_train_the_same(kind):
    """Forward and backward through the compiler that a run uses, not through a stand-in."""
    model_class, options, sizes = KINDS[kind]
    torch._dynamo.reset()
    counters.clear()
    eager = model_class(32, 8, 5, 24, 3, 3, 40, dim_head=8, **options)
    compiled = copy.deepcopy(eager)
    compile_blocks(compiled)
    different = set()
    for seed in range(12):
        draw = random.Random(seed)
        images = [torch.randn(3, *draw.choice(sizes)) for _ in range(seed % 7)]
        pack = make_pack(images, 8, 140, 6, eager.prefix_tokens)
        different.add(pack.lengths)
        outs = [model(pack) for model in (eager, compiled)]
        torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)
        for out in outs:
            out.square().sum().backward()
    assert len(different) >= (7 if kind == "megavit" else 10)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for ours, theirs in zip(compiled.parameters(), eager.parameters(), strict=True):
        scale = max(1.0, theirs.grad.abs().max().item())
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("model_class", [NaViT, MegaVit])
def test_on_cuda_the_forward_takes_the_varlen_kernel_with_right_shapes(model_class, monkeypatch):
    """Shapes and dtypes on tensors without memory, no device needed; autograd would need one."""
    import torch.nn.attention.varlen as varlen

    calls = []
    kernel = varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", lambda *args: calls.append(args) or kernel(*args))
    prefix = int(model_class is MegaVit)
    pack = make_pack([torch.zeros(3, 32, 32, dtype=torch.uint8)] * 2, 8, 40, 3, prefix)
    with torch.device("meta"):
        model = model_class(32, 8, 5, 32, 2, 2, 40, dim_head=16).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model.to_empty(device="cuda")
        pack = pack._map(lambda tensor: mode.from_tensor(tensor).to("cuda"))
        out = model(pack)
        assert (out.shape, out.device.type) == ((3, 5), "cuda")
    self_attention = [args for args in calls if args[0].shape[0] == 40]
    assert len(self_attention) == 2
    for q, k, v, cu_q, cu_k, max_q, max_k in self_attention:
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert q.shape == k.shape == v.shape == (40, 2, 16)
        assert cu_q is cu_k
        assert cu_q.shape == (5,)  # 3 images and the tail
        assert max_q == max_k >= 16


def test_a_22b_model_is_built_without_memory_and_filled_one_parameter_at_a_time():
    from zeta.models.config import ModelConfig, build_model
    from zeta.models.initialization import initial_values

    with torch.device("meta"):
        model = build_model(ModelConfig(preset="megavit_22b", num_classes=10))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    first, again, other = (next(initial_values(model, seed)) for seed in (0, 0, 1))
    assert first[0] == "embeds.cls_token"
    assert first[1].shape == model.embeds.cls_token.shape
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
