"""NaViT from the weights of timm's models and of SigLIP: the same outputs, or a refusal by name."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn

from tests.zeta.small_models import small
from tests.zeta.training import tiny_navit
from zeta.exit_codes import RunError
from zeta.export.saving import save_pretrained
from zeta.export.timm import navit_from_timm
from zeta.models.published.fitting import fit_timm, nearest_factors
from zeta.models.published.timm_weights import open_timm
from zeta.train.init_sources import check_initial_weights, open_weights

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "mlp_ratio": 1.5}


@torch.no_grad()
def shaken(model):
    """No weight is what it began as: biases are not 0, nor the weights of norms 1."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def assert_same(ours, theirs, sizes):
    for height, width in sizes:
        images = torch.randn(2, ours.channels, height, width)
        torch.testing.assert_close(ours(list(images)), theirs(images), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"no_embed_class": True, "reg_tokens": 4},
        {"reg_tokens": 2, "init_values": 0.1, "qk_norm": True},
        {"class_token": False, "global_pool": "avg", "fc_norm": False, "qkv_bias": False},
        {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
        {"class_token": False, "global_pool": "avg"},
        {"pre_norm": True},
    ],
)
def test_a_vision_transformer_of_timm_gives_its_logits_at_any_size(options):
    theirs = VisionTransformer(
        img_size=48, num_classes=7, dynamic_img_size=True, **(SIZES | options)
    )
    theirs = shaken(theirs)
    changes = {"activation": "gelu_tanh"} if "act_layer" in options else {}
    heads = None if options.get("qk_norm") else 3  # a norm of the queries tells them
    ours = navit_from_timm(theirs.state_dict(), heads=heads, **changes)
    assert not ours.training
    assert_same(ours, theirs, ((48, 48), (48, 72), (16, 120), (80, 80)))


def test_a_position_table_that_is_not_square_takes_its_image_size():
    theirs = VisionTransformer(img_size=(16, 48), num_classes=7, **SIZES)
    theirs = shaken(theirs)
    with pytest.raises(ValueError, match="pos_embed has 13 rows, not a square of patches"):
        navit_from_timm(theirs.state_dict(), heads=3)
    ours = navit_from_timm(theirs.state_dict(), heads=3, image_size=(16, 48))
    assert_same(ours, theirs, [(16, 48)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pos_embed_interp_mode": "bilinear", "act_layer": "gelu_tanh"},
        {"pos_embed": "factorized", "reg_tokens": 1},
        {"pos_embed": "factorized", "pos_embed_ar_preserving": True, "qk_norm": True},
        {"class_token": True, "global_pool": "token", "qkv_bias": False, "proj_bias": False},
        {"global_pool": "avg", "fc_norm": False, "init_values": 0.2},
    ],
)
def test_a_naflexvit_gives_its_logits_at_any_size(tmp_path, options):
    options = SIZES | options | {"pos_embed_grid_size": (5, 4)}
    name = "naflexvit_base_patch16_map"
    theirs = shaken(timm.create_model(name, num_classes=7, **options))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": name, "num_classes": 7, "model_args": options}
    config["pretrained_cfg"] = {"mean": [0.1, 0.2, 0.3]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = navit_from_timm(tmp_path)
    assert ours.mean.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert_same(ours, theirs, ((40, 32), (40, 40), (16, 120), (72, 8), (8, 8)))


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "fractional_aspect", "registers": 2},
        {"bias": True, "qk_norm": False, "position": "grid_bilinear", "pool": "cls"},
        {"layer_scale": 0.1, "pool": "mean", "image_size": (64, 24)},
    ],
)
def test_what_goes_out_to_timm_comes_back_as_it_was(tmp_path, changes):
    model, arguments = small(**changes)
    folder = save_pretrained(tmp_path / "timm", model.state_dict(), arguments, form="timm")
    back = navit_from_timm(folder)
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    images = [torch.randint(0, 256, (3, 24, 80), dtype=torch.uint8)]
    assert torch.equal(back(images), model(images))


class SiglipLayer(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self.self_attn, name, nn.Linear(dim, dim))
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x, heads):
        y, a = self.layer_norm1(x), self.self_attn
        q, k, v = (
            p(y).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + a.out_proj(mixed.transpose(1, 2).flatten(2))
        return x + mlp(self.mlp, self.layer_norm2(x))


def mlp(module, x):
    return module.fc2(nn.functional.gelu(module.fc1(x), approximate="tanh"))


class SiglipTower(nn.Module):
    """SigLIP's vision tower with the names of Hugging Face's transformers."""

    def __init__(self, dim=24, heads=3, hidden=36, patch=8, side=5):
        super().__init__()
        self.heads = heads
        tower = self.vision_model = nn.Module()
        tower.embeddings = nn.Module()
        tower.embeddings.patch_embedding = nn.Conv2d(3, dim, patch, patch)
        tower.embeddings.position_embedding = nn.Embedding(side * side, dim)
        tower.encoder = nn.Module()
        tower.encoder.layers = nn.ModuleList(SiglipLayer(dim, hidden) for _ in range(2))
        tower.post_layernorm = nn.LayerNorm(dim, eps=1e-6)
        head = tower.head = nn.Module()
        head.probe = nn.Parameter(torch.randn(1, 1, dim))
        head.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        head.layernorm = nn.LayerNorm(dim, eps=1e-6)
        head.mlp = nn.Module()
        head.mlp.fc1, head.mlp.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, images):
        tower, head = self.vision_model, self.vision_model.head
        x = tower.embeddings.patch_embedding(images)
        h, w = x.shape[2:]
        table = tower.embeddings.position_embedding.weight.view(5, 5, -1).permute(2, 0, 1)[None]
        resized = nn.functional.interpolate(table, (h, w), mode="bilinear", antialias=True)
        x = (x + resized).flatten(2).transpose(1, 2)
        for layer in tower.encoder.layers:
            x = layer(x, self.heads)
        x = tower.post_layernorm(x)
        pooled = head.attention(head.probe.expand(len(x), -1, -1), x, x)[0]
        return (pooled + mlp(head.mlp, head.layernorm(pooled)))[:, 0]


