"""Models that transformers loads from an export give the features of the same models in zeta."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.zeta.models.published.encoders import outputs
from tests.zeta.small_models import small
from zeta.export.formats import obstacles
from zeta.export.saving import save_pretrained
from zeta.export.transformers.format import FORMAT
from zeta.models.config import load_pretrained

ROPE = {"position": "rope", "pool": "cls", "qk_norm": False}
GRID = {"position": "grid_bilinear", "qk_norm": False, "image_size": 40}
SIZES = [(64, 64), (8, 8), (8, 120), (120, 72), (40, 40)]


def exported(tmp_path, facts=None, **changes):
    model, arguments = small(**changes)
    folder = tmp_path / "out"
    save_pretrained(folder, model.state_dict(), arguments, facts, form="transformers")
    return model, folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True, "layer_scale": 0.1, "registers": 3, "activation": "gelu_tanh"},
        {"bias": True, "qkv_bias": "qv", "norm_eps": 1e-5, "rope_base": 40.0, "rope_rescale": 2.0},
        {"gated_mlp": True, "activation": "silu", "layer_scale": 0.0},
        {"bias": True, "qkv_bias": "none", "activation": "quick_gelu", "image_size": (40, 96)},
        {"arch": "megavit", "parallel": False, "layer_scale": 0.2, "image_size": 40},
    ],
)
@torch.no_grad()
def test_a_rope_model_is_a_dinov3_at_any_size(tmp_path, changes):
    model, folder = exported(tmp_path, **(ROPE | changes))
    theirs, said = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == "DINOv3ViTModel"
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for height, width in [(40, 40)] if model.one_size else SIZES:
        image = torch.randn(3, height, width)
        tokens, pooled = outputs(theirs.eval(), image)
        torch.testing.assert_close(model.forward_embeddings([image]), pooled, atol=1e-4, rtol=0)
        features = model.forward_features([image]).features
        torch.testing.assert_close(features, tokens, atol=1e-4, rtol=0)
    config = theirs.config
    assert config.pos_embed_rescale == changes.get("rope_rescale")


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": True, "activation": "gelu_tanh"}, {"bias": True, "qkv_bias": "qv"}],
)
@torch.no_grad()
def test_a_model_with_a_grid_and_an_attention_pool_is_a_siglip2_at_any_size(tmp_path, changes):
    model, folder = exported(tmp_path, **(GRID | changes))
    theirs, said = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == "Siglip2VisionModel"
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for height, width in SIZES:
        image = torch.randn(3, height, width)
        tokens, pooled = outputs(theirs.eval(), image)
        torch.testing.assert_close(model.forward_embeddings([image]), pooled, atol=1e-4, rtol=0)
        features = model.forward_features([image]).features
        torch.testing.assert_close(features, tokens, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_model_with_a_grid_and_a_mean_pool_is_a_classifier_of_siglip2(tmp_path):
    names = [f"kind {i}" for i in range(7)]
    model, folder = exported(tmp_path, {"class_names": names}, **GRID, pool="mean")
    theirs, said = transformers.AutoModelForImageClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert list(theirs.config.id2label.values()) == names
    image = torch.randn(3, 24, 40)
    cut = image.view(3, 3, 8, 5, 8).permute(1, 3, 2, 4, 0).reshape(1, 15, -1)
    mask = torch.ones(1, 15, dtype=torch.int64)
    logits = theirs.eval()(cut, mask, torch.tensor([[3, 5]])).logits
    torch.testing.assert_close(model([image]), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [ROPE | {"image_size": 40}, GRID])
@torch.no_grad()
def test_pixels_go_through_the_image_processor_as_through_zeta(tmp_path, changes):
    model, folder = exported(tmp_path, **changes)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    found = theirs(**processor(images=Image.fromarray(pixels), return_tensors="pt")).pooler_output
    ours = model.forward_embeddings([torch.from_numpy(pixels).permute(2, 0, 1)])
    torch.testing.assert_close(ours, found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [ROPE, ROPE | {"registers": 2, "bias": True}, GRID])
@torch.no_grad()
def test_what_goes_to_transformers_comes_back_the_same(tmp_path, changes):
    model, folder = exported(tmp_path, **changes)
    back = load_pretrained(folder)
    images = [torch.randn(3, 24, 40), torch.randn(3, 64, 8)]
    ours, theirs = model.forward_embeddings(images), back.forward_embeddings(images)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(
        back.forward_embeddings([pixels]), model.forward_embeddings([pixels]), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"Siglip2VisionModel needs model.position=grid_bilinear, model.qk_norm=false|qk_norm"),
        (ROPE | {"qk_norm": True}, "model.qk_norm is true: .*DINOv3ViTModel needs model.qk_norm=f"),
        (
            ROPE | {"pool": "attention"},
            "model.pool is attention.*DINOv3ViTModel needs model.po",
        ),
        (ROPE | {"rope_coordinates": "max"}, "model.rope_coordinates is max.*=separate;"),
        (GRID | {"layer_scale": 0.1}, "model.layer_scale is 0.1.*needs model.layer_scale=null"),
        (GRID | {"image_size": (40, 48)}, r"model.image_size is \(40, 48\).*model.image_size=48"),
        (ROPE | {"dim_head": 16}, "model.heads x model.dim_head is 3 x 16, not model.dim=24"),
        ({"arch": "megavit"}, "needs .*model.parallel=false"),
    ],
)
def test_what_no_class_has_is_refused_with_the_options_that_would_fit(tmp_path, changes, message):
    model, arguments = small(**changes)
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path / "out", model.state_dict(), arguments, form="transformers")
    assert list(tmp_path.iterdir()) == []


def test_training_does_not_warn_of_a_format_that_few_models_fit():
    assert FORMAT.obstacle(small()[1]) is not None
    assert obstacles(small()[1]) == {}


def test_a_folder_that_was_downloaded_is_not_replaced(tmp_path):
    model, folder = exported(tmp_path, **ROPE)
    save_pretrained(folder, model.state_dict(), small(**ROPE)[1], form="transformers")  # ours is
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds something that is not an exported model"):
        save_pretrained(folder, model.state_dict(), small(**ROPE)[1], form="transformers")
