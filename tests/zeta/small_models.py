"""Models of a few thousand weights, none of which is what it began as."""

import torch

from zeta.models.config import ModelConfig, build_model

SIZES = {
    "image_size": 64,
    "patch_size": 8,
    "num_classes": 7,
    "dim": 24,
    "depth": 2,
    "heads": 3,
    "mlp_dim": 37,
}


def small(**changes):
    """A model in evaluation mode and its resolved arguments."""
    config = ModelConfig(**(SIZES | changes))
    model = build_model(config, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():  # no weight may hide behind its initial value
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), config.resolve()
