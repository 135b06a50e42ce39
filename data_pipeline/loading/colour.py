"""Changes of colour of a training image, each a pure function of its key.

They are those of self-supervised pretraining: jitter of brightness, contrast, saturation and hue,
grey, blur and solarisation (Grill et al. 2020, "BYOL", appendix B), in this order. They are made on
the resized image, by Pillow.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from data_pipeline.augmentation import ColourConfig
from data_pipeline.plan.random_draws import uniforms

_DRAWS = 9
_BLUR_AT = 224.0
"""Side of the image, in pixels, at which a blur has the radius drawn."""


def recoloured(pixels: NDArray[np.uint8], config: ColourConfig, key: int) -> NDArray[np.uint8]:
    """Return [h, w, 3] uint8 with changed colours.

    Args:
        pixels: [h, w, 3] uint8 RGB.
        config: probabilities and strengths.
        key: key of the draws; the same key always gives the same result.
    """
    u = uniforms(np.uint64(key), np.arange(_DRAWS)).tolist()
    may_jitter, light, contrast, saturation, hue, may_grey, may_blur, radius, may_solarise = u
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if may_jitter < config.jitter:
        image = ImageEnhance.Brightness(image).enhance(_factor(config.brightness, light))
        image = ImageEnhance.Contrast(image).enhance(_factor(config.contrast, contrast))
        image = ImageEnhance.Color(image).enhance(_factor(config.saturation, saturation))
        image = _turned_hue(image, config.hue * (2 * hue - 1))
    if may_grey < config.grey:
        image = ImageOps.grayscale(image).convert("RGB")
    if may_blur < config.blur:
        side = (image.width * image.height) ** 0.5
        image = image.filter(ImageFilter.GaussianBlur((0.1 + 1.9 * radius) * side / _BLUR_AT))
    if may_solarise < config.solarise:
        image = ImageOps.solarize(image, 128)
    return np.asarray(image)


def _factor(strength: float, u: float) -> float:
    return 1 + strength * (2 * u - 1)


def _turned_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turn all hues by a share of the circle."""
    if turn == 0:
        return image
    hue, saturation, value = image.convert("HSV").split()
    shift = round(turn * 256) % 256
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
