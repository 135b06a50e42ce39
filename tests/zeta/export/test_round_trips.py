"""import(export(model)) is the model, whatever its options, in each format that takes it."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.zeta.small_models import small
from zeta.export.formats import open_formats
from zeta.export.importing import import_encoder
from zeta.export.saving import save_pretrained
from zeta.models.config import load_pretrained
from zeta.models.layers import ACTIVATIONS, QKV_BIASES
from zeta.models.navit import POOLS
from zeta.models.position import POSITIONS

YES_NO = st.booleans()
OPTIONS = {
    "position": st.sampled_from(sorted(set(POSITIONS) - {"absolute", "rope+absolute"})),
    "pool": st.sampled_from(POOLS),
    "registers": st.integers(0, 2),
    "layer_scale": st.sampled_from([None, 0.1]),
    "qk_norm": YES_NO,
    "bias": YES_NO,
    "qkv_bias": st.sampled_from([None, *QKV_BIASES]),
    "activation": st.sampled_from(sorted(ACTIVATIONS)),
    "gated_mlp": YES_NO,
    "mlp_norm": YES_NO,
    "pre_norm": YES_NO,
    "norm_after_pool": YES_NO,
    "pooler": YES_NO,
    "norm_eps": st.sampled_from([1e-6, 1e-3]),
    "image_size": st.sampled_from([40, 64]),
}
FITTING = {
    "zeta": {},
    "timm": {"norm_eps": st.just(1e-6), "pooler": st.just(False)},
    "DINOv3ViTModel": {
        "position": st.just("rope"),
        "pool": st.just("cls"),
        "rope_base": st.sampled_from([20.0, 100.0]),
    },
    "Siglip2VisionModel": {
        "position": st.just("grid_bilinear"),
        "pool": st.just("attention"),
        "registers": st.just(0),
        "layer_scale": st.none(),
        "gated_mlp": st.just(False),
    },
    "Siglip2ForImageClassification": {
        "position": st.just("grid_bilinear"),
        "pool": st.just("mean"),
        "registers": st.just(0),
        "layer_scale": st.none(),
        "gated_mlp": st.just(False),
    },
}
_OFF = ("qk_norm", "mlp_norm", "pre_norm", "norm_after_pool", "pooler")
SIZES = [(40, 40), (8, 8), (24, 64), (72, 16)]


def options(name):
    """Options of a model that the format, or the class of transformers, has a chance to take."""
    fitting = dict(FITTING[name])
    if name not in ("zeta", "timm"):
        fitting |= {option: st.just(False) for option in _OFF}
    return st.fixed_dictionaries(OPTIONS | fitting)


def there_and_back(model, arguments, form):
    """Return the model that comes back from an export in a format."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        save_pretrained(out, model.state_dict(), arguments, form=form)
        if form != "zeta":
            import_encoder(out, Path(folder) / "back")
            out = Path(folder) / "back"
        return load_pretrained(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", FITTING)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
@torch.no_grad()
def test_what_was_exported_comes_back_with_the_same_outputs(name, data):
    form = name if name in ("zeta", "timm") else "transformers"
    changes = {n: v for n, v in data.draw(options(name)).items() if v is not None}
    if form == "timm" and changes["gated_mlp"]:
        changes["activation"] = "silu"
    torch.manual_seed(0)
    model, arguments = small(**changes)
    assume(open_formats(form)[0].obstacle(arguments) is None)
    back = there_and_back(model, arguments, form)
    images = [torch.randn(3, *size) for size in SIZES]
    ours, theirs = model.forward_embeddings(images), back.forward_embeddings(images)
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=0)
    if name in ("zeta", "timm", "Siglip2ForImageClassification"):  # the others have no head
        torch.testing.assert_close(back(images), model(images), atol=2e-5, rtol=0)
    pixels = [torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8)]
    torch.testing.assert_close(
        back.forward_embeddings(pixels), model.forward_embeddings(pixels), atol=2e-5, rtol=0
    )


MEGAVIT = {
    "zeta": {},
    "timm": {"position": st.just("table"), "parallel": st.just(False)},
    "transformers": {
        "position": st.just("rope"),
        "parallel": st.just(False),
        "qk_norm": st.just(False),
        "pool": st.just("cls"),
    },
}


@pytest.mark.parametrize("form", MEGAVIT)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
@torch.no_grad()
def test_a_megavit_comes_back_with_the_same_outputs(form, data):
    """In another format than ours it comes back as a NaViT, which computes the same."""
    drawn = {
        "position": st.sampled_from(["table", "rope", "rope+table"]),
        "pool": st.sampled_from(["cls", "mean"]),
        "parallel": YES_NO,
        "layer_scale": st.sampled_from([None, 0.1]),
        "qk_norm": YES_NO,
        "image_size": st.sampled_from([40, (16, 32)]),
    }
    changes = data.draw(st.fixed_dictionaries(drawn | MEGAVIT[form]))
    torch.manual_seed(0)
    model, arguments = small(arch="megavit", **{n: v for n, v in changes.items() if v is not None})
    assume(open_formats(form)[0].obstacle(arguments) is None)
    back = there_and_back(model, arguments, form)
    height, width = (side * model.patch_size for side in model.fixed_grid)
    images = [torch.randn(3, height, width) for _ in range(2)]
    ours, theirs = model.forward_embeddings(images), back.forward_embeddings(images)
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=0)
