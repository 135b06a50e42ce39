"""Weights are copied in bf16 once an update; gradients stay those of the fp32 weights."""

import torch
from torch import nn

from tests.zeta.training import lane_pack, tiny_navit
from zeta.models.layers import set_stream
from zeta.models.linear import Linear, WeightCopies


def test_a_copy_is_used_forward_and_the_gradient_reaches_the_weight_in_fp32():
    layer = Linear(8, 4)
    x = torch.randn(16, 8, dtype=torch.bfloat16)
    copies = WeightCopies(layer, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        wanted = nn.functional.linear(x, layer.weight, layer.bias)  # cast by autocast
    assert torch.equal(out, wanted)
    out.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.abs().sum() > 0
    with torch.no_grad():
        layer.weight.add_(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), out)  # until the copies are refreshed
        copies.refresh()
        assert not torch.equal(layer(x), out)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_no_weight_is_cast_in_a_forward_pass_and_the_stream_is_bf16():
    model, pack = tiny_navit(layer_scale=0.1, dim=20, dim_head=10), lane_pack(0, 0)
    WeightCopies(model, torch.bfloat16)
    set_stream(model, torch.bfloat16)
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, out: streams.append(out.dtype))
    with (
        torch.profiler.profile(record_shapes=True) as profile,
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(pack)
    assert set(streams) == {torch.bfloat16}
    matrices = {tuple(p.shape) for p in model.parameters() if p.ndim == 2}
    cast = [event.input_shapes for event in profile.events() if event.name == "aten::_to_copy"]
    assert cast
    assert not [shapes[0] for shapes in cast if shapes and tuple(shapes[0]) in matrices]
