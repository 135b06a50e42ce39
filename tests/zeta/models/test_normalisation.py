"""Float images are taken as normalised, and refused where they are seen not to be."""

import pytest
import torch

from tests.zeta.packs import make_pack
from tests.zeta.training import tiny_navit


def test_floats_from_0_to_1_are_refused_not_taken_as_normalised():
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    shares = pixels.float() / 255
    model = tiny_navit(channels=3).eval()
    pack = make_pack([shares], model.patch_size, 80, 2)
    for images in ([shares], [shares, shares[:, :8]], [[shares.double()]]):
        with pytest.raises(ValueError, match=r"floats from 0 to 1, .* pass uint8 pixels, or"):
            model(images)
    with pytest.raises(ValueError, match="floats from 0 to 1"):
        model(pack)
    mean, std = model.mean[:, None, None], model.std[:, None, None]
    torch.testing.assert_close(model([(shares - mean) / std]), model([pixels]))
    assert model([torch.zeros(3, 32, 32)]).isfinite().all()  # a picture of the mean
    unchanged = tiny_navit(channels=3, mean=0.0, std=1.0)
    assert unchanged([shares]).isfinite().all()  # to this model they are normalised
