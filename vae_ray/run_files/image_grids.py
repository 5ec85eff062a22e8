"""Labelled grids of images: samples, reconstructions and traversals of a model, the contact sheet of a data set.

An image is shown as a tile that keeps its proportion. A small image is enlarged by the whole factor that makes its
longer side nearest to `TILE_PIXELS`, without smoothing; one larger than `LARGEST_TILE` is reduced, antialiased. Where
many tiles would make a picture wider than `LARGEST_WIDTH` or higher than `LARGEST_HEIGHT`, all are made smaller, down
to `SMALLEST_TILE`; rows that are still too wide continue on the next line. So no picture is wider than `LARGEST_WIDTH`;
one is higher than `LARGEST_HEIGHT` only if it has more rows than fit in it with the smallest tiles.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from vae_ray.run_files.captions import FONT_SIZE, Caption

TILE_PIXELS = 56
"""Small images are enlarged by the whole factor that makes their longer side nearest to this size."""
LARGEST_TILE = 128
"""Pixels of a tile's longer side at most."""
SMALLEST_TILE = 32
"""Images are not reduced below this length of their longer side."""
THINNEST_TILE = 4
"""No side is reduced below this: an image of 512x4 pixels is a tile of 128x4."""
LARGEST_WIDTH, LARGEST_HEIGHT = 2048, 4096
"""Of a grid, in pixels: a screen shows the whole width, and scrolls down rather than sideways."""
GAP = 2
"""Pixels between two tiles: the frame of each, one pixel wide."""
MARGIN = 8
LINE_SPACING, LABEL_SPACING = 6, 2
LABEL_WIDTH = 240
TITLE_WIDTH = 720
"""A grid is as wide as its title, up to this width; a title that is wider than both is shortened."""
SHEET_WIDTH = 1240
SHEET_TITLE_SIZE = 18
SHEET_ROWS = 30
"""Rows of images at most, and lines of text above them at most."""
PAPER, INK, FRAME = ("#ffffff", "#282828", "#cdcdcd")
PNG_COMPRESSION = 1
"""zlib's level. Enlarged pixels compress well at any level; the default, 6, takes several times as long."""


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Bytes of images `(N, C, H, W)` in [0, 1]: grey `(N, H, W)` or RGB `(N, H, W, 3)`. Values outside are clipped.

    1 channel is grey; 2 are magenta and green, as in microscopy, so that equal values are grey; 3 are RGB; 4 are RGB
    and opacity, on white; the mean of 5 or more is grey.
    """
    return _to_bytes(_grey_or_rgb(images))


def grid(
    rows: Sequence[Tensor],
    *,
    title: str,
    row_labels: Sequence[str] | None = None,
    group: int | None = None,
    largest_tile: int = LARGEST_TILE,
) -> Image.Image:
    """A labelled picture of `rows`, each images `(columns, C, H, W)` in [0, 1].

    `row_labels` are written at the left of the rows. Every `group` rows there is a gap; by default there is none, or
    one after each row if rows continue on the next line. No side of a tile is larger than `largest_tile` pixels.
    """
    labels = row_labels or [""] * len(rows)
    height, width = rows[0].shape[2:]
    room = LARGEST_WIDTH - 2 * MARGIN - _gutter(labels)
    per_line = _even(max(len(row) for row in rows), most=room // (_tile_size(height, width, within=(0, 0))[1] + GAP))
    lines = [row.split(per_line) for row in rows]
    is_split = any(len(parts) > 1 for parts in lines)
    group = group or (1 if is_split else len(rows))
    num_gaps = math.ceil(len(rows) / group) - 1
    room_below = LARGEST_HEIGHT - FONT_SIZE - (3 + num_gaps) * MARGIN
    num_lines = sum(len(parts) for parts in lines)
    within = (min(largest_tile, room_below // num_lines - GAP), min(largest_tile, room // per_line - GAP))
    size = _tile_size(height, width, within=within)
    drawn = [
        _Row(label if number == 0 else "", _tiles(part, size), gap_above=number == 0 and i > 0 and i % group == 0)
        for i, (label, parts) in enumerate(zip(labels, lines, strict=True))
        for number, part in enumerate(parts)
    ]
    return _picture([_Text(title, FONT_SIZE)], drawn, text_width=TITLE_WIDTH)


def square_grid(images: Tensor, *, title: str, largest_tile: int = LARGEST_TILE) -> Image.Image:
    """A grid of `(N, C, H, W)` images, as near to square as N allows, filled row by row."""
    columns = math.ceil(math.sqrt(len(images)))
    return grid(list(images.split(columns)), title=title, group=columns, largest_tile=largest_tile)


def pairs_grid(
    originals: Tensor,
    reconstructions: Tensor,
    *,
    title: str,
    columns: int | None = None,
    largest_tile: int = LARGEST_TILE,
) -> Image.Image:
    """Originals with their reconstructions right below; both `(N, C, H, W)` in [0, 1].

    By default there are at least 8 columns, and as many as rows if there are more images.
    """
    columns = columns or max(8, math.ceil(math.sqrt(2 * len(originals))))
    rows = [row for pair in zip(originals.split(columns), reconstructions.split(columns), strict=True) for row in pair]
    labels = ["original", "reconstruction"] * (len(rows) // 2)
    return grid(rows, title=title, row_labels=labels, group=2, largest_tile=largest_tile)


def contact_sheet(groups: Sequence[tuple[str, Tensor]], *, title: str, lines: Sequence[str]) -> Image.Image:
    """A picture of a data set: a title, lines of text, and the images of each group at the right of its label.

    A group is its label, such as "train · cat (240)", and images `(n, C, H, W)` in [0, 1], where n may be 0; sizes may
    differ. The sheet has at most `SHEET_ROWS` rows of images, shared equally by the groups; images beyond the rows of
    a group are not shown. Of groups and of lines beyond `SHEET_ROWS` only the number is shown.
    """
    text_width = SHEET_WIDTH - 2 * MARGIN
    room = text_width - _gutter([label for label, _ in groups[:SHEET_ROWS]])
    rows_per_group = SHEET_ROWS // max(1, min(len(groups), SHEET_ROWS))
    rows = []
    for label, images in groups[:SHEET_ROWS]:
        height, width = images.shape[2:]
        size = _tile_size(height, width, within=(LARGEST_TILE, LARGEST_TILE))
        parts = images.split(room // (size[1] + GAP))[:rows_per_group]
        rows += [_Row(label if i == 0 else "", _tiles(part, size), gap_above=i == 0) for i, part in enumerate(parts)]
    header = [_Text(title, SHEET_TITLE_SIZE), *(_Text(line, FONT_SIZE) for line in _first(lines))]
    footer = [_Text(line, FONT_SIZE) for line in _first([label for label, _ in groups])[SHEET_ROWS:]]
    return _picture(header, rows, footer, text_width=text_width)


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()


class _Text(NamedTuple):
    """A line of the header or the footer."""

    text: str
    size: int


class _Row(NamedTuple):
    """Tiles `(n, h, w)` or `(n, h, w, 3)` side by side."""

    label: str
    tiles: NDArray[np.uint8]
    gap_above: bool

    def height(self) -> int:
        """With its frame; high enough for a label."""
        return max(self.tiles.shape[1] if len(self.tiles) else 0, FONT_SIZE + LABEL_SPACING) + GAP

    def width(self) -> int:
        return len(self.tiles) * (self.tiles.shape[2] + GAP)


def _picture(
    header: Sequence[_Text], rows: Sequence[_Row], footer: Sequence[_Text] = (), *, text_width: int
) -> Image.Image:
    """Text, rows with their labels, and text below; as wide as the rows, or as the text up to `text_width`."""
    gutter = _gutter([row.label for row in rows])
    texts = [Caption(line.text, width=text_width, size=line.size).width() for line in (*header, *footer)]
    width = max(gutter + max((row.width() for row in rows), default=0) - GAP, math.ceil(max(texts)))
    top = _height(header) + MARGIN
    height = top + sum(row.height() + row.gap_above * MARGIN for row in rows) + MARGIN + _height(footer)
    is_grey = all(row.tiles.ndim == 3 for row in rows)
    picture = Image.new("L" if is_grey else "RGB", (width + 2 * MARGIN, height), PAPER)
    draw = ImageDraw.Draw(picture)
    _draw_lines(draw, header, top=MARGIN, width=width)
    for row in rows:
        top += row.gap_above * MARGIN
        label = Caption(row.label, width=LABEL_WIDTH)
        draw.text((MARGIN, top + (row.height() - GAP) // 2), label.text, fill=INK, font=label.font, anchor="lm")
        if len(row.tiles):
            picture.paste(Image.fromarray(_framed(row.tiles)), (MARGIN + gutter - 1, top - 1))
        top += row.height()
    _draw_lines(draw, footer, top=top + MARGIN, width=width)
    return picture


def _draw_lines(draw: ImageDraw.ImageDraw, lines: Sequence[_Text], *, top: int, width: int) -> None:
    for line in lines:
        caption = Caption(line.text, width=width, size=line.size)
        draw.text((MARGIN, top), caption.text, fill=INK, font=caption.font)
        top += line.size + LINE_SPACING


def _height(lines: Sequence[_Text]) -> int:
    """Of lines of text with a margin; 0 without lines."""
    return sum(line.size + LINE_SPACING for line in lines) - LINE_SPACING + MARGIN if lines else 0


def _gutter(labels: Sequence[str]) -> int:
    """Pixels at the left of the tiles; 0 without labels."""
    width = max((Caption(label, width=LABEL_WIDTH).width() for label in labels), default=0)
    return math.ceil(width) + MARGIN if width else 0


def _first(lines: Sequence[str]) -> list[str]:
    """At most `SHEET_ROWS` lines; of those beyond, the number."""
    rest = len(lines) - SHEET_ROWS
    return [*lines[:SHEET_ROWS], *([f"… and {rest:,} more"] if rest > 0 else [])]


def _even(total: int, *, most: int) -> int:
    """The size of `total` divided into parts that are as large as possible, at most `most`, and nearly equal."""
    return math.ceil(total / math.ceil(total / most))


def _tile_size(height: int, width: int, *, within: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image's tile: `within` these, unless they require one that is too small."""
    longest = max(height, width)
    scale = min(within[0] / height, within[1] / width)
    if scale >= 1:
        factor = min(int(scale), max(1, round(TILE_PIXELS / longest)))
        return height * factor, width * factor
    scale = max(scale, min(1, SMALLEST_TILE / longest))
    return max(min(height, THINNEST_TILE), round(height * scale)), max(min(width, THINNEST_TILE), round(width * scale))


