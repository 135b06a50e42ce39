"""A teacher that is a moving average of its student, as a user would write it: see extending.md."""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from tests.zeta.foreign_objective import MeanLoss
from zeta.models.config import build_model
from zeta.models.initialization import initialize
from zeta.models.linear import Linear
from zeta.objectives.base import DeclaredObjective
from zeta.objectives.moving_average import begin_as, follow
from zeta.objectives.whole_images import whole_images

DECAY = 0.9
"""Decay of the first step; it rises to 1 over the run."""


class StudentAndTeacher(nn.Module):
    """An encoder of the kept patches, and its moving average, which sees the whole images."""

    def __init__(self, image, teacher, seed):
        super().__init__()
        self.image, self.teacher = image, teacher.requires_grad_(False)
        self.predictor = Linear(image.head.in_features, image.head.in_features)
        image.head.requires_grad_(False)
        initialize(self, seed)

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, pack):
        with torch.no_grad():
            wanted = self.teacher.forward_embeddings(
                whole_images(pack, self.teacher, self.image.patch_size).pack
            )
        return self.predictor(self.image.forward_embeddings(pack)).float(), wanted.float()


class MovingTeacher(DeclaredObjective):
    """Cosine distance of each image's embedding to the teacher's."""

    encoder: ClassVar[str] = "image."
    whole_images: ClassVar[bool] = True

    @classmethod
    def head_outputs(cls, config):
        return 1

    @classmethod
    def build_model(cls, model, config, seed):
        return StudentAndTeacher(build_model(model, seed), build_model(model, seed), seed)

    def start(self, model):
        begin_as(model.teacher, model.image)

    def finish_step(self, model, step):
        follow(model.teacher, model.image, DECAY + (1 - DECAY) * step.share)

    def check(self, batch):
        pass

    def loss_sum(self, outputs, batch):
        distances = 1 - F.cosine_similarity(*outputs)
        return torch.where(batch.weights > 0, distances, 0.0).sum()

    def counts(self, outputs, batch):
        return {}

    def tally(self):
        return MeanLoss(self)
