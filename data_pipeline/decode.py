"""From encoded bytes to the pixels of a resized image, and to patches.

Anything that Pillow reads of the formats in `data_pipeline.image_header` becomes RGB: grey and
palettes are spread out, transparency is laid on white, 16-bit channels keep their high byte, CMYK
is converted by formula. Colour profiles (ICC) are ignored, as in the ImageNet convention; EXIF
orientation is applied; of an animation the first frame counts.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from data_pipeline.image_header import (
    ImageError as ImageError,
)
from data_pipeline.image_header import (
    ImageFormat,
    ImageHeader,
    check_size,
    image_size,
    open_other,
)

_PILLOW_NAMES = {
    ImageFormat.JPEG: "JPEG",
    ImageFormat.PNG: "PNG",
    ImageFormat.WEBP: "WEBP",
    ImageFormat.GIF: "GIF",
}
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Box = tuple[float, float, float, float]


def decode_image(
    data: bytes,
    *,
    height: int,
    width: int,
    scale: int = 1,
    fit: str = "keep",
    stored_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Decode an image and resize it once, antialiased (bicubic), to [height, width, 3] uint8 RGB.

    `scale` 1, 2, 4 or 8 decodes a JPEG at 1/scale of its size in the DCT domain (other formats
    ignore it). `fit` "crop" takes the largest centred box of the target's aspect ratio; "keep"
    and "squash" use the whole image. `stored_size` is the upright (height, width) of the index.
    Raises `ImageError` with the reason for whatever cannot be decoded in full: not an image,
    truncated, too large, or of another size than expected.
    """
    header = image_size(data)
    if stored_size is not None and (header.height, header.width) != stored_size:
        raise ImageError(
            f"image is {header.width} x {header.height} pixels, "
            f"the index says {stored_size[1]} x {stored_size[0]}"
        )
    try:
        image = _load(data, header, scale)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on malformed bytes
        raise ImageError(f"cannot be decoded: {error} ({type(error).__name__})") from error
    turned = header.orientation >= 5
    size = (height, width) if turned else (width, height)
    stored = (header.height, header.width) if turned else (header.width, header.height)
    box = _crop_box(stored, size) if fit == "crop" else (0.0, 0.0, *stored)
    # At 1/scale the last pixel may cover less than `scale` pixels of the image: a fractional box
    # keeps the picture where it is.
    factor = stored[0] / image.width if image.size == stored else float(scale)
    box = (box[0] / factor, box[1] / factor, box[2] / factor, box[3] / factor)
    if image.size != size or box != (0.0, 0.0, *size):
        image = image.resize(size, Image.Resampling.BICUBIC, box=box)
    if header.orientation != 1:
        image = image.transpose(_TRANSPOSE[header.orientation])
    return np.asarray(image)


def patchify(image: np.ndarray, patch_size: int) -> np.ndarray:
    """Cut [h * p, w * p, 3] into [h * w, p * p * 3] patches, row-major, channels last inside one.

    The sides must be multiples of p = `patch_size`, else ValueError.
    """
    height, width, channels = image.shape
    rows, columns = height // patch_size, width // patch_size
    if (rows * patch_size, columns * patch_size) != (height, width):
        raise ValueError(f"{height} x {width} image is not a whole number of {patch_size} patches")
    grid = image.reshape(rows, patch_size, columns, patch_size * channels)
    return grid.swapaxes(1, 2).reshape(rows * columns, patch_size * patch_size * channels)


def _load(data: bytes, header: ImageHeader, scale: int) -> Image.Image:
    """Return the decoded image as RGB in its stored orientation, at 1/scale if it is a JPEG."""
    if header.format is ImageFormat.OTHER:
        image, _ = open_other(data)
    else:
        image = Image.open(io.BytesIO(data), formats=[_PILLOW_NAMES[header.format]])
    check_size(image.height, image.width)
    stored = (header.width, header.height)
    if image.size != (stored[::-1] if header.orientation >= 5 else stored):
        raise ImageError(f"the decoder finds {image.width} x {image.height} pixels")
    if scale > 1 and header.format is ImageFormat.JPEG and min(image.size) >= scale:
        # Pillow takes the largest scale that leaves at least the size asked for.
        image.draft(None, (image.width // scale, image.height // scale))
    image.load()
    return _to_rgb(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey, read as 16 or 32 bits
        levels = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "F":
        raise ImageError("floating-point pixels")
    return image.convert("RGB")


def _crop_box(stored: tuple[int, int], size: tuple[int, int]) -> Box:
    """Return the largest centred box of the aspect ratio of `size` in an image of `stored`."""
    width, height = stored
    crop_width = min(float(width), height * size[0] / size[1])
    crop_height = min(float(height), width * size[1] / size[0])
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return left, top, left + crop_width, top + crop_height