def _tiles(images: Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Images `(n, C, H, W)` in [0, 1] as tiles of `size`: reduced, or enlarged by the whole factor that it is."""
    height, width = images.shape[2:]
    if size[0] < height or size[1] < width:
        return _to_bytes(F.interpolate(_grey_or_rgb(images), size, mode="bilinear", antialias=True))
    return to_uint8(images).repeat(size[0] // height, axis=1).repeat(size[1] // width, axis=2)


def _grey_or_rgb(images: Tensor) -> Tensor:
    """`(N, 1 or 3, H, W)` float32 in [0, 1] of images with any number of channels; see `to_uint8`."""
    images = images.detach().float().cpu().clamp(0, 1)
    match images.shape[1]:
        case 1 | 3:
            return images
        case 2:
            return images[:, [0, 1, 0]]
        case 4:
            colour, opacity = images.split([3, 1], dim=1)
            return colour * opacity + 1 - opacity
        case _:
            return images.mean(1, keepdim=True)


def _to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """`(N, H, W)` or `(N, H, W, 3)` of grey or RGB images `(N, 1 or 3, H, W)` in [0, 1]."""
    pixels = images.permute(0, 2, 3, 1) if images.shape[1] == 3 else images[:, 0]
    return (pixels * 255).round().to(torch.uint8).numpy()


def _framed(tiles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Tiles `(n, h, w)` or `(n, h, w, 3)` side by side, each in its frame: `(h + 2, n * (w + 2), ...)`."""
    widths = [(0, 0), (1, 1), (1, 1), (0, 0)][: tiles.ndim]
    level = ImageColor.getrgb(FRAME)[0]  # a grey
    return np.concatenate(list(np.pad(tiles, widths, constant_values=level)), axis=1)
