"""Pictures as real software leaves them: metadata in odd places, unusual pixels, stray bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from tests.data_pipeline.shard_fixtures import encode, exif, photo

XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    b'tiff:Orientation="6"/></x:xmpmeta>'
)
XMP_ELEMENT = XMP.replace(b'tiff:Orientation="6"/>', b"><tiff:Orientation>8</tiff:Orientation></d>")


def tiff_block(value: int = 6, kind: int = 3, order: str = "<") -> bytes:
    """Return an EXIF block with one tag, the orientation, of a TIFF type (3: short)."""
    packed = {1: "BBH", 3: "HH", 4: "I", 8: "hH", 9: "i"}[kind]
    values = struct.pack(order + packed, value, *[0] * (len(packed) - 1))
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + values + bytes(4)


def segment(marker: int, content: bytes) -> bytes:
    """Return a segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def exif_segment(block: bytes) -> bytes:
    return segment(0xE1, b"Exif\0\0" + block)


def xmp_segment(xmp: bytes) -> bytes:
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)


def in_jpeg(data: bytes, inserted: bytes, before: bytes | None = None) -> bytes:
    """Return a JPEG with bytes after its first marker, or before the first marker `before`."""
    at = 2 if before is None else data.index(before)
    return data[:at] + inserted + data[at:]


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG."""
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def in_png(data: bytes, inserted: bytes, before: bytes = b"IDAT") -> bytes:
    """Return a PNG with bytes before the first chunk of a kind."""
    at = data.index(before) - 4
    return data[:at] + inserted + data[at:]


def raw_profile(block: bytes) -> bytes:
    """Return EXIF as ImageMagick wrote it into PNGs before they had a chunk for it."""
    whole = b"Exif\0\0" + block
    return b"\nexif\n%8d\n" % len(whole) + whole.hex().encode() + b"\n"


def _jpegs(picture: Image.Image) -> Iterator[tuple[str, bytes]]:
    plain = encode(picture, "JPEG", quality=90)
    yield "jpeg", plain
    yield "jpeg-progressive", encode(picture, "JPEG", progressive=True)
    yield "jpeg-grey", encode(picture.convert("L"), "JPEG")
    yield "jpeg-cmyk", encode(picture.convert("CMYK"), "JPEG")
    yield "mpo", encode(picture, "MPO", save_all=True, append_images=[picture], exif=exif(6))
    for place, before in (("first", None), ("late", b"\xff\xda")):
        yield f"jpeg-exif-{place}", in_jpeg(plain, exif_segment(tiff_block()), before)
        yield f"jpeg-xmp-{place}", in_jpeg(plain, xmp_segment(XMP), before)
    yield "jpeg-xmp-element", in_jpeg(plain, xmp_segment(XMP_ELEMENT))
    yield "jpeg-xmp-twice", in_jpeg(plain, xmp_segment(XMP) + xmp_segment(XMP_ELEMENT))
    yield "jpeg-exif-over-xmp", in_jpeg(plain, xmp_segment(XMP) + exif_segment(tiff_block(3)))
    yield (
        "jpeg-empty-exif-then-exif",
        in_jpeg(plain, exif_segment(b"") + exif_segment(tiff_block())),
    )
    yield "jpeg-no-exif-then-xmp", in_jpeg(plain, exif_segment(b"nothing") + xmp_segment(XMP))
    block = tiff_block()
    cut = exif_segment(block[:9]) + exif_segment(block[9:])
    yield "jpeg-exif-in-two-parts", in_jpeg(plain, cut)
    yield "jpeg-two-exif", in_jpeg(plain, exif_segment(block) + exif_segment(tiff_block(3)))
    for kind in (1, 4, 8, 9):
        yield f"jpeg-exif-type-{kind}", in_jpeg(plain, exif_segment(tiff_block(6, kind)))
    yield "jpeg-exif-big-endian", in_jpeg(plain, exif_segment(tiff_block(8, order=">")))
    first = 2 + 2 + struct.unpack(">H", plain[4:6])[0]
    yield "jpeg-zeros-between", plain[:first] + bytes(3) + plain[first:]
    yield "jpeg-stray-byte", in_jpeg(plain, b"x", b"\xff\xc0")
    yield "jpeg-stray-marks", plain[:first] + b"\xff\0\xff\0" + plain[first:]
    yield "jpeg-mark-at-start", in_jpeg(plain, b"\xff\0")
    yield "jpeg-fill-bytes", in_jpeg(plain, b"\xff" * 5000, b"\xff\xc0")
    yield "jpeg-many-stray-bytes", in_jpeg(plain, b"stray" * 2000, b"\xff\xc0")
    yield "jpeg-long-comment", plain[:first] + b"\xff\xfe\0\3abc" + plain[first:]
    for length in (0, 1):
        yield f"jpeg-comment-{length}", plain[:first] + bytes([255, 254, 0, length]) + plain[first:]
    yield "jpeg-empty-app", in_jpeg(plain, b"\xff\xe1\0\0")


def _pngs(picture: Image.Image) -> Iterator[tuple[str, bytes]]:
    plain = encode(picture, "PNG")
    yield "png", plain
    yield (
        "png-16",
        encode(Image.fromarray(np.asarray(picture.convert("L")) * np.uint16(257)), "PNG"),
    )
    yield "png-alpha", encode(Image.merge("RGBA", (*picture.split(), picture.getchannel(0))), "PNG")
    yield "png-transparent", encode(picture.quantize(8), "PNG", transparency=1)
    raw = raw_profile(tiff_block())
    metadata = {
        "exif": chunk(b"eXIf", tiff_block()),
        "xmp": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        "xmp-packed": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
        "xmp-text": chunk(b"tEXt", b"XML:com.adobe.xmp\0" + XMP),
        "raw": chunk(b"tEXt", b"Raw profile type exif\0" + raw),
        "raw-packed": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        "raw-damaged": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  9\nxyz"),
        "two-exif": chunk(b"eXIf", tiff_block(3)) + chunk(b"eXIf", tiff_block()),
        "exif-text": chunk(b"tEXt", b"exif\0Exif\0\0" + tiff_block()),
    }
    for name, inserted in metadata.items():
        yield f"png-{name}", in_png(plain, inserted)
        yield f"png-{name}-late", in_png(plain, inserted, b"IEND")
    both = metadata["raw"] + chunk(b"eXIf", tiff_block(3))
    yield "png-exif-over-raw", in_png(plain, both)
    frames = [picture, picture.transpose(Image.Transpose.ROTATE_180)]
    for default in (False, True):
        moving = encode(picture, "PNG", save_all=True, append_images=frames, default_image=default)
        for name in ("exif", "xmp"):
            yield f"apng-{name}-{default}", in_png(moving, metadata[name])
            yield f"apng-{name}-{default}-late", in_png(moving, metadata[name], b"IEND")
            after = moving.index(b"IDAT") + 8
            after += int.from_bytes(moving[after - 12 : after - 8], "big")
            between = moving[:after] + metadata[name] + moving[after:]
            yield f"apng-{name}-{default}-between", between


def _webps(picture: Image.Image) -> Iterator[tuple[str, bytes]]:
    yield "webp", encode(picture, "WEBP")
    yield "webp-lossless", encode(picture, "WEBP", lossless=True)
    for name, options in {
        "exif": {"exif": tiff_block()},
        "xmp": {"xmp": XMP},
        "exif-over-xmp": {"exif": tiff_block(3), "xmp": XMP},
        "byte": {"exif": tiff_block(6, 1)},
    }.items():
        made = encode(picture, "WEBP", lossless=True, **options)
        yield f"webp-{name}", made
        unannounced = bytearray(made)
        unannounced[20] &= ~0x0C
        yield f"webp-{name}-unannounced", bytes(unannounced)
    moving = {"save_all": True, "append_images": [picture.rotate(180)], "lossless": True}
    yield "webp-moving", encode(picture, "WEBP", exif=tiff_block(), **moving)


def _others(picture: Image.Image) -> Iterator[tuple[str, bytes]]:
    yield "gif", encode(picture, "GIF")
    yield "gif-moving", encode(picture, "GIF", save_all=True, append_images=[picture.rotate(180)])
    for name in ("BMP", "PPM", "JPEG2000", "AVIF", "TIFF"):
        yield name.lower(), encode(picture, name)
    yield "avif-exif", encode(picture, "AVIF", exif=exif(6))
    yield "avif-xmp", encode(picture, "AVIF", xmp=XMP)
    yield "tiff-exif", encode(picture, "TIFF", exif=exif(6))
    yield "tiff-xmp", encode(picture, "TIFF", tiffinfo={700: XMP})
    yield "tiff-xmp-and-exif", encode(picture, "TIFF", tiffinfo={700: XMP, 274: 3})
    yield "tiff-packed", encode(picture, "TIFF", compression="tiff_lzw", tiffinfo={274: 8})
    grey = np.asarray(picture.convert("L"))
    yield "pgm", b"P5 %d %d 255\n" % picture.size + grey.tobytes()
    yield "pgm-16", b"P5 %d %d 65535\n" % picture.size + (grey * np.uint16(257)).tobytes()
    yield "pgm-999", b"P5 %d %d 999\n" % picture.size + grey.astype(">u2").tobytes()
    plain = b" ".join(b"%d" % value for value in np.asarray(picture).reshape(-1))
    yield "ppm-plain", b"P3 %d %d 255\n# by hand\n" % picture.size + plain + b"\n"
    yield "tiff-16", encode(Image.fromarray(grey * np.uint16(257)), "TIFF")
    yield "tiff-float", encode(Image.fromarray((grey / 255).astype(np.float32)), "TIFF")
    yield "tiff-int32", encode(Image.fromarray(grey.astype(np.int32)), "TIFF")
    yield "tiff-lab", encode(Image.new("LAB", picture.size), "TIFF")


def odd_pictures(height: int = 21, width: int = 34) -> dict[str, bytes]:
    """Return encoded pictures by name."""
    picture = photo(height, width)
    makers = (_jpegs, _pngs, _webps, _others)
    return {name: data for maker in makers for name, data in maker(picture)}


def opened(data: bytes) -> Image.Image:
    """Return the image as a user opens it."""
    return Image.open(io.BytesIO(data))
