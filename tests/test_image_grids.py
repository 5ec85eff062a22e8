"""Truth: pictures hold exactly the pixels that were given, enlarged without smoothing, in reading order.

Large images are reduced as Pillow reduces them, and pictures have a bounded size whatever their images.
"""

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageColor

from vae_ray.run_files.image_grids import (
    FRAME,
    GAP,
    LARGEST_HEIGHT,
    LARGEST_WIDTH,
    MARGIN,
    SHEET_ROWS,
    SHEET_WIDTH,
    contact_sheet,
    grid,
    pairs_grid,
    png_bytes,
    square_grid,
    to_uint8,
)

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


def test_each_number_of_channels_has_its_colours() -> None:
    values = torch.tensor([0.2, 0.4, 0.8, 0.6, 1.0])
    for channels, expected in [
        (1, 51),
        (2, [51, 102, 51]),  # magenta and green
        (3, [51, 102, 204]),
        (4, [133, 163, 224]),  # 0.6 opaque on white: 0.6 * 0.2 + 0.4 = 0.52
        (5, 153),  # the mean, 0.6
    ]:
        image = values[:channels].reshape(1, channels, 1, 1).expand(1, channels, 3, 5)
        pixels = to_uint8(image)
        assert pixels.shape == ((1, 3, 5, 3) if isinstance(expected, list) else (1, 3, 5))
        # 0.52 * 255 = 132.6; the others are whole numbers but for the rounding of float32
        assert np.array_equal(pixels[0, 2, 4], expected), channels


def test_two_equal_channels_are_grey() -> None:
    grey = torch.rand(3, 1, 7, 5, generator=torch.Generator().manual_seed(2))
    assert (to_uint8(grey.expand(3, 2, 7, 5)) == to_uint8(grey)[..., None]).all()


@pytest.mark.parametrize(("height", "width", "factor"), [(8, 8, 7), (28, 28, 2), (14, 5, 4), (3, 56, 1), (60, 90, 1)])
def test_images_are_enlarged_by_a_whole_factor_without_smoothing(height: int, width: int, factor: int) -> None:
    image = torch.randint(0, 256, (1, 3, height, width), generator=torch.Generator().manual_seed(1))
    picture = grid([image / 255], title=TITLE)
    ((tile,),) = tiles_of(picture, height=height * factor, width=width * factor)
    expected = np.kron(image[0].permute(1, 2, 0).numpy(), np.ones((factor, factor, 1)))
    assert np.array_equal(tile, expected)


