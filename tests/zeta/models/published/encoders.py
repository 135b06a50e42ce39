"""Small encoders of transformers with random weights, and how each is called on one image."""

from __future__ import annotations

import torch
import transformers as hf

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
}
_MLP = SIZES | {"intermediate_size": 44}
_SQUARE = _MLP | {"image_size": 40}
_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_DINOV2 = SIZES | {"image_size": 40, "layerscale_value": 0.5}
_TOWER2 = _MLP | {"num_patches": 25}

ENCODERS = {
    "siglip2": (hf.Siglip2VisionModel, hf.Siglip2VisionConfig(**_TOWER2)),
    "siglip2-no-head": (
        hf.Siglip2VisionModel,
        hf.Siglip2VisionConfig(**_TOWER2, vision_use_head=False),
    ),
    "siglip2-both": (
        hf.Siglip2Model,
        hf.Siglip2Config(vision_config=_TOWER2, text_config=_TEXT),
    ),
    "siglip": (hf.SiglipVisionModel, hf.SiglipVisionConfig(**_SQUARE)),
    "siglip-both": (
        hf.SiglipModel,
        hf.SiglipConfig(vision_config=_SQUARE, text_config=_TEXT),
    ),
    "dinov2": (hf.Dinov2Model, hf.Dinov2Config(**_DINOV2)),
    "dinov2-swiglu": (
        hf.Dinov2Model,
        hf.Dinov2Config(**_DINOV2, use_swiglu_ffn=True, qkv_bias=False),
    ),
    "dinov2-registers": (
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersConfig(**_DINOV2, num_register_tokens=3),
    ),
    "dinov3": (hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**_SQUARE, num_register_tokens=2)),
    "dinov3-gated": (
        hf.DINOv3ViTModel,
        hf.DINOv3ViTConfig(
            **_SQUARE, use_gated_mlp=True, hidden_act="silu", mlp_bias=False, rope_theta=30.0
        ),
    ),
    "dinov3-all-biases": (
        hf.DINOv3ViTModel,
        hf.DINOv3ViTConfig(**_SQUARE, key_bias=True, proj_bias=False),
    ),
    "vit": (hf.ViTModel, hf.ViTConfig(**_SQUARE)),
    "vit-wide": (hf.ViTModel, hf.ViTConfig(**(_MLP | {"image_size": (24, 40)}), qkv_bias=False)),
    "clip": (hf.CLIPVisionModel, hf.CLIPVisionConfig(**_SQUARE)),
    "clip-gelu": (hf.CLIPVisionModel, hf.CLIPVisionConfig(**_SQUARE, hidden_act="gelu")),
    "clip-both": (
        hf.CLIPModel,
        hf.CLIPConfig(vision_config=_SQUARE, text_config=_TEXT, projection_dim=12),
    ),
    "clip-projected": (
        hf.CLIPVisionModelWithProjection,
        hf.CLIPVisionConfig(**_SQUARE, projection_dim=12),
    ),
}
"""Class and config by name."""


@torch.no_grad()
def encoder(name, seed=0):
    """An encoder in evaluation mode, no weight of which is what it began as."""
    kind, config = ENCODERS[name]
    torch.manual_seed(seed)
    return shaken(kind(config))


@torch.no_grad()
def shaken(model):
    """Change every weight: biases are not 0, nor the weights of norms 1."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tower(model):
    """The vision tower of a model, or the model."""
    return getattr(model, "vision_model", model)


@torch.no_grad()
def outputs(model, image):
    """Tokens after the last norm, prefix included, and the pooled vector (None: it has none)."""
    theirs, pixels = tower(model), image[None]
    if "siglip2" in theirs.config.model_type:
        patch, (channels, height, width) = theirs.config.patch_size, image.shape
        h, w = height // patch, width // patch
        cut = image.view(channels, h, patch, w, patch).permute(1, 3, 2, 4, 0).reshape(1, h * w, -1)
        found = theirs(cut, torch.ones(1, h * w, dtype=torch.int64), torch.tensor([[h, w]]))
        return found.last_hidden_state[0], found.pooler_output
    takes = ("siglip_vision_model", "vit", "clip_vision_model")
    resized = {"interpolate_pos_encoding": True} if theirs.config.model_type in takes else {}
    found = theirs(pixels, **resized)
    tokens = found.last_hidden_state[0]
    if theirs.config.model_type == "clip_vision_model":  # the only one to leave them as they are
        tokens = theirs.post_layernorm(tokens)
    return tokens, found.pooler_output
