"""Joined packs, bf16, skipped branches and recorded passes, on a CPU and on a CUDA device.

The cases named cpu run everywhere; `make test-gpu` runs the others.
"""

from dataclasses import replace

import pytest
import torch

from tests.zeta.packs import make_pack, with_seeds
from tests.zeta.train.recorded_jobs import Rerun
from tests.zeta.train.test_recorded import Unsharded
from tests.zeta.training import tiny_navit
from zeta.models.layers import set_stream
from zeta.models.linear import WeightCopies
from zeta.objectives import build_objective
from zeta.objectives.config import ObjectiveConfig
from zeta.packed import join_packs
from zeta.train.engine import compile_blocks
from zeta.train.graphs.recorded import CudaRecorder, RecordedPasses

CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
DRAWS = {"dropout": 0.2, "emb_dropout": 0.1, "stochastic_depth": 0.5}
CLOSE = {"rtol": 3e-2, "atol": 3e-2}
"""Of numbers in bf16 that are added up in another order."""


def _pack(seed, count=16):
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 4, (count, 2), generator=draw).tolist()
    images = [
        torch.randint(0, 256, (1, 4 * h, 4 * w), generator=draw).to(torch.uint8) for h, w in sizes
    ]
    pack = make_pack(images, 4, 128, count + 2)
    used = torch.arange(count + 2) < count
    labels = torch.randint(0, 5, (count + 2,), generator=draw)
    return with_seeds(replace(pack, labels=torch.where(used, labels, -1)), seed)


def _model(device, **changes):
    model = tiny_navit(depth=3, dim_head=16, **(DRAWS | changes)).to(device)
    set_stream(model, torch.bfloat16)
    return model, WeightCopies(model, torch.bfloat16)


def _outputs(model, pack, device):
    """Outputs of the images of a pack in bf16, and the gradients of a sum of them."""
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        out = model(pack)[pack.weights > 0].float()
    (out * torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)).sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters()]


def _assert_close(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], **CLOSE)
    for got, expected in zip(found[1], wanted[1], strict=True):
        assert (got - expected).norm() <= 0.1 * expected.norm() + 1e-3


@DEVICES
def test_joined_packs_give_what_each_gives_alone(device):
    model, _ = _model(device)
    packs = [_pack(seed) for seed in range(3)]
    found = _outputs(model, join_packs(packs, device), device)
    model.zero_grad()
    weights = torch.linspace(-1, 1, found[0].numel(), device=device).view(found[0].shape)
    outputs = []
    for pack, rows in zip(packs, weights.split([pack.num_images for pack in packs]), strict=True):
        with torch.autocast(device, torch.bfloat16):
            outputs.append(model(join_packs([pack], device))[: len(rows)].float())
        (outputs[-1] * rows).sum().backward()
    _assert_close(found, (torch.cat(outputs).detach(), _gradients(model)))


@DEVICES
def test_copies_of_the_weights_and_a_bf16_stream_follow_fp32(device):
    model, copies = _model(device)
    reference = tiny_navit(depth=3, dim_head=16, **DRAWS)
    pack = _pack(0)
    with torch.no_grad():  # the copies follow an update of the weights
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            one.mul_(1.1)
            other.mul_(1.1)
    copies.refresh()
    out, gradients = _outputs(model, join_packs([pack], device), device)
    wanted = reference(pack)[pack.weights > 0]
    (wanted * torch.linspace(-1, 1, wanted.numel()).view(wanted.shape)).sum().backward()
    _assert_close(
        (out.cpu(), [gradient.cpu() for gradient in gradients]),
        (wanted.detach(), [p.grad for p in reference.parameters()]),
    )
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@DEVICES
def test_branches_that_leave_images_out_give_what_zeroing_them_gives(device):
    model, _ = _model(device)
    pack = join_packs([_pack(seed) for seed in range(3)], device)
    assert pack.host_seeds
    _assert_close(
        _outputs(model, pack, device), _outputs(model, replace(pack, host_seeds=()), device)
    )


@DEVICES
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[*CUDA, pytest.mark.slow])])
def test_recorded_passes_give_what_launched_ones_give(device, compiled):
    """Losses, counts and gradients of five packs of other lengths and seeds."""
    torch._dynamo.reset()
    model, copies = _model(device)
    if compiled:
        compile_blocks(model)
    recorder = CudaRecorder() if device == "cuda" else Rerun()
    objective = build_objective(ObjectiveConfig(label_smoothing=0.1), 5)
    engine = Unsharded(model)
    passes = RecordedPasses(engine, objective, recorder, required=True)
    for seed in range(5):
        pack = join_packs([_pack(seed), _pack(seed + 10)], device)
        model.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            mean, sums = passes.run(pack, 0.25)
        mean.backward()
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        # A recording runs every branch on all images: so does the pass that it is compared with.
        with torch.autocast(device, torch.bfloat16):
            outputs = model(replace(pack, host_seeds=()))
        loss = objective.loss_sum(outputs, pack)
        (loss * 0.25).backward()
        torch.testing.assert_close(sums["loss"], loss.detach(), rtol=1e-2, atol=1e-2)
        # Of two outputs that are equal in bf16 either may be the larger one.
        assert abs(sums["top1"].item() - objective.counts(outputs, pack)["top1"].item()) <= 2
        _assert_close((mean.detach(), found), (loss.detach() * 0.25, _gradients(model)))
        with torch.no_grad():  # the weights change in place, as an optimizer changes them
            for parameter in model.parameters():
                parameter.mul_(1.01)
        copies.refresh()
    (static,) = passes._shapes.values()
    assert static.recorded is not None


def _gradients(model):
    return [p.grad.clone() for p in model.parameters()]
