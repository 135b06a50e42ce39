"""Packing pays, counted in operations, which no busy machine changes; a missing peer is named."""

import sys

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks import contestants, workload
from zeta.models.attention import segments as segment_attention


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "least"),
    [
        pytest.param(workload.realistic(12), 1.7, id="photographs"),
        # No padding to save: packing must not cost anything (vit-pytorch #347).
        pytest.param(workload.of_shapes([(32, 32)] * 64), 1.0, id="tiny images of one size"),
    ],
)
def test_a_training_step_takes_fewer_operations_than_timm_on_a_padded_batch(
    work, least, monkeypatch
):
    # The operator of its own is opaque to the counter; the reference computes the same.
    monkeypatch.setattr(segment_attention, "sdpa_segments", segment_attention._by_autograd)
    built = {"zeta": contestants.zeta_list(work), "timm": contestants.timm_naflex(work)}
    counts = {}
    for name, (model, logits) in built.items():
        model.train()
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(logits(), work.labels).backward()
        counts[name] = counter.get_total_flops()
    assert counts["timm"] / counts["zeta"] > least
    assert torch.isfinite(next(built["zeta"][0].parameters()).grad).all()


@pytest.mark.parametrize(
    ("build", "package"),
    [
        (contestants.lucid_nested, "vit_pytorch"),
        (contestants.padded_vit, "vit_pytorch"),
        (contestants.timm_naflex, "timm"),
    ],
)
def test_a_missing_peer_ends_the_program_in_one_line(build, package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        SystemExit, match=rf"^{package}\S* is missing: pip install 'zeta\[bench\]'$"
    ):
        build(workload.of_shapes([(32, 32)]))


def test_another_error_of_a_peer_is_not_hidden(monkeypatch):
    monkeypatch.setattr(contestants, "WIDTH", -1)
    pytest.importorskip("vit_pytorch")
    with pytest.raises((RuntimeError, ValueError)):
        contestants.padded_vit(workload.of_shapes([(32, 32)]))
