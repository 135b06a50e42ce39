"""ONNX of zeta's own models: right at sizes that the graph was not traced at, or refused."""

import json

import pytest
import torch

from tests.zeta.small_models import small
from tests.zeta.training import tiny_navit
from zeta import MegaVit
from zeta.export.onnx.dense import DenseNaViT
from zeta.export.onnx.format import exported_program, packed_program
from zeta.export.onnx.packed import PackedNaViT, packed_inputs
from zeta.export.saving import save_pretrained

SIZES = [(64, 64), (16, 16), (120, 24), (16, 200), (24, 40)]
MODELS = [
    {},
    {"position": "rope", "registers": 2, "pool": "cls", "qkv_bias": "qv", "layer_scale": 0.1},
    {"position": "grid_bicubic_plain", "pool": "mean", "gated_mlp": True, "pooler": True},
    {"position": "rope+fractional_aspect", "pre_norm": True, "norm_after_pool": True},
]


@pytest.mark.parametrize("changes", [*MODELS, {"position": "grid_bilinear", "mlp_norm": True}])
@torch.no_grad()
def test_the_dense_model_is_the_packed_one_on_images_of_one_size(changes):
    model, _ = small(**changes)
    dense = DenseNaViT(model)
    for size in [*SIZES, (8, 8), (8, 24)]:
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(dense(images), model(list(images)), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("changes", MODELS)
@torch.no_grad()
def test_the_exported_program_is_right_at_other_sizes_and_batches(changes):
    model, _ = small(**changes)
    program = exported_program(model).module()
    for number, size in enumerate(SIZES):
        images = torch.randn(1 + number, 3, *size)
        torch.testing.assert_close(program(images), model(list(images)), atol=1e-5, rtol=0)


PACKS = [
    [(64, 64), (16, 16), (8, 200)],
    [(8, 8), (24, 40)],
    [(16, 16)] * 9,
    [(120, 24), (8, 8), (8, 16), (40, 40), (16, 200)],
]


@pytest.mark.parametrize("changes", [*MODELS, {"position": "grid_bilinear", "mlp_norm": True}])
@torch.no_grad()
def test_the_pack_of_the_graph_is_that_of_the_model(changes):
    model, _ = small(**changes)
    for sizes in [*PACKS, [(8, 8)]]:
        images = [torch.randn(3, *size) for size in sizes]
        found = PackedNaViT(model)(*packed_inputs(model, images))
        torch.testing.assert_close(found, model(images), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("changes", MODELS)
@torch.no_grad()
def test_the_exported_pack_is_right_of_other_numbers_of_images_and_patches(changes):
    model, _ = small(**changes)
    program = packed_program(model).module()
    for sizes in PACKS:
        images = [torch.randn(3, *size) for size in sizes]
        found = program(*packed_inputs(model, images))
        torch.testing.assert_close(found, model(images), atol=1e-5, rtol=0)


def test_torch_export_of_the_model_itself_is_refused_with_what_to_call():
    model, _ = small()
    with pytest.raises(Exception, match=r"take exported_program\(model\), for batches of one size"):
        torch.export.export(model, ([torch.randn(3, 16, 24)],))


def test_a_program_that_could_not_refuse_large_images_is_not_made():
    model, _ = small(position="absolute")
    for export in (exported_program, packed_program):
        with pytest.raises(ValueError, match="a graph cannot refuse images that are larger"):
            export(model)


@pytest.mark.slow
@pytest.mark.parametrize("changes", MODELS)
@torch.no_grad()
def test_onnxruntime_gives_the_logits_at_sizes_that_were_not_traced(tmp_path, changes):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, arguments = small(**changes)
    facts = {"class_names": [f"kind {i}" for i in range(7)]}
    out = save_pretrained(tmp_path / "out", model.state_dict(), arguments, facts, form="onnx")
    session = onnxruntime.InferenceSession(out / "model.onnx")
    for number, size in enumerate(SIZES):
        images = torch.randn(1 + number, 3, *size)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        expected = model(list(images))
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=0)
    said = json.loads((out / "config.json").read_text())["onnx"]
    assert said["class_names"] == facts["class_names"]
    assert said["mean"] == model.mean.tolist()
    save_pretrained(out, model.state_dict(), arguments, facts, form="onnx")  # ours is replaced


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "megavit"}, "model.arch is megavit: zeta writes ONNX of a navit only"),
        ({"position": "absolute"}, "model.position is absolute: a graph cannot refuse images"),
    ],
)
def test_models_whose_graph_would_be_wrong_are_refused(tmp_path, changes, message):
    model, arguments = small(**changes)
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path / "out", model.state_dict(), arguments, form="onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("program", [exported_program, packed_program])
def test_programs_refuse_a_megavit_by_name_and_leave_the_mode_of_a_model(program):
    with pytest.raises(ValueError, match=r"model\.arch is megavit: zeta writes ONNX of a navit"):
        program(MegaVit(8, 4, 3, 16, 1, 2, 32))
    model = tiny_navit(channels=3).train()
    program(model)
    assert model.training
