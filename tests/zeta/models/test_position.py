import pytest
import torch
from torch.nn import functional as F

from zeta.models.position import (
    check_absolute,
    initial_table,
    interpolation_weights,
    table_coordinates,
)


def weights(yx, hw, lengths, system):
    return interpolation_weights(torch.tensor([yx]), torch.tensor([hw]), lengths, system)[0]


def test_fractional_positions_by_hand():
    # Table of 4 rows, 2 patches: patch 0 lies at 0.5 * 4/2 - 0.5 = 0.5, patch 1 at 2.5.
    assert table_coordinates(torch.tensor([0, 1]), torch.tensor(2), 4).tolist() == [0.5, 2.5]
    # 8 patches in 4 rows: (i + .5) / 2 - .5, clamped to 0 and 3 at the ends.
    places = table_coordinates(torch.arange(8), torch.tensor(8), 4)
    assert places.tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    # y = 1 of 2 in 4 rows, x = 0 of 4 in 2 rows (0.5 * 2/4 - 0.5 < 0, clamped to 0).
    assert weights((1, 0), (2, 4), (4, 2), "fractional").tolist() == [0, 0, 0.5, 0.5, 1, 0]


def test_aspect_keeping_positions_by_hand():
    # Both axes count 4 patches (the longer side): y = 1 lies at 1.5 * 4/4 - 0.5 = 1.
    got = weights((1, 3), (2, 4), (4, 4), "fractional_aspect")
    assert got.tolist() == [0, 1, 0, 0, 0, 0, 0, 1]


def test_absolute_positions_by_hand():
    got = weights((1, 2), (2, 3), (4, 4), "absolute")
    assert got.tolist() == [0, 1, 0, 0, 0, 0, 1, 0]


def test_tokens_without_a_place_have_no_position():
    for system in ("fractional", "fractional_aspect", "absolute"):
        assert weights((-1, -1), (2, 3), (4, 4), system).eq(0).all()


@pytest.mark.parametrize("count", [1, 3, 7, 16, 40])
def test_fractional_positions_are_linear_interpolation(count):
    table = torch.randn(1, 5, 16)
    coords = torch.stack([torch.arange(count), torch.zeros(count, dtype=torch.long)], dim=1)
    grids = torch.tensor([count, 1]).expand(count, 2)
    got = interpolation_weights(coords, grids, (16, 1), "fractional")[:, :16] @ table[0].T
    expected = F.interpolate(table, count, mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_position_does_not_depend_on_which_patches_were_kept():
    one = weights((2, 1), (4, 6), (8, 8), "fractional")
    coords = torch.tensor([(0, 0), (2, 1), (3, 5)])
    many = interpolation_weights(coords, torch.tensor([4, 6]).expand(3, 2), (8, 8), "fractional")
    assert torch.equal(many[1], one)


def test_absolute_tables_name_the_image_that_does_not_fit():
    with pytest.raises(ValueError, match=r"image 1 has 5 x 2 patches.*4 x 4.*raise image_size"):
        check_absolute([(4, 4), (5, 2)], (4, 4))


def test_an_unknown_system_lists_the_known_ones():
    with pytest.raises(ValueError, match="position is 'rope'; choose one of absolute"):
        weights((0, 0), (1, 1), (2, 2), "rope")


def test_tables_start_smooth_and_at_the_scale_of_a_token():
    table = initial_table(16, 4096, torch.Generator().manual_seed(0))
    assert 0.8 < table.std().item() < 1.2
    near = F.cosine_similarity(table[7], table[8], dim=0)
    far = F.cosine_similarity(table[0], table[15], dim=0)
    assert near > 0.5 > far
    assert initial_table(1, 8, torch.Generator().manual_seed(0)).isfinite().all()
