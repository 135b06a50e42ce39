"""The text tower: each caption as if it were alone, whatever it is packed with."""

from dataclasses import replace

import pytest
import torch

from tests.zeta.packs import make_pack
from zeta.models.text_tower import TextTower

ARGUMENTS = {"vocab_size": 20, "max_tokens": 9, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 32}


def tower(**changes):
    from zeta.models.initialization import initialize

    made = TextTower(**(ARGUMENTS | {"embed_dim": 5} | changes))
    initialize(made, seed=0)
    return made


def with_captions(captions, budget=100, max_images=8, images=None):
    """A pack of grey images with captions, as data_pipeline lays them out."""
    images = images or [torch.zeros(1, 4, 4, dtype=torch.uint8)] * len(captions)
    pack = make_pack(images, patch_size=4, budget=48, max_images=max_images)
    lengths = [len(ids) for ids in captions] + [0] * (max_images - len(captions))
    lengths.append(budget - sum(lengths))
    ids = torch.zeros(budget, dtype=torch.int64)
    flat = [token for caption in captions for token in caption]
    ids[: len(flat)] = torch.tensor(flat, dtype=torch.int64)
    return replace(
        pack,
        text_ids=ids,
        text_cu_seqlens=torch.tensor((0, *lengths)).cumsum(0).int(),
        text_lengths=tuple(lengths),
        text_cut=torch.zeros(max_images, dtype=torch.bool),
    )


CAPTIONS = [[1, 2, 3], [19], [4, 5, 6, 7, 8, 9, 10, 11, 12], [], [3, 2, 1], [1, 2, 3]]


def test_packed_captions_equal_each_caption_alone_in_values_and_gradients():
    model = tower()
    packed = model(with_captions(CAPTIONS))
    assert packed.shape == (8, 5)
    packed[2].square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for i, caption in enumerate(CAPTIONS):
        if caption:
            torch.testing.assert_close(packed[i], model([caption])[0], rtol=1e-5, atol=1e-6)
    model([CAPTIONS[2]])[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_order_of_tokens_matters_and_neighbours_padding_and_budget_do_not():
    model = tower()
    first = model(with_captions(CAPTIONS))
    again = model(with_captions(CAPTIONS[::-1], budget=1000))
    torch.testing.assert_close(first[:6], again[:6].flip(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first[0], first[5], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first[0], first[4], atol=1e-3)


def test_padding_is_cut_to_few_lengths():
    seen = []
    model = tower()
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    for caption_tokens in range(1, 10):
        model(with_captions([[1] * caption_tokens] * 8, budget=160))
    assert len(set(seen)) <= 16
    assert all(
        used <= rows < used + 160 // 16 for rows, used in zip(seen, range(8, 73, 8), strict=True)
    )


def test_an_empty_pack_gives_finite_embeddings_and_gradients_for_all_weights():
    model = tower()
    out = model(with_captions([]))
    (out * 0).sum().backward()
    assert out.isfinite().all()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = tower()
        model.activation_checkpointing = recompute
        model(with_captions(CAPTIONS)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_captions_that_do_not_fit_are_refused_by_number():
    model = tower()
    with pytest.raises(ValueError, match=r"tokens of caption 1 is 10; .* at most 9"):
        model([[1], [1] * 10])
    with pytest.raises(ValueError, match=r"a token of caption 0 is 20; .* at most 19"):
        model([[20]])
    with pytest.raises(ValueError, match="carries no captions"):
        model(make_pack([], patch_size=4, budget=8, max_images=2))
