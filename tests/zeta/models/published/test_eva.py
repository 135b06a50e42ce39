"""DINOv3 and EVA-02 of timm as NaViTs: the same features and logits, or a refusal by name."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.zeta.models.published.encoders import shaken
from zeta import NaViT
from zeta.models.config import load_pretrained

SIZES = {"img_size": 40, "embed_dim": 32, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
SIZES |= {"patch_size": 8}
GRIDS = [(5, 5), (3, 3), (2, 7), (9, 4), (1, 1)]


def saved(folder, architecture, num_classes=0, **changes):
    """A folder as timm's `save_for_hf` lays it out, and the model in it."""
    arguments = SIZES | changes
    torch.manual_seed(0)
    model = shaken(timm.create_model(architecture, num_classes=num_classes, **arguments))
    config = {"architecture": architecture, "num_classes": num_classes, "model_args": arguments}
    config["pretrained_cfg"] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_patch16_dinov3", {"global_pool": "token"}),
        ("vit_small_patch16_dinov3_qkvb", {"rope_rescale_coords": 2.0}),
        ("vit_huge_plus_patch16_dinov3", {}),
        ("eva02_tiny_patch14_224", {}),
        ("eva02_tiny_patch14_336", {"global_pool": "token", "ref_feat_shape": (3, 9)}),
        ("eva02_base_patch14_224", {}),
        ("eva02_large_patch14_448", {"no_embed_class": True, "qk_norm": True, "qkv_bias": False}),
        ("eva_giant_patch14_224", {"init_values": 0.1}),
    ],
)
@torch.no_grad()
def test_features_pooled_output_and_logits_are_those_of_timm_at_any_grid(
    tmp_path, architecture, changes
):
    theirs = saved(tmp_path, architecture, num_classes=7, **changes)
    ours = NaViT.from_pretrained(tmp_path)
    torch.testing.assert_close(ours.mean, torch.tensor([0.4, 0.5, 0.6]))
    images = [torch.randn(3, 8 * h, 8 * w) for h, w in GRIDS]
    tokens, pooled = ours.forward_features(images), ours.forward_embeddings(images)
    logits = ours(images)
    for i, image in enumerate(images):
        features = theirs.forward_features(image[None])
        own = tokens.features[tokens.image_index == i]
        torch.testing.assert_close(own, features[0], atol=1e-4, rtol=0)
        expected = theirs.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled[i : i + 1], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[i : i + 1], theirs(image[None]), atol=1e-4, rtol=0)


def test_a_model_without_a_head_gets_one_of_zeros(tmp_path):
    saved(tmp_path, "vit_small_patch16_dinov3")
    assert load_pretrained(tmp_path)([torch.randn(3, 40, 40)]).tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("eva02_base_patch16_clip_224", {}, r"does not have what blocks.0.attn.norm"),
        ("eva02_tiny_patch14_224", {"use_post_norm": True}, "use_post_norm: NaViT normal"),
        (
            "eva02_tiny_patch14_224",
            {"rope_type": "mixed"},
            "rotary positions of RotaryEmbeddingMix",
        ),
        ("vit_small_patch16_dinov3", {"global_pool": "max"}, "global_pool is max: NaViT pools"),
        ("vit_small_patch16_dinov3", {"rope_grid_indexing": "xy"}, "rope_grid_indexing"),
        ("vit_small_patch16_dinov3", {"attn_only_layer_scale": True}, "gamma_2 is missing"),
    ],
)
def test_what_navit_cannot_express_is_refused_by_name(tmp_path, architecture, changes, message):
    saved(tmp_path, architecture, **changes)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_an_architecture_that_timm_does_not_build_is_refused(tmp_path):
    saved(tmp_path, "vit_small_patch16_dinov3")
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["waves"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"timm cannot build vit_small_patch16_dinov3: .*waves"):
        load_pretrained(tmp_path)