@pytest.mark.parametrize(
    ("image", "tile"),
    [
        ((256, 256), (128, 128)),
        ((300, 100), (128, 43)),
        ((97, 290), (43, 128)),
        ((129, 64), (128, 64)),
        ((512, 4), (128, 4)),
        ((2, 2000), (2, 128)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_large_images_are_reduced_as_pillow_reduces_them(
    image: tuple[int, int], tile: tuple[int, int], channels: int
) -> None:
    pixels = torch.randint(0, 256, (3, channels, *image), generator=torch.Generator().manual_seed(3))
    (tiles,) = tiles_of(grid([pixels / 255], title=TITLE), height=tile[0], width=tile[1])
    assert len(tiles) == 3
    for drawn, original in zip(tiles, pixels.to(torch.uint8).permute(0, 2, 3, 1).numpy(), strict=True):
        picture = Image.fromarray(original if channels == 3 else original[..., 0])
        expected = picture.resize(tile[::-1], Image.Resampling.BILINEAR).convert("RGB")
        # Pillow rounds to bytes between its two passes, and its weights to 8 bits
        assert np.abs(drawn.astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize(("size", "tile"), [(8, 56), (28, 56), (64, 64), (65, 64), (256, 64)])
def test_a_grid_may_have_a_smaller_largest_tile(size: int, tile: int) -> None:
    images = numbered(2, height=size, width=size)
    (row,) = tiles_of(square_grid(images, title=TITLE, largest_tile=64), height=tile, width=tile)
    assert [level(drawn) for drawn in row] == [0, 10]


def test_a_pattern_finer_than_a_tile_has_its_mean_not_another_pattern() -> None:
    checkerboard = (torch.arange(256)[:, None] + torch.arange(256)) % 2
    ((tile,),) = tiles_of(grid([checkerboard.float().expand(1, 1, 256, 256)], title=TITLE), height=128, width=128)
    assert set(tile[1:-1, 1:-1].flatten().tolist()) <= {127, 128}


def test_64_samples_of_256_pixels_are_a_picture_of_1054_by_1078() -> None:
    picture = square_grid(torch.zeros(64, 3, 256, 256), title=TITLE)
    assert picture.size == (8 * (128 + GAP) - GAP + 2 * MARGIN, 8 * (128 + GAP) + 30 + MARGIN)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 48, 64), (3, 300, 20), (1, 4, 512), (3, 256, 256)])
@pytest.mark.parametrize(("num_rows", "columns"), [(1, 1), (2, 100), (12, 11), (3, 700), (50, 21)])
def test_no_picture_is_wider_or_higher_than_the_bounds(
    shape: tuple[int, int, int], num_rows: int, columns: int
) -> None:
    row = torch.zeros(1, *shape).expand(columns, *shape)
    picture = grid([row] * num_rows, title="title " * 100, row_labels=["a label " * 30] * num_rows)
    assert picture.width <= LARGEST_WIDTH
    assert picture.height <= LARGEST_HEIGHT


def test_many_pairs_are_as_many_columns_as_rows() -> None:
    images = torch.zeros(1, 1, 28, 28).expand(1000, 1, 28, 28)
    picture = pairs_grid(images, images, title=TITLE)
    assert max(picture.size) <= LARGEST_WIDTH
    assert 0.8 < picture.width / picture.height < 1.25


def test_tiles_become_smaller_before_rows_are_continued() -> None:
    images = torch.linspace(0, 1, 30)[:, None, None, None].expand(30, 1, 128, 128)
    (row,) = tiles_of(grid([images], title=TITLE), height=65, width=65)
    assert [level(tile) for tile in row] == to_uint8(images)[:, 0, 0].tolist()


def test_a_row_that_is_too_wide_continues_on_the_next_line() -> None:
    # 59 tiles of 32 pixels fit: 130 are three lines of 44, with 2032 // 44 pixels for each tile and its frame
    images = (torch.arange(130) / 255)[:, None, None, None].expand(130, 1, 256, 256)
    lines = tiles_of(grid([images, images + 50 / 255], title=TITLE), height=44, width=44)
    assert [len(line) for line in lines] == [44, 44, 42] * 2
    assert [level(tile) for line in lines for tile in line] == [*range(130), *range(50, 180)]


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
    margins = np.asarray(labelled)
    assert (margins[:, -MARGIN:] == 255).all(), "the title ends inside the picture"


def test_a_png_holds_the_picture_to_the_pixel() -> None:
    picture = square_grid(numbered(5), title=TITLE)
    again = Image.open(io.BytesIO(png_bytes(picture)))
    assert again.format == "PNG"
    assert np.array_equal(np.asarray(again), np.asarray(picture))


def test_a_contact_sheet_shows_every_group_beside_its_label() -> None:
    groups = [("train · cat (240)", numbered(5)), ("train · dog (0)", numbered(0)), ("test · cat (3)", numbered(3))]
    sheet = contact_sheet(groups, title="photos", lines=["train 240, test 3", "skipped: none"])
    rows = tiles_of(sheet, height=56, width=56)
    assert [[level(tile) for tile in row] for row in rows] == [[0, 10, 20, 30, 40], [0, 10, 20]]
    assert sheet.mode == "L"


def test_a_contact_sheet_has_colours_and_images_of_several_sizes() -> None:
    generator = torch.Generator().manual_seed(4)
    large, small = (torch.randint(0, 256, (2, 3, *size), generator=generator) for size in ((90, 60), (64, 48)))
    sheet = contact_sheet([("a", large / 255), ("b", small / 255)], title=TITLE, lines=[])
    for images in (large, small):
        ((*tiles,),) = tiles_of(sheet, height=images.shape[2], width=images.shape[3])
        assert np.array_equal(tiles, images.permute(0, 2, 3, 1).numpy())


def test_a_contact_sheet_of_any_number_of_groups_images_and_lines_is_bounded() -> None:
    images = torch.zeros(1, 1, 8, 8).expand(1000, 1, 8, 8)
    one = contact_sheet([("all", images)], title="title " * 200, lines=[])
    many = contact_sheet([(f"class {i} " * 20, images) for i in range(100)], title=TITLE, lines=["line " * 100] * 70)
    assert len(tiles_of(one, height=56, width=56)) == SHEET_ROWS
    assert len(tiles_of(many, height=56, width=56)) == SHEET_ROWS
    assert one.width <= SHEET_WIDTH
    assert many.width <= SHEET_WIDTH
    assert many.height < 3000
