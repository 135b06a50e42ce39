"""Compare decoders: images a second and core, and the difference from an exact reference.

    python -m tests.benchmarks.decoders [--images 48] [--side 256] [--rounds 5]

Photographs of `tests.benchmarks.full_size` (2,000 pixels) and others of the size of ImageNet's are
decoded from memory to RGB of one target size, in turn, and the best round counts. Seconds are CPU
seconds of all threads, so that neighbours on the machine matter less. The reference is a full
decode by libjpeg-turbo and Pillow's antialiased bicubic resize. What is not installed is skipped by
name.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch
from PIL import Image

from data_pipeline.loading.decode import decode_image
from data_pipeline.plan.sampling import decode_scales
from tests.benchmarks.full_size import full_size_photographs
from tests.data_pipeline.photographs import photo_sizes, photograph
from tests.data_pipeline.shard_fixtures import encode
from zeta.models.resizing import resize

Decoder = Callable[[bytes, int, int], np.ndarray]
"""Function (encoded JPEG, height, width) -> [height, width, 3] uint8."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, missing = decoders()
    for name, reason in missing.items():
        print(f"skipped: {name} ({reason})")
    small = (photograph(h, w, n) for n, (h, w) in enumerate(photo_sizes(options.images)))
    for kind, images in (
        ("2,000 pixels", full_size_photographs(options.images)),
        ("ImageNet's sizes", small),
    ):
        photos = [encode(image, quality=90) for image in images]
        compare(kind, photos, found, options)


def decoders() -> tuple[dict[str, Decoder], dict[str, str]]:
    """Return the decoders that can run, and why others cannot, by name."""
    found: dict[str, Decoder] = {
        "zeta, data.decode.scaled=true (DCT scale + torch)": zeta_scaled,
        "zeta, scaled=false (simplejpeg + torch)": zeta_full,
        "Pillow": pillow,
        "Pillow draft (DCT scale)": pillow_draft,
    }
    missing: dict[str, str] = {}
    for name, make in {
        "simplejpeg + OpenCV area": open_cv_area,
        "simplejpeg at DCT scale + OpenCV area": open_cv_scaled,
        "OpenCV alone, area": open_cv_alone,
        "torchcodec + torch": torchcodec_cpu,
    }.items():
        try:
            found[name] = make()
            found[name](encode(photograph(64, 64)), 32, 32)
        except (ImportError, RuntimeError, OSError, AttributeError) as error:
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            found.pop(name, None)
    return found, missing


def dct_scale(data: bytes, height: int, width: int) -> int:
    """Return the scale at which a plan decodes."""
    rows, columns = simplejpeg.decode_jpeg_header(data)[:2]
    sizes = (np.array([float(side)]) for side in (rows, columns))
    return int(decode_scales(*sizes, np.array([height]), np.array([width]), patch_size=1)[0])


def zeta_scaled(data: bytes, height: int, width: int) -> np.ndarray:
    return decode_image(data, height=height, width=width, scale=dct_scale(data, height, width))


def zeta_full(data: bytes, height: int, width: int) -> np.ndarray:
    return decode_image(data, height=height, width=width)


def pillow(data: bytes, height: int, width: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def pillow_draft(data: bytes, height: int, width: int) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (width, height))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def open_cv_area() -> Decoder:
    import cv2

    cv2.setNumThreads(1)
    # Of OpenCV's filters only this one is antialiased.
    return lambda data, height, width: cv2.resize(
        simplejpeg.decode_jpeg(data), (width, height), interpolation=cv2.INTER_AREA
    )


def open_cv_scaled() -> Decoder:
    import cv2

    def decode(data: bytes, height: int, width: int) -> np.ndarray:
        scale = dct_scale(data, height, width)
        rows, columns = (-(-side // scale) for side in simplejpeg.decode_jpeg_header(data)[:2])
        pixels = simplejpeg.decode_jpeg(data, min_height=rows, min_width=columns, min_factor=scale)
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)

    return decode


def open_cv_alone() -> Decoder:
    import cv2

    def decode(data: bytes, height: int, width: int) -> np.ndarray:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)

    return decode


def torchcodec_cpu() -> Decoder:
    from torchcodec.decoders import decode_jpeg

    def decode(data: bytes, height: int, width: int) -> np.ndarray:
        pixels = decode_jpeg(data)
        return resize(pixels.permute(1, 2, 0).contiguous().numpy(), (height, width))

    return decode


def compare(
    kind: str, photos: list[bytes], found: dict[str, Decoder], options: argparse.Namespace
) -> None:
    """Print the rates and differences of all decoders on the same photographs."""
    sizes = [target(data, options.side) for data in photos]
    exact = [pillow(data, *size).astype(int) for data, size in zip(photos, sizes, strict=True)]
    pixels = sum(len(data) for data in photos) / len(photos)
    print(f"{kind}, {len(photos)} photographs of {pixels / 1000:.0f} kB to {options.side} pixels:")

    def run(decode: Decoder) -> Callable[[], object]:
        return lambda: [decode(d, *size) for d, size in zip(photos, sizes, strict=True)]

    times: dict[str, list[float]] = {name: [] for name in found}
    for name in list(found) * options.rounds:
        start = time.process_time()
        run(found[name])()
        times[name].append(time.process_time() - start)
    for name, decode in found.items():
        levels = np.concatenate(
            [
                np.abs(decode(data, *size) - shown).ravel()
                for data, size, shown in zip(photos, sizes, exact, strict=True)
            ]
        )
        print(
            f"  {name:50} {len(photos) / min(times[name]):7.1f} images/s/core  levels mean "
            f"{levels.mean():.2f} p95 {np.percentile(levels, 95):.0f} max {levels.max()}"
        )


def target(data: bytes, side: int) -> tuple[int, int]:
    """Return the size with `side` as the longer one; never enlarged."""
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    factor = min(1.0, side / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


if __name__ == "__main__":
    main()
