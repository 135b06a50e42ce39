"""RandAugment (Cubuk et al. 2020): a few changes drawn from fourteen, of one strength for all.

They are the fourteen of the paper, with its ranges, made on the resized image by Pillow. Every draw
is a pure function of its key. Shears, shifts and turns keep the size of the image and fill what
they uncover with grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from data_pipeline.augmentation import RandAugmentConfig
from data_pipeline.plan.random_draws import uniforms

_STRONGEST = 30.0
_GREY = (128, 128, 128)

Change = Callable[[Image.Image, float], Image.Image]
"""A change of an image by a strength from -1 to 1; those without a direction take its size."""


def rand_augmented(
    pixels: NDArray[np.uint8], config: RandAugmentConfig, key: int
) -> NDArray[np.uint8]:
    """Return [h, w, 3] uint8 after `config.layers` changes.

    Args:
        pixels: [h, w, 3] uint8 RGB.
        config: number and strength of the changes.
        key: key of the draws; the same key always gives the same result.
    """
    u = uniforms(np.uint64(key), np.arange(2 * config.layers)).tolist()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    changes = list(CHANGES.values())
    for which, side in zip(u[::2], u[1::2], strict=True):
        strength = config.magnitude / _STRONGEST
        image = changes[int(which * len(changes))](image, strength if side < 0.5 else -strength)
    return np.asarray(image)


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Change:
    """Return the change by a factor from 0.1 to 1.9 between a plain image and an enhanced one."""
    return lambda image, strength: kind(image).enhance(1 + 0.9 * strength)


def _moved(matrix: Callable[[Image.Image, float], tuple[float, ...]]) -> Change:
    """Return the change that reads each pixel from where an affine matrix sends it."""

    def change(image: Image.Image, strength: float) -> Image.Image:
        return image.transform(
            image.size,
            Image.Transform.AFFINE,
            matrix(image, strength),
            Image.Resampling.BILINEAR,
            fillcolor=_GREY,
        )

    return change


def _turned(image: Image.Image, strength: float) -> Image.Image:
    return image.rotate(30 * strength, Image.Resampling.BILINEAR, fillcolor=_GREY)


def _posterized(image: Image.Image, strength: float) -> Image.Image:
    return ImageOps.posterize(image, 8 - round(4 * abs(strength)))


def _solarized(image: Image.Image, strength: float) -> Image.Image:
    return ImageOps.solarize(image, math.ceil(256 * (1 - abs(strength))))


CHANGES: dict[str, Change] = {
    "identity": lambda image, _: image,
    "auto_contrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "rotate": _turned,
    "solarize": _solarized,
    "color": _enhanced(ImageEnhance.Color),
    "posterize": _posterized,
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _moved(lambda _, strength: (1, 0.3 * strength, 0, 0, 1, 0)),
    "shear_y": _moved(lambda _, strength: (1, 0, 0, 0.3 * strength, 1, 0)),
    "translate_x": _moved(lambda image, strength: (1, 0, 0.45 * strength * image.width, 0, 1, 0)),
    "translate_y": _moved(lambda image, strength: (1, 0, 0, 0, 1, 0.45 * strength * image.height)),
}
"""The fourteen changes by name, in the order of the paper."""
