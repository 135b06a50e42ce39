"""Every published encoder that zeta loads teaches, in packs, from its folder as it is."""

from __future__ import annotations

import pytest
import torch

from tests.zeta.models.published.encoders import ENCODERS, encoder
from tests.zeta.objectives.test_whole_images import dropping_pack, pictures
from zeta.objectives.teacher import load_teacher, outline_teacher


@pytest.mark.parametrize("name", ENCODERS)
def test_a_folder_of_transformers_teaches_what_its_encoder_says_of_each_image(tmp_path, name):
    encoder(name).save_pretrained(tmp_path)
    teacher, _ = load_teacher(str(tmp_path))
    assert outline_teacher(str(tmp_path)).dim == teacher.dim == 32
    images = pictures(channels=3, side=8)
    found = teacher(dropping_pack(images, side=8))
    pooled = teacher.encoder.forward_embeddings(images)
    torch.testing.assert_close(found.pooled[:3], pooled, atol=1e-5, rtol=0)
    assert teacher(dropping_pack(pictures(channels=3))).tokens.isfinite().all()
