"""Find the encoder in the model of an objective."""

from __future__ import annotations

from torch import nn


def encoder_of(model: nn.Module, prefix: str) -> nn.Module:
    """Return the encoder in a model: a module with `forward_embeddings`, as `PackedViT` has it.

    Args:
        model: the model that an objective builds.
        prefix: that of the encoder's parameters (`DeclaredObjective.encoder`); "": the model.

    Raises:
        ValueError: nothing is at that prefix, or a module without pooled embeddings.
    """
    name = prefix.removesuffix(".")
    try:
        encoder = model.get_submodule(name)
    except AttributeError:
        encoder = None
    if encoder is None or not callable(getattr(encoder, "forward_embeddings", None)):
        where = f"at {prefix!r}, which it gives as its `encoder`," if prefix else "by itself"
        raise ValueError(
            "train.evaluate.knn and train.evaluate.probe classify by the embeddings of the "
            f"encoder, but the model of the objective ({type(model).__name__}) has none {where} "
            "with forward_embeddings: name the prefix of a zeta encoder there, or set both to false"
        )
    return encoder
