"""Labelled grids of small images, enlarged without smoothing."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

TILE_PIXELS = 56
"""Small images are enlarged by the whole factor that makes them nearest to this size."""
GAP = 2
"""Pixels between two tiles: the frame of each, one pixel wide."""
MARGIN = 8
FONT_SIZE = 14
PAPER, INK, FRAME = ("#ffffff", "#282828", "#cdcdcd")
PNG_COMPRESSION = 1
"""zlib's level. Enlarged pixels compress well at any level; the default, 6, takes several times as long."""


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Bytes of images `(N, C, H, W)` in [0, 1]: grey `(N, H, W)`, RGB `(N, H, W, 3)` where C is 3.

    Values outside are clipped; any other number of channels is averaged to grey.
    """
    images = images.detach().float().cpu().clamp(0, 1)
    pixels = images.permute(0, 2, 3, 1) if images.shape[1] == 3 else images.mean(1)
    return (pixels * 255).round().to(torch.uint8).numpy()


def grid(
    rows: Sequence[Tensor], *, title: str, row_labels: Sequence[str] | None = None, group: int | None = None
) -> Image.Image:
    """A labelled picture of `rows`, each images `(columns, C, H, W)` in [0, 1].

    `row_labels` are written at the left of the rows. Every `group` rows there is a gap (default: none).
    """
    tiles = [_enlarged(to_uint8(row)) for row in rows]
    tile_height, tile_width = tiles[0].shape[1:3]
    font = ImageFont.load_default(FONT_SIZE)
    gutter = int(max((font.getlength(label) for label in row_labels), default=0)) + MARGIN if row_labels else 0
    title_height = FONT_SIZE + 2 * MARGIN
    columns = max(len(row) for row in tiles)
    group = group or len(tiles)
    num_groups = -(-len(tiles) // group)
    width = max(2 * MARGIN + gutter + columns * (tile_width + GAP) - GAP, int(font.getlength(title)) + 2 * MARGIN)
    height = title_height + len(tiles) * (tile_height + GAP) + (num_groups - 1) * MARGIN + MARGIN
    picture = Image.new("RGB" if tiles[0].ndim == 4 else "L", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((MARGIN, MARGIN), title, fill=INK, font=font)
    for i, row in enumerate(tiles):
        top = title_height + i * (tile_height + GAP) + i // group * MARGIN
        if row_labels:
            middle = top + tile_height // 2
            draw.text((MARGIN, middle), row_labels[i], fill=INK, font=font, anchor="lm")
        picture.paste(Image.fromarray(_framed(row)), (MARGIN + gutter - 1, top - 1))
    return picture


def square_grid(images: Tensor, *, title: str) -> Image.Image:
    """A grid of `(N, C, H, W)` images, as near to square as N allows, filled row by row."""
    columns = int(np.ceil(np.sqrt(len(images))))
    return grid(list(images.split(columns)), title=title)


def pairs_grid(originals: Tensor, reconstructions: Tensor, *, title: str, columns: int = 8) -> Image.Image:
    """Originals with their reconstructions right below; both `(N, C, H, W)` in [0, 1]."""
    rows = [row for pair in zip(originals.split(columns), reconstructions.split(columns), strict=True) for row in pair]
    return grid(rows, title=title, row_labels=["original", "reconstruction"] * (len(rows) // 2), group=2)


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()


def _framed(tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Tiles `(n, h, w)` or `(n, h, w, 3)` side by side, each in its frame: `(h + 2, n * (w + 2), ...)`."""
    widths = [(0, 0), (1, 1), (1, 1), (0, 0)][: tiles.ndim]
    level = ImageColor.getrgb(FRAME)[0]  # a grey
    return np.concatenate(list(np.pad(tiles, widths, constant_values=level)), axis=1)


def _enlarged(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    factor = max(1, round(TILE_PIXELS / max(images.shape[1:3])))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)
