"""Images smaller than a patch are counted, and refused where there are no others."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from launch.evaluate.small_images import small_images


def _manifest(*sizes: tuple[int, int]) -> SimpleNamespace:
    samples = np.zeros(len(sizes), dtype=[("height", "u4"), ("width", "u4")])
    samples["height"], samples["width"] = zip(*sizes, strict=True)
    return SimpleNamespace(samples=samples)


def test_they_are_counted_with_the_smallest_and_bad_ones_do_not_count():
    assert small_images(_manifest((16, 16), (200, 300)), 16) is None
    said = small_images(_manifest((16, 16), (3, 5), (900, 15), (0, 0)), 16)
    assert said == (
        "2 of 3 images have a side shorter than a patch of 16 pixels (the smallest 5 x 3): that "
        "side is enlarged to one patch"
    )


def test_a_single_one_is_spoken_of_as_one():
    said = small_images(_manifest((200, 300), (3, 500)), 8)
    assert said is not None
    assert said.startswith("1 of 2 images has a side shorter than a patch of 8 pixels (500 x 3)")
    with pytest.raises(ValueError, match=r"the only image has a side .* \(1 x 1\): give larger"):
        small_images(_manifest((1, 1)), 8)


def test_nothing_but_such_images_is_refused():
    with pytest.raises(ValueError, match="all 2 images have a side shorter than a patch of 16"):
        small_images(_manifest((3, 5), (15, 40), (0, 0)), 16)
