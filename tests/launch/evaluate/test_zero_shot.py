"""Zero-shot classification: the formula, and what cannot be asked."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data_pipeline.shards.build import build_shards
from launch.evaluate.requests import Request, prepare
from launch.evaluate.scores import run_evaluation
from launch.evaluate.zero_shot import ZeroShotClassifier
from tests.launch.tiny_export import MODEL
from zeta import NaViT
from zeta.distributed import RankInfo, World
from zeta.export.protocol import TextExport
from zeta.export.saving import save_pretrained
from zeta.export.text_encoder import load_text_encoder, split_weights
from zeta.models.config import ModelConfig, build_model
from zeta.models.text_tower import TextTower
from zeta.objectives.image_text_model import ImageTextModel
from zeta.stored_tensors import in_memory

TEXT = {"vocab_size": 256, "max_tokens": 24, "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 32}
TEXT |= {"embed_dim": 12}
COLOURS = {"dark_red": (150, 0, 0), "sky blue": (90, 160, 250), "green": (0, 200, 0)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export of an untrained image-text model, and shards of three colours."""
    folder = tmp_path_factory.mktemp("zero_shot")
    config = ModelConfig(**MODEL, num_classes=12)
    model = ImageTextModel(build_model(config), TextTower(**TEXT), "siglip", seed=3)
    image, text = split_weights(model.state_dict(), "image.")
    export = TextExport(TEXT | {"kind": "siglip"}, in_memory(text), None)
    facts = {"class_names": None}
    save_pretrained(folder / "export", image, config.resolve(), facts, text=export)
    samples = []
    for label, colour in enumerate(COLOURS.values()):
        for side in (16, 24, 40):
            stream = io.BytesIO()
            Image.new("RGB", (side, 24), colour).save(stream, "PNG")
            samples.append(
                (f"{label}-{side}", {"png": stream.getvalue(), "cls": str(label).encode()})
            )
    build_shards(samples, folder / "shards", class_names=list(COLOURS))
    build_shards([(k, {"png": f["png"]}) for k, f in samples], folder / "plain")
    return folder


def test_a_class_is_the_mean_of_its_prompts_and_an_image_is_compared_with_each(world: Path):
    templates = ("a {}", "one {} picture")
    request = Request(world / "export", str(world / "shards"), templates=templates, workers=0)
    result = run_evaluation(prepare(request), World(RankInfo(), torch.device("cpu")))
    text, scale, bias = load_text_encoder(world / "export")
    model = NaViT.from_pretrained(world / "export")
    with torch.no_grad():
        names = ["dark red", "sky blue", "green"]
        prompts = [[list(t.replace("{}", n).encode()) for n in names] for t in templates]
        classes = F.normalize(sum(F.normalize(text(p), dim=1) for p in prompts), dim=1)
        images = [Image.new("RGB", (s, 24), c) for c in COLOURS.values() for s in (16, 24, 40)]
        logits = scale * F.normalize(model.head(model.embed(images)), dim=1) @ classes.T + bias
    labels = torch.arange(9) // 3
    assert result["images"] == 9
    assert result["top1"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert list(result["per_class"]) == list(COLOURS)
    assert result["zero_shot"] == {"templates": list(templates)}


def test_what_cannot_be_asked_is_refused_by_name(world: Path):
    export = world / "export"
    with pytest.raises(ValueError, match=r"the template 'a photo' has no {}"):
        ZeroShotClassifier(export, ["cat"], ["a photo"])
    with pytest.raises(ValueError, match=r"the prompt 'a photo of a c+' has 33 tokens.* 1 to 24"):
        ZeroShotClassifier(export, ["c" * 20], ["a photo of a {}"])
    with pytest.raises(ValueError, match=r"image-text model: .*put a classes.json"):
        prepare(Request(export, str(world / "plain")))
