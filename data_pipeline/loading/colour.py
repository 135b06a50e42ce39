"""Changes of colour of a training image, each a pure function of its key.

They are those of self-supervised pretraining: jitter of brightness, contrast, saturation and hue,
grey, blur and solarisation (Grill et al. 2020, "BYOL", appendix B), in this order. They are made on
the resized image, by Pillow. Jitter and grey are linear in the colours, so all of them together are
one product of each pixel with a matrix: a third (32 pixels) to a sixth (224) of the time of one
after the other. Values are rounded and clipped once, at the end. The hue turns at constant luma, in
the plane of I and Q: in the cone of HSV, colours of one hue and value differ in brightness.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from data_pipeline.augmentation import ColourConfig
from data_pipeline.plan.random_draws import uniforms

_DRAWS = 9
_TO_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]]
)
"""Red, green and blue to luma, I and Q (NTSC)."""
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_GREY = np.tile(_TO_YIQ[0], (3, 1))
"""Every channel becomes the luma."""
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
    by_colour = np.eye(3, 4)
    if may_jitter < config.jitter:
        by_colour = _jitter(
            image,
            brightness=_factor(config.brightness, light),
            contrast=_factor(config.contrast, contrast),
            saturation=_factor(config.saturation, saturation),
            turn=config.hue * (2 * hue - 1),
        )
    if may_grey < config.grey:
        by_colour = _GREY @ by_colour
    if not np.array_equal(by_colour, np.eye(3, 4)):
        image = image.convert("RGB", tuple(by_colour.ravel().tolist()))
    if may_blur < config.blur:
        side = (image.width * image.height) ** 0.5
        image = image.filter(ImageFilter.GaussianBlur((0.1 + 1.9 * radius) * side / _BLUR_AT))
    if may_solarise < config.solarise:
        image = ImageOps.solarize(image, 128)
    return np.asarray(image)


def _factor(strength: float, u: float) -> float:
    return 1 + strength * (2 * u - 1)


def _jitter(
    image: Image.Image, *, brightness: float, contrast: float, saturation: float, turn: float
) -> NDArray[np.float64]:
    """Return [3, 4]: what red, green, blue and 1 are multiplied with.

    Args:
        image: what is changed; contrast changes about its mean luma.
        brightness, contrast, saturation: factors, 1 changes nothing.
        turn: of all hues, as a share of the circle, from red towards green.
    """
    matrix = brightness * contrast * np.eye(3, 4)
    if contrast != 1:
        mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
        matrix[:, 3] = (1 - contrast) * brightness * (_TO_YIQ[0] @ np.array(mean))
    if saturation != 1:
        matrix = (saturation * np.eye(3) + (1 - saturation) * _GREY) @ matrix
    if turn:
        cos, sin = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn)
        turned = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
        matrix = _FROM_YIQ @ turned @ _TO_YIQ @ matrix
    return matrix
