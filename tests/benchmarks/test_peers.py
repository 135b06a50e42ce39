"""A benchmark without its peers says what to install."""

import sys

import pytest

from tests.benchmarks import contestants, workload


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
