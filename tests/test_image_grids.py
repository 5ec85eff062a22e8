"""Truth: pictures hold exactly the pixels that were given, enlarged without smoothing, in reading order."""

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor

from vae_ray.run_files.image_grids import FRAME, GAP, grid, pairs_grid, png_bytes, square_grid, to_uint8

TITLE = "t"


def tiles_of(picture: Image.Image, *, height: int, width: int) -> list[list[NDArray[np.uint8]]]:
    """The tiles of a picture, row by row: found by their frames, not by the layout's own arithmetic."""
    array = np.asarray(picture.convert("RGB"))
    framed = (array == np.array(ImageColor.getrgb(FRAME))).all(2)
    corners = [
        (top, left)
        for top, left in zip(*np.nonzero(framed), strict=True)
        if top + height + 1 < len(framed)
        and left + width + 1 < framed.shape[1]
        and framed[top : top + height + 2, left].all()
        and framed[top, left : left + width + 2].all()
        and framed[top : top + height + 2, left + width + 1].all()
        and framed[top + height + 1, left : left + width + 2].all()
    ]
    rows: dict[int, list[NDArray[np.uint8]]] = {}
    for top, left in corners:
        rows.setdefault(top, []).append(array[top + 1 : top + 1 + height, left + 1 : left + 1 + width])
    return [rows[top] for top in sorted(rows)]


def numbered(n: int, *, channels: int = 1, height: int = 8, width: int = 8) -> torch.Tensor:
    """Images that tell their number by their grey level, 10 levels apart."""
    levels = torch.arange(n) * 10 / 255
    return levels[:, None, None, None].expand(n, channels, height, width)


def level(tile: NDArray[np.uint8]) -> int:
    assert (tile == tile[0, 0, 0]).all()
    return int(tile[0, 0, 0])


def test_values_are_rounded_to_bytes_and_clipped() -> None:
    values = torch.tensor([-3.0, 0.0, 0.4 / 255, 0.6 / 255, 0.5, 254.6 / 255, 1.0, 7.0]).reshape(1, 1, 2, 4)
    assert to_uint8(values)[0].flatten().tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


def test_one_channel_is_grey_three_are_rgb_and_others_their_mean() -> None:
    values = torch.tensor([0.2, 0.4, 0.9])
    for channels, expected in [(1, 51), (3, [51, 102, 230]), (2, 76)]:
        image = values[:channels].reshape(1, channels, 1, 1).expand(1, channels, 3, 5)
        pixels = to_uint8(image)
        assert pixels.shape == ((1, 3, 5, 3) if channels == 3 else (1, 3, 5))
        # 0.9 * 255 = 229.5 and 0.3 * 255 = 76.5: the float32 product may fall on either side
        assert np.abs(pixels[0, 2, 4].astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("height", "width", "factor"), [(8, 8, 7), (28, 28, 2), (14, 5, 4), (3, 56, 1), (60, 90, 1)])
def test_images_are_enlarged_by_a_whole_factor_without_smoothing(height: int, width: int, factor: int) -> None:
    image = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(1))
    picture = grid([image / 255], title=TITLE)
    ((tile,),) = tiles_of(picture, height=height * factor, width=width * factor)
    expected = np.kron(image[0].permute(1, 2, 0).numpy(), np.ones((factor, factor, 1)))
    assert np.array_equal(tile, expected)


@pytest.mark.parametrize(("n", "shape"), [(1, [1]), (3, [2, 1]), (7, [3, 3, 1]), (12, [4, 4, 4])])
def test_a_square_grid_is_filled_row_by_row(n: int, shape: list[int]) -> None:
    rows = tiles_of(square_grid(numbered(n), title=TITLE), height=56, width=56)
    assert [len(row) for row in rows] == shape
    assert [level(tile) for row in rows for tile in row] == [10 * i for i in range(n)]


def test_tiles_do_not_touch() -> None:
    picture = np.asarray(square_grid(torch.ones(4, 1, 8, 8), title=TITLE))
    black = np.asarray(square_grid(torch.zeros(4, 1, 8, 8), title=TITLE))
    differing = picture != black
    columns = np.nonzero(differing.any(0))[0]
    assert (np.diff(columns) - 1).max() == GAP
    assert differing.sum() == 4 * 56 * 56


def test_each_original_stands_right_above_its_reconstruction() -> None:
    originals, reconstructions = numbered(11), numbered(11) + 5 / 255
    rows = tiles_of(pairs_grid(originals, reconstructions, title=TITLE, columns=4), height=56, width=56)
    assert [len(row) for row in rows] == [4, 4, 4, 4, 3, 3]
    above = [level(tile) for row in rows[0::2] for tile in row]
    below = [level(tile) for row in rows[1::2] for tile in row]
    assert above == [10 * i for i in range(11)]
    assert below == [10 * i + 5 for i in range(11)]


def test_rows_keep_their_order() -> None:
    rows = tiles_of(grid([numbered(3), numbered(5)[3:]], title=TITLE), height=56, width=56)
    assert [[level(tile) for tile in row] for row in rows] == [[0, 10, 20], [30, 40]]


def test_a_long_title_and_labels_do_not_cover_or_shift_the_images() -> None:
    plain = tiles_of(grid([numbered(3)], title=TITLE), height=56, width=56)
    labelled = grid([numbered(3)], title="a title far wider than three small images " * 3, row_labels=["a label"])
    assert np.array_equal(tiles_of(labelled, height=56, width=56), plain)


def test_a_png_holds_the_picture_to_the_pixel() -> None:
    picture = square_grid(numbered(5), title=TITLE)
    again = Image.open(io.BytesIO(png_bytes(picture)))
    assert again.format == "PNG"
    assert np.array_equal(np.asarray(again), np.asarray(picture))
