"""Draws a pack: its images, the patches that were dropped from them, and its token sequence.

`draw_pack` returns an SVG that opens in a browser and follows its light or dark mode. report.html
embeds it if it is in the run directory as `pack.svg`.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

if TYPE_CHECKING:
    from zeta.packed import PackedBatch

_WIDTH = 640.0  # width of the drawing, in units of the SVG
_GAP = 6.0
_CAPTION = 15.0  # room under an image, in units
_IMAGES_HEIGHT = 460.0  # desired height of all images together
_MAX_PIXELS = 800_000  # pixels of all images together: keeps the file below about 2 MB
_BAR = 2.5  # coloured line under the tokens of an image
_DROPPED_GREY, _DROPPED_ALPHA = 136, 96  # of 255: grey on a white page and on a dark one
_MARGIN = 4  # pixels beside and under an image on a sheet
_HUES = (212, 28, 152, 338, 266, 50, 188, 6)

_STYLE = """
  svg { color-scheme: light dark; font-family: system-ui, -apple-system, "Segoe UI", sans-serif;
        --ink: #1d2733; --muted: #5f6b7a; --padding: #b6bfca; --prefix: #1d2733; }
  text { fill: var(--ink); } .head { font-size: 14px; font-weight: 600; }
  .note { font-size: 12px; fill: var(--muted); } .caption { font-size: 10px; fill: var(--muted); }
  @media (max-width: 520px) { .head { font-size: 20px; } .note { font-size: 18px; }
        .caption { font-size: 13px; } }
  @media (prefers-color-scheme: dark) {
        svg { --ink: #e6e9ee; --muted: #9aa5b4; --padding: #4a5564; --prefix: #e6e9ee; } }
"""

Pixels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PackedImage:
    """An image of a pack, with the patches that were dropped from it."""

    pixels: Pixels
    """[h*p, w*p, 3] RGB of the whole grid, dropped patches included."""
    kept: Mask
    """[h, w] mask of the patches that are in the pack."""
    caption: str = ""
    """Text under the image, such as its class."""


@dataclass(frozen=True)
class PackPicture:
    """A pack as `draw_pack` draws it.

    Raises:
        ValueError: pixels and mask of an image differ in size, or the images exceed the budget.
    """

    images: tuple[PackedImage, ...]
    """Images in the order of the sequence."""
    patch_size: int
    token_budget: int
    prefix_tokens: int = 0
    """Tokens that the model adds before the patches of each image."""

    def __post_init__(self) -> None:
        for number, image in enumerate(self.images):
            grid = image.kept.shape
            expected = (grid[0] * self.patch_size, grid[1] * self.patch_size, 3)
            if image.pixels.shape != expected:
                raise ValueError(
                    f"image {number} of the pack has pixels {list(image.pixels.shape)}; its grid "
                    f"{list(grid)} of {self.patch_size} px patches needs {list(expected)}"
                )
        if self.tokens > self.token_budget:
            raise ValueError(
                f"the images have {self.tokens} tokens, but token_budget is {self.token_budget}"
            )

    @classmethod
    def from_batch(
        cls, batch: PackedBatch, pictures: Sequence[Pixels], captions: Sequence[str] = ()
    ) -> PackPicture:
        """Return the picture of a pack.

        Args:
            batch: the pack.
            pictures: whole grid of each image of the pack, in its order, [h*p, w*p, 3] RGB.
            captions: text under each image; empty: no texts.

        Raises:
            ValueError: not as many pictures or captions as images, or a picture of another size.
        """
        used = [row for row, length in enumerate(batch.lengths[:-1]) if length > 0]
        words = list(captions) or [""] * len(used)
        if not len(pictures) == len(words) == len(used):
            raise ValueError(
                f"the pack holds {len(used)} images, but {len(pictures)} pictures and "
                f"{len(words)} captions are given"
            )
        coords, starts = batch.coords.cpu().numpy(), batch.cu_seqlens.tolist()
        images = []
        for row, pixels, word in zip(used, pictures, words, strict=True):
            kept: Mask = np.zeros(batch.grids[row].tolist(), np.bool_)
            y, x = coords[starts[row] + batch.prefix_tokens : starts[row + 1]].T
            kept[y, x] = True
            images.append(PackedImage(pixels, kept, word))
        return cls(
            tuple(images),
            patch_size=math.isqrt(batch.patches.shape[1] // 3),
            token_budget=batch.patches.shape[0],
            prefix_tokens=batch.prefix_tokens,
        )

    @cached_property
    def tokens(self) -> int:
        """Tokens that belong to images; the rest of the budget is tail padding."""
        return sum(self.prefix_tokens + int(image.kept.sum()) for image in self.images)

    @cached_property
    def drop_mean(self) -> float:
        """Share of all patches that were dropped."""
        patches = sum(image.kept.size for image in self.images)
        kept = sum(int(image.kept.sum()) for image in self.images)
        return 1 - kept / patches if patches else 0.0


def draw_pack(picture: PackPicture) -> bytes:
    """Return the picture as SVG: the images, and below them their token sequence."""
    drop = f", {picture.drop_mean:.0%} of patches dropped" if picture.drop_mean else ""
    parts = [f'<text class="head" y="19">{len(picture.images)} images{drop}</text>']
    images, y = _draw_images(picture, y=34.0)
    parts += images
    fill = picture.tokens / picture.token_budget
    y += 22
    parts.append(
        f'<text class="head" y="{y:g}">One sequence: {picture.tokens:,} of '
        f"{picture.token_budget:,} tokens, {fill:.1%} full</text>"
    )
    sequence, y = _draw_sequence(picture, y=y + 14)
    parts += sequence
    legend, y = _draw_legend(picture, y=y + 8)
    parts += legend
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:g} {y:g}" role="img">\n'
        f"<title>One pack: {len(picture.images)} images in one token sequence</title>\n"
        f"<style>{_STYLE}</style>\n"
        '<defs><pattern id="padding" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="1.6" height="5" '
        'style="fill: var(--padding)"/></pattern></defs>\n'
        f"{body}\n</svg>\n"
    ).encode()


def draw_images(picture: PackPicture) -> Image.Image:
    """Return the images of a pack in rows, with dropped patches greyed out, as a pixel image."""
    patches = sum(image.kept.size for image in picture.images)
    unit = max(2, min(picture.patch_size, math.isqrt(_MAX_PIXELS // max(1, patches))))
    across = max(
        1.0, math.sqrt(1.5 * patches)
    )  # width of the sheet in patches; it is wider than high
    rows = list(_shelves(picture.images, _WIDTH / across))
    heights = [max(image.kept.shape[0] for _, image in row) * unit + _MARGIN for row in rows]
    widths = [sum(image.kept.shape[1] * unit + _MARGIN for _, image in row) for row in rows]
    sheet = Image.new("RGB", (max(widths, default=1), max(1, sum(heights))), "white")
    y = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for _, image in row:
            drawn = Image.fromarray(_with_drops(image, unit))
            sheet.paste(drawn, (x, y), drawn)
            x += drawn.width + _MARGIN
        y += height
    return sheet


def _draw_images(picture: PackPicture, y: float) -> tuple[list[str], float]:
    """Lay the images out in rows, in the order of the pack; return the parts and the lower end."""
    patches = sum(image.kept.size for image in picture.images)
    # About a third of the area goes to gaps and captions.
    unit = math.sqrt(_WIDTH * _IMAGES_HEIGHT / (1.5 * patches)) if patches else 1.0
    widest = max((image.kept.shape[1] for image in picture.images), default=1)
    unit = min(unit, 10.0, _WIDTH / widest)  # side of a patch
    side = min(picture.patch_size, 16, max(2, math.isqrt(_MAX_PIXELS // max(1, patches))))
    parts: list[str] = []
    for row in _shelves(picture.images, unit):
        x, height = 0.0, max(image.kept.shape[0] for _, image in row) * unit
        for number, image in row:
            h, w = (length * unit for length in image.kept.shape)
            top = y + height - h  # images of a row stand on one line
            parts.append(_image(_with_drops(image, side), x, top, w, h))
            parts.append(_rect(x, y + height + 1, w, _BAR, _colour(number)))
            words = _shorten(image.caption, w)
            parts.append(
                f'<text class="caption" text-anchor="middle" x="{x + w / 2:.2f}" '
                f'y="{y + height + _CAPTION:.2f}">{words}</text>'
            )
            x += w + _GAP
        y += height + _CAPTION + _GAP
    return parts, y


def _shelves(images: Sequence[PackedImage], unit: float) -> Iterator[list[tuple[int, PackedImage]]]:
    """Yield rows of (number, image) that fit the width."""
    row: list[tuple[int, PackedImage]] = []
    x = 0.0
    for number, image in enumerate(images):
        width = image.kept.shape[1] * unit
        if row and x + width > _WIDTH + 1e-6:
            yield row
            row, x = [], 0.0
        row.append((number, image))
        x += width + _GAP
    if row:
        yield row


def _draw_sequence(picture: PackPicture, y: float) -> tuple[list[str], float]:
    """Draw the token sequence, wrapped like text; return the parts and the lower end."""
    columns = 32
    while columns * columns < 3 * picture.token_budget and columns < 256:
        columns *= 2  # about three times as wide as high
    cell = _WIDTH / columns
    side = min(picture.patch_size, max(2, 768 // columns))  # pixels of a patch's thumbnail
    gap = 1 if columns <= 64 else 0  # a clear column between tokens, where they are large enough
    tokens = np.zeros((picture.token_budget, side, side + gap, 4), np.uint8)
    owner = np.full(picture.token_budget, -1)
    prefix = np.zeros(picture.token_budget, np.bool_)
    start = 0
    for number, image in enumerate(picture.images):
        kept = _patch_thumbnails(image, side)[image.kept]
        first = start + picture.prefix_tokens
        end = first + len(kept)
        owner[start:end], prefix[start:first] = number, True
        tokens[first:end, :, :side, :3], tokens[first:end, :, :side, 3] = kept, 255
        start = end

    parts: list[str] = []
    for low in range(0, picture.token_budget, columns):
        row = slice(low, min(low + columns, picture.token_budget))
        strip = tokens[row].transpose(1, 0, 2, 3).reshape(side, -1, 4)
        parts.append(_image(strip, 0, y, cell * strip.shape[1] / (side + gap), cell))
        for a, b in _runs(owner[row]):
            number = int(owner[low + a])
            fill, top, height = (
                ("url(#padding)", y, cell) if number < 0 else (_colour(number), y + cell, _BAR)
            )
            parts.append(_rect(a * cell, top, (b - a) * cell, height, fill))
        parts += [
            _rect((a + 0.2) * cell, y + 0.2 * cell, 0.6 * cell, 0.6 * cell, "var(--prefix)")
            for a in np.flatnonzero(prefix[row])
        ]
        y += cell + _BAR + 2
    return parts, y


def _draw_legend(picture: PackPicture, y: float) -> tuple[list[str], float]:
    """Explain the marks that occur."""
    padding = picture.token_budget - picture.tokens
    lines = []
    if picture.drop_mean:
        lines.append(("#88888860", "dropped before packing: costs no token"))
    if picture.prefix_tokens:
        lines.append(("var(--prefix)", "prefix token of the model (class token or register)"))
    if padding:
        word = "token" if padding == 1 else "tokens"
        lines.append(("url(#padding)", f"tail padding: {padding:,} {word}"))
    parts = []
    for fill, words in lines:
        y += 24
        parts.append(_rect(0, y - 12, 14, 14, fill))
        parts.append(f'<text class="note" x="22" y="{y:g}">{words}</text>')
    return parts, y + 8


def _with_drops(image: PackedImage, side: int) -> Pixels:
    """Return [h*side, w*side, 4] pixels of an image; dropped patches are grey and translucent."""
    h, w = image.kept.shape
    rgb = np.asarray(
        Image.fromarray(image.pixels).resize((w * side, h * side), Image.Resampling.BOX)
    )
    kept = np.kron(image.kept, np.ones((side, side), np.bool_))
    grey = (0.3 * rgb.mean(axis=2, keepdims=True) + 0.7 * _DROPPED_GREY).astype(np.uint8)
    alpha = np.where(kept, 255, _DROPPED_ALPHA).astype(np.uint8)
    return np.dstack([np.where(kept[..., None], rgb, grey), alpha])


def _patch_thumbnails(image: PackedImage, side: int) -> Pixels:
    """Return [h, w, side, side, 3] thumbnails of all patches."""
    h, w = image.kept.shape
    small = Image.fromarray(image.pixels).resize((w * side, h * side), Image.Resampling.BOX)
    return np.asarray(small).reshape(h, side, w, side, 3).transpose(0, 2, 1, 3, 4)


def _runs(values: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each stretch of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    yield from pairwise(edges)


def _image(pixels: Pixels, x: float, y: float, width: float, height: float) -> str:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG", optimize=True)
    data = base64.b64encode(target.getvalue()).decode()
    return (
        f'<image x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{data}"/>'
    )


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" '
        f'style="fill: {fill}"/>'
    )


def _colour(number: int) -> str:
    return f"hsl({_HUES[number % len(_HUES)]}, 65%, 52%)"


def _shorten(words: str, width: float) -> str:
    """Cut a caption to fit under an image, and escape it for XML."""
    room = max(1, int(width / 6.5))
    clean = "".join(letter if letter.isprintable() else " " for letter in words)
    return escape(clean if len(clean) <= room else clean[: max(1, room - 1)] + "\u2026")
