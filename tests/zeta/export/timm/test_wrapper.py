"""Exports for timm through transformers' wrapper of timm: the logits that timm itself gives."""

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image

from tests.zeta.small_models import small
from zeta.export.saving import save_pretrained

CLASSES = [f"kind {i}" for i in range(7)]


def exported(tmp_path, form="timm", **changes):
    model, arguments = small(**changes)
    facts = {"class_names": CLASSES}
    return model, save_pretrained(tmp_path / "out", model.state_dict(), arguments, facts, form=form)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["timm", "both"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_scale": 0.1, "registers": 2, "bias": True},
        {"layer_scale": 0.0, "pool": "cls", "position": "grid_bilinear"},
        {"position": "rope", "pool": "mean"},
        {"position": "rope+grid_bicubic", "rope_coordinates": "index", "layer_scale": 0.3},
        {"gated_mlp": True, "activation": "silu", "qkv_bias": "qv"},
        {"arch": "megavit"},
        {"arch": "megavit", "parallel": False, "layer_scale": 0.2},
    ],
)
@torch.no_grad()
def test_the_wrapper_gives_the_logits_of_timm_and_zeta(tmp_path, changes, form):
    model, folder = exported(tmp_path, form, **changes)
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    sizes = [(64, 64)] if model.one_size else [(64, 64), (8, 8), (8, 200), (120, 184)]
    for height, width in sizes:
        images = torch.randn(2, 3, height, width)
        found = wrapped(images).logits
        torch.testing.assert_close(found, theirs(images), atol=1e-6, rtol=0)
        torch.testing.assert_close(found, model(list(images)), atol=1e-5, rtol=0)
    assert list(wrapped.config.id2label.values()) == CLASSES


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (48, 200), (230, 70)])
@torch.no_grad()
def test_the_pipeline_of_transformers_names_the_class_that_zeta_finds(tmp_path, size):
    """At the size of the export nothing is resized; at others timm's transform does it."""
    model, folder = exported(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = transformers.pipeline("image-classification", str(folder), device="cpu")(image, top_k=7)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    shown = transform(image)
    assert shown.shape == (3, 64, 64)
    shares = model([shown])[0].softmax(0)
    if size == (64, 64):
        own = model([torch.from_numpy(pixels).permute(2, 0, 1)])[0].softmax(0)
        torch.testing.assert_close(own, shares, atol=1e-5, rtol=0)
    assert [each["label"] for each in found] == [CLASSES[i] for i in shares.argsort().flip(0)]
    expected = [shares[CLASSES.index(each["label"])].item() for each in found]
    assert [each["score"] for each in found] == pytest.approx(expected, abs=1e-5)