def test_siglip_as_transformers_names_it_gives_its_embeddings_at_any_size():
    theirs = shaken(SiglipTower())
    state = theirs.state_dict() | {
        "text_model.head.weight": torch.zeros(2, 2),
        "logit_scale": torch.ones(1),
    }
    ours = navit_from_timm(state, heads=3, activation="gelu_tanh", return_embeddings=True)
    assert ours.mean.tolist() == [0.5, 0.5, 0.5]
    assert_same(ours, theirs, ((40, 40), (24, 88), (80, 16)))


def test_a_grid_of_positions_becomes_the_nearest_rows_and_columns():
    theirs = VisionTransformer(img_size=48, num_classes=7, **SIZES)
    theirs = shaken(theirs)
    table = torch.randn(1, 6, 6, 24)
    rows, columns, share = nearest_factors(table)
    wanted = torch.linalg.lstsq(_sums_of_rows_and_columns(6, 6), table.flatten(0, 2)).solution
    nearest = (_sums_of_rows_and_columns(6, 6) @ wanted).view_as(table)
    torch.testing.assert_close(rows[:, :, None] + columns[:, None], nearest, atol=1e-5, rtol=0)
    assert 0.1 < share < 0.9
    with torch.no_grad():  # what is a sum already is kept, and then all is exact
        theirs.pos_embed[:, 1:] = nearest.flatten(1, 2)
    ours = navit_from_timm(theirs.state_dict(), heads=3, position="fractional")
    assert_same(ours, theirs, [(48, 48)])
    shapes = {name: list(value.shape) for name, value in ours.state_dict().items()}
    _, note = fit_timm(open_timm(theirs.state_dict()), shapes)
    assert "nearest sums of a row and a column, 100.0% of their variance" in note


def _sums_of_rows_and_columns(height, width):
    row = torch.eye(height).repeat_interleave(width, dim=0)
    return torch.cat([row, torch.eye(width).repeat(height, 1)], dim=1)


def test_a_head_for_other_classes_is_new():
    theirs = shaken(VisionTransformer(img_size=48, num_classes=7, **SIZES))
    ours = navit_from_timm(theirs.state_dict(), heads=3, num_classes=4)
    assert ours.head.weight.shape == (4, 24)
    image = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(image), pre_logits=True)
        torch.testing.assert_close(ours.forward_embeddings(image), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_fn": ParallelScalingBlock}, r"no blocks.0.mlp.fc1: their blocks are not those"),
        ({"pos_embed": "none"}, r"no position table"),
        ({"scale_attn_norm": True}, r"NaViT does not support blocks.0.attn.norm"),
    ],
)
def test_what_navit_cannot_compute_is_refused_by_name(options, message):
    theirs = VisionTransformer(img_size=48, num_classes=7, **(SIZES | options))
    with pytest.raises(ValueError, match=message):
        navit_from_timm(theirs.state_dict(), heads=3)


def test_heads_that_nothing_tells_must_be_given_and_folders_must_hold_weights(tmp_path):
    theirs = VisionTransformer(img_size=48, num_classes=7, **SIZES)
    with pytest.raises(ValueError, match="the number of attention heads: give it"):
        navit_from_timm(theirs.state_dict())
    with pytest.raises(ValueError, match=r"lacks model.safetensors: download it again"):
        navit_from_timm(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        navit_from_timm(tmp_path)
    with pytest.raises(ValueError, match=r"no patch embedding: they are not those of a ViT"):
        navit_from_timm({"fc.weight": torch.zeros(2, 2)})


def test_a_run_is_told_the_options_that_weights_of_timm_need(tmp_path):
    theirs = shaken(VisionTransformer(img_size=48, num_classes=7, **SIZES))
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(RunError, match=r"make model\.\* the same: .*model\.pool=cls") as refused:
        check_initial_weights(tiny_navit(), str(tmp_path / "vit.safetensors"))
    for option in ("model.image_size=[48,48]", "model.position=grid_bicubic", "model.bias=True"):
        assert option in str(refused.value)
    sizes = {"image_size": 48, "patch_size": 8, "dim": 24, "heads": 3, "mlp_dim": 36, "channels": 3}
    options = {"position": "grid_bicubic", "pool": "cls", "bias": True, "qk_norm": False}
    check_initial_weights(tiny_navit(**sizes, **options), str(tmp_path / "vit.safetensors"))


@pytest.mark.parametrize("parallel", [True, False])
def test_a_megavit_begins_at_its_own_export_to_timm(tmp_path, parallel):
    model, arguments = small(arch="megavit", parallel=parallel, image_size=(16, 32))
    folder = save_pretrained(tmp_path / "timm", model.state_dict(), arguments, form="timm")
    check_initial_weights(model, str(folder))
    wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
    opened = open_weights(folder, wanted)
    for name, value in model.state_dict().items():
        assert torch.equal(opened.tensors[name].read(), value), name
