"""Image-text training: exact over all pairs of a step, on any ranks, stage and packs."""

import json

import pytest
import torch

from tests.zeta.image_text_jobs import EMBED_DIM, captioned_pack, tiny_model
from zeta.models.config import ModelConfig
from zeta.models.parameters import parameter_rules
from zeta.objectives import build_for_objective
from zeta.objectives.config import ObjectiveConfig, TextTowerConfig
from zeta.objectives.image_text_model import ImageTextModel


def _report(ranks, tmp_path, job, world_size, **arguments):
    out = tmp_path / "report.json"
    ranks.run(f"tests.zeta.image_text_jobs.{job}", world_size, {"out": str(out), **arguments})
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "packs"), [(1, [1, 2]), (2, [2, 4, 3]), (3, [3, 4])])
def test_loss_gradient_and_weights_equal_one_matrix_over_all_pairs(
    ranks, tmp_path, world_size, packs
):
    # One pack a rank, two, and one more than ranks, so that a rank has an empty pack.
    report = _report(ranks, tmp_path, "exactness", world_size, packs_per_step=packs)[0]
    assert len(report) == 2 * len(packs) * 4
    for case, (loss_error, gradient_error, weight_error) in report.items():
        assert loss_error < 1e-5, case
        assert gradient_error < 1e-5, case
        assert weight_error < 5e-5, case  # Adam enlarges the rounding of gradients near zero


@pytest.mark.slow
def test_what_dropout_drops_is_the_same_in_both_forwards_of_a_pack(ranks, tmp_path):
    for report in _report(ranks, tmp_path, "dropout", 2):
        assert report == {"equal": [True] * 4, "another seed": False}


@pytest.mark.slow
def test_nan_in_one_ranks_embeddings_changes_nothing_on_any_stage(ranks, tmp_path):
    for report in _report(ranks, tmp_path, "nonfinite", 2):
        assert report == {str(stage): [False, True, True] for stage in range(4)}


@pytest.mark.slow
def test_bf16_and_recomputed_activations_train_alike_on_every_stage(ranks, tmp_path):
    report = _report(ranks, tmp_path, "bf16", 2)[0]
    for stage in range(4):
        assert report[f"stage {stage}"] == pytest.approx(report["fp32"], rel=0.05)
        assert report[f"stage {stage}"] != report["fp32"]


@pytest.mark.slow
def test_a_model_built_in_shards_for_zero_3_is_the_one_built_whole(ranks, tmp_path):
    assert _report(ranks, tmp_path, "sharded_construction", 2) == [[0, True]] * 2


@pytest.mark.slow
def test_recall_is_the_same_on_ranks_with_uneven_pairs(ranks, tmp_path):
    (alone,) = _report(ranks, tmp_path, "recall", 1)
    assert 0.1 < alone["image_to_text_recall1"] < 0.9
    assert _report(ranks, tmp_path, "recall", 3) == [pytest.approx(alone)] * 3


def test_embeddings_have_length_one_and_the_losses_start_as_published():
    for kind, scale, bias in (("siglip", 10.0, -10.0), ("clip", 1 / 0.07, 0.0)):
        pack = captioned_pack(1, 1)
        outputs = tiny_model(kind)(pack)
        assert outputs.images.shape == outputs.texts.shape == (4, EMBED_DIM)
        for embeddings in outputs[:2]:
            torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))
        assert outputs.scale.item() == pytest.approx(scale)
        assert outputs.bias.item() == bias


def test_temperature_bias_and_tables_are_not_decayed():
    groups = {n: rule.group for n, rule in parameter_rules(tiny_model("siglip")).items()}
    for name in ("logits.log_scale", "logits.logit_bias"):
        assert groups[name] == "none"
    for name in ("text.embeds.token_embed", "text.embeds.pos_embed_text", "text.attn_pool.latent"):
        assert groups[name] == "none"
    assert groups["image.blocks.0.attn.qkv.weight"] == "body"
    assert groups["text.head.weight"] == "body"


def test_the_config_builds_an_encoder_for_images_and_one_for_texts():
    model = ModelConfig(preset="navit_ti16", num_classes=24)
    objective = ObjectiveConfig("clip", embed_dim=24, text=TextTowerConfig(32, 2, 4, 64))
    objective.text.vocab_size, objective.text.max_tokens = 256, 16
    with torch.device("meta"):
        built = build_for_objective(model, objective, seed=0)
    assert isinstance(built, ImageTextModel)
    assert built.image.head.out_features == built.text.head.out_features == 24
    assert built.text.embeds.token_embed.shape == (256, 32)
    assert "logits.logit_bias" not in dict(built.named_parameters())
