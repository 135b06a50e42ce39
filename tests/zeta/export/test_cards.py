"""The code on a model card runs as it stands, and gives what it says."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.zeta.small_models import small
from zeta.export.card import card_arguments
from zeta.export.formats import open_formats
from zeta.export.protocol import PLACE
from zeta.export.saving import save_pretrained

UNLABELLED = {"targets": "none"}


def code_of(form, folder, arguments, facts):
    """The code on the card of one format, for the model in a folder."""
    (exporter,) = open_formats(form)
    card = exporter.card(card_arguments(arguments, facts))
    return card.partition("```python")[2].partition("```")[0].replace(PLACE, str(folder))


def written(folder, form, facts=UNLABELLED, **changes):
    model, arguments = small(**changes)
    save_pretrained(folder, model.state_dict(), arguments, facts, form=form)
    return model, arguments


@pytest.mark.parametrize("form", ["zeta", "timm", "onnx"])
def test_a_card_shows_logits_of_classes_and_embeddings_without_them(form):
    _, arguments = small()
    assert "logits" in code_of(form, "out", arguments, {"targets": "label"})
    without = code_of(form, "out", arguments, UNLABELLED)
    assert "embeddings" in without
    assert "logits" not in without


def test_the_code_for_zeta_gives_embeddings(tmp_path):
    model, arguments = written(tmp_path / "out", "zeta")
    names = {"image": Image.new("RGB", (40, 24), (200, 30, 90))}
    exec(code_of("zeta", tmp_path / "out", arguments, UNLABELLED), names)
    torch.testing.assert_close(names["embeddings"], model.embed([names["image"]]))


@pytest.mark.parametrize("arch", ["navit", "megavit"])
@torch.no_grad()
def test_the_code_for_timm_gives_embeddings(tmp_path, arch):
    pytest.importorskip("timm")
    model, arguments = written(tmp_path / "out", "timm", arch=arch, pool="cls")
    side = arguments["image_size"]
    images = torch.randn(2, 3, side, side)
    names = {"images": images}
    exec(code_of("timm", tmp_path / "out", arguments, UNLABELLED), names)
    expected = model.forward_embeddings(list(images))
    torch.testing.assert_close(names["embeddings"], expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_the_code_for_onnxruntime_gives_embeddings(tmp_path):
    pytest.importorskip("onnxruntime")
    model, arguments = written(tmp_path / "out", "onnx")
    images = torch.randn(2, 3, 24, 40)
    names = {"images": images.numpy()}
    exec(code_of("onnx", tmp_path / "out", arguments, UNLABELLED), names)
    expected = model.forward_embeddings(list(images))
    torch.testing.assert_close(torch.from_numpy(names["embeddings"]), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_code_for_a_classifier_of_transformers_gives_embeddings(tmp_path):
    pytest.importorskip("transformers")
    options = {"position": "grid_bilinear", "qk_norm": False, "image_size": 40, "pool": "mean"}
    model, arguments = written(tmp_path / "out", "transformers", **options)
    names = {"image": Image.effect_noise((40, 40), 90).convert("RGB")}
    exec(code_of("transformers", tmp_path / "out", arguments, UNLABELLED), names)
    expected = model.embed([names["image"]])
    torch.testing.assert_close(names["embeddings"], expected, atol=1e-3, rtol=0)
