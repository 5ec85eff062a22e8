"""Truth: what becomes of each kind of image, and of bytes that are none."""

import io
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image

from vae_ray.data.decoding import MAX_PIXELS, ImageRules, Unusable, convert_images, decode_image

CHANCE = np.random.default_rng(5)
COLOUR = CHANCE.integers(0, 256, (7, 11, 3), dtype=np.uint8)
GREY = np.ascontiguousarray(COLOUR[..., 0])
ALPHA = CHANCE.integers(0, 256, (7, 11), dtype=np.uint8)
ROWS, COLUMNS = np.mgrid[:40, :52]
SMOOTH = np.stack([ROWS * 6, COLUMNS * 4, ROWS + 2 * COLUMNS], axis=-1).astype(np.uint8)
"""Survives JPEG."""
BEHIND = (10, 200, 30)
AS_IS = ImageRules()
Fit = Literal["crop", "pad", "stretch"]
FITS: tuple[Fit, ...] = get_args(Fit)


def encoded(image: Image.Image | NDArray[Any], kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, bits: int, kind: int, pixels: bytes, transparent: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    rest = (chunk(b"tRNS", transparent) if transparent else b"") + chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + header + rest + chunk(b"IEND", b"")


def tiff(values: NDArray[Any], *, sample_format: int, bits: int = 0, photometric: int = 1, width: int = 0) -> bytes:
    """An uncompressed grey TIFF, little or big-endian as the values are."""
    order, content = values.dtype.str[0].replace("|", "<"), values.tobytes()
    sizes = {256: width or values.shape[1], 257: values.shape[0], 278: values.shape[0]}
    numbers = {258: bits or values.dtype.itemsize * 8, 259: 1, 262: photometric, 277: 1, 339: sample_format}
    tags = sorted({**sizes, **numbers, 273: 134, 279: len(content)}.items())
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4) + content


def first(image: NDArray[Any]) -> NDArray[Any]:
    """(H, W) or (H, W, C) with the channels first."""
    return np.moveaxis(np.atleast_3d(image), 2, 0)


def over(colour: NDArray[Any], alpha: NDArray[Any], background: tuple[int, ...]) -> NDArray[np.uint8]:
    """round(a c + (1 - a) b), for (H, W, C) over a background of C channels."""
    weight = alpha[..., None] / 255
    return first(np.rint(weight * np.atleast_3d(colour) + (1 - weight) * np.array(background)).astype(np.uint8))


def inverse(image: Image.Image) -> Image.Image:
    return Image.fromarray(255 - np.asarray(image))


def quantized() -> Image.Image:
    return Image.fromarray(COLOUR).quantize(5)


def of_palette(alphas: list[int]) -> NDArray[np.uint8]:
    """What `quantized` shows where its first colours have `alphas`."""
    table = np.array(alphas + [255] * 251, dtype=np.uint8)
    return over(np.asarray(quantized().convert("RGB")), table[np.asarray(quantized())], BEHIND)


BITS = GREY > 99
WHITE_OR_BLACK = first(BITS.astype(np.uint8) * 255)
G16 = CHANCE.integers(0, 65536, (7, 11), dtype=np.uint16)
G16[0, :2] = 0, 65535
FROM_16 = first(np.rint(G16 / 257).astype(np.uint8))
FLOATS = CHANCE.random((7, 11), dtype=np.float32)
FROM_FLOATS = first(np.rint(255 * FLOATS.astype(np.float64)).astype(np.uint8))
GREY_RGB = np.repeat(GREY[..., None], 3, axis=2)
LA, RGBA = np.dstack([GREY, ALPHA]), np.dstack([COLOUR, ALPHA])
CMYK = Image.fromarray(CHANCE.integers(0, 256, (7, 11, 4), dtype=np.uint8), "CMYK")

EXACT: dict[str, tuple[bytes, NDArray[np.uint8]]] = {
    "1, PNG": (encoded(Image.fromarray(BITS), "PNG"), WHITE_OR_BLACK),
    "1, TIFF": (encoded(Image.fromarray(BITS), "TIFF"), WHITE_OR_BLACK),
    "1, TIFF of fax": (encoded(Image.fromarray(BITS), "TIFF", compression="group4"), WHITE_OR_BLACK),
    "1, PBM": (encoded(Image.fromarray(BITS), "PPM"), WHITE_OR_BLACK),
    "L, PNG": (encoded(GREY, "PNG"), first(GREY)),
    "L, BMP": (encoded(GREY, "BMP"), first(GREY)),
    "L, GIF": (encoded(GREY, "GIF"), first(GREY)),
    "L, TIFF": (encoded(GREY, "TIFF"), first(GREY)),
    "L, TIFF, 0 is white": (tiff(GREY, sample_format=1, photometric=0), first(255 - GREY)),
    "L, PGM of 100 levels": (b"P5 3 1 100\n\0\x32\x64", np.array([[[0, 128, 255]]], dtype=np.uint8)),
    "L, PNG of 2 bits": (png(4, 1, 2, 0, b"\0\x1b"), np.array([[[0, 85, 170, 255]]], dtype=np.uint8)),
    "LA, PNG": (encoded(LA, "PNG"), over(GREY_RGB, ALPHA, BEHIND)),
    "LA, TIFF": (encoded(LA, "TIFF"), over(GREY_RGB, ALPHA, BEHIND)),
    "RGB in grey, PNG": (encoded(GREY_RGB, "PNG"), first(GREY)),
    "RGB, PNG": (encoded(COLOUR, "PNG"), first(COLOUR)),
    "RGB, BMP": (encoded(COLOUR, "BMP"), first(COLOUR)),
    "RGB, PPM": (encoded(COLOUR, "PPM"), first(COLOUR)),
    "RGB, TIFF of LZW": (encoded(COLOUR, "TIFF", compression="tiff_lzw"), first(COLOUR)),
    "RGB, WebP": (encoded(COLOUR, "WEBP", lossless=True), first(COLOUR)),
    "RGBX, TIFF": (encoded(Image.fromarray(RGBA, "RGBX"), "TIFF"), first(COLOUR)),
    "RGBA, PNG": (encoded(RGBA, "PNG"), over(COLOUR, ALPHA, BEHIND)),
    "RGBA, TIFF": (encoded(RGBA, "TIFF"), over(COLOUR, ALPHA, BEHIND)),
    "RGBA, WebP": (encoded(RGBA, "WEBP", lossless=True, exact=True), over(COLOUR, ALPHA, BEHIND)),
    "RGBA without transparency": (encoded(np.dstack([COLOUR, 0 * ALPHA + 255]), "PNG"), first(COLOUR)),
    "RGB with a transparent colour": (
        encoded(COLOUR, "PNG", transparency=tuple(map(int, COLOUR[2, 3]))),
        over(COLOUR, 255 - 255 * (COLOUR[2, 3] == COLOUR).all(2).astype(np.uint8), BEHIND),
    ),
    "L with a transparent level": (
        encoded(GREY, "PNG", transparency=int(GREY[2, 3])),
        over(GREY_RGB, 255 * (GREY[2, 3] != GREY).astype(np.uint8), BEHIND),
    ),
    "L of 2 bits with a transparent level": (
        png(4, 1, 2, 0, b"\0\x1b", b"\0\2"),
        np.array([[[0, 85, BEHIND[i], 255]] for i in range(3)], dtype=np.uint8),
    ),
    "L of 4 bits with a transparent level": (
        png(2, 1, 4, 0, b"\0\x1b", b"\0\x0b"),
        np.array([[[17, BEHIND[i]]] for i in range(3)], dtype=np.uint8),
    ),
    "1 with a transparent level": (
        png(2, 1, 1, 0, b"\0\x40", b"\0\1"),
        np.array([[[0, BEHIND[i]]] for i in range(3)], dtype=np.uint8),
    ),
    "P, PNG": (encoded(quantized(), "PNG"), of_palette([])),
    "P, BMP": (encoded(quantized(), "BMP"), of_palette([])),
    "P, GIF": (encoded(quantized(), "GIF"), of_palette([])),
    "P, TIFF": (encoded(quantized(), "TIFF"), of_palette([])),
    "P with a transparent index, PNG": (encoded(quantized(), "PNG", transparency=2), of_palette([255, 255, 0])),
    "P with a transparent index, GIF": (encoded(quantized(), "GIF", transparency=2), of_palette([255, 255, 0])),
    "P with alphas, PNG": (encoded(quantized(), "PNG", transparency=b"\x07\x80"), of_palette([7, 128])),
    "PA, TIFF": (encoded(quantized().convert("PA"), "TIFF"), of_palette([])),
    "CMYK, TIFF": (encoded(CMYK, "TIFF"), first(np.asarray(CMYK.convert("RGB")))),
    "YCbCr, TIFF": (
        encoded(Image.fromarray(COLOUR).convert("YCbCr"), "TIFF"),
        first(np.asarray(Image.fromarray(COLOUR).convert("YCbCr").convert("RGB"))),
    ),
    "16 bits, PNG": (encoded(G16, "PNG"), FROM_16),
    "16 bits, PGM": (encoded(G16, "PPM"), FROM_16),
    "16 bits, TIFF": (encoded(G16, "TIFF"), FROM_16),
    "16 bits, TIFF of LZW": (encoded(G16, "TIFF", compression="tiff_lzw"), FROM_16),
    "16 bits, big-endian TIFF": (tiff(G16.astype(">u2"), sample_format=1), FROM_16),
    "16 bits, TIFF, 0 is white": (tiff(G16, sample_format=1, photometric=0), 255 - FROM_16),
    "16 bits with a sign, TIFF": (
        tiff(np.array([[0, 1000, 32767]], "<i2"), sample_format=2),
        np.array([[[0, 8, 255]]], dtype=np.uint8),
    ),
    "12 bits, TIFF": (
        tiff(np.array([[0xFF, 0xF0, 0x10]], np.uint8), sample_format=1, bits=12, width=2),
        np.array([[[255, 1]]], dtype=np.uint8),
    ),
    "32 bits, TIFF": (tiff(G16.astype("<u4") * 65537, sample_format=1), FROM_16),
    "32 bits with a sign, TIFF": (
        tiff(np.array([[0, 2**30, 2**31 - 1]], ">i4"), sample_format=2),
        np.array([[[0, 128, 255]]], dtype=np.uint8),
    ),
    "16 bits with a transparent level": (
        png(2, 1, 16, 0, b"\0\x05\x07\x01\x02", b"\1\2"),
        np.array([[[5, BEHIND[i]]] for i in range(3)], dtype=np.uint8),
    ),
    "float, TIFF": (encoded(FLOATS, "TIFF"), FROM_FLOATS),
    "float, PFM": (encoded(FLOATS, "PPM"), FROM_FLOATS),
    # of 16 bits a channel Pillow reads the upper byte
    "16 bits of RGB": (png(1, 1, 16, 2, b"\0\1\xff\2\xff\3\0"), np.array([[[1]], [[2]], [[3]]], dtype=np.uint8)),
    "16 bits of RGB with a transparent colour": (
        png(2, 1, 16, 2, b"\0\1\xff\2\xff\3\0\7\0\x08\0\x09\0", b"\1\xff\2\xff\3\0"),
        np.array([[[10, 7]], [[200, 8]], [[30, 9]]], dtype=np.uint8),
    ),
    "16 bits of grey and alpha": (png(1, 1, 16, 4, b"\0\x42\xff\xff\xff"), np.array([[[0x42]]], dtype=np.uint8)),
    "first frame of a GIF": (encoded(GREY, "GIF", save_all=True, append_images=[Image.fromarray(ALPHA)]), first(GREY)),
    "first frame of a WebP": (
        encoded(COLOUR, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(COLOUR[::-1])]),
        first(COLOUR),
    ),
    "first page of a TIFF": (encoded(GREY, "TIFF", save_all=True, append_images=[Image.fromarray(ALPHA)]), first(GREY)),
}


@pytest.mark.parametrize("kind", EXACT)
def test_a_lossless_file_has_exactly_these_pixels(kind: str) -> None:
    content, expected = EXACT[kind]
    pixels = decode_image(content, ImageRules(background=BEHIND))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_a_jpeg_has_the_colours_that_were_saved(mode: str) -> None:
    saved = Image.fromarray(SMOOTH).convert(mode)
    expected = first(np.asarray(saved.convert("L" if mode == "L" else "RGB")))
    pixels = decode_image(encoded(saved, "JPEG", quality=100, subsampling=0), AS_IS)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= 4  # of JPEG's rounding


def test_lab_becomes_the_srgb_colour_that_it_means() -> None:
    # white, black and the mid grey whose L* is 53.585: sRGB 128
    lab = Image.frombytes("LAB", (3, 1), bytes([255, 0, 0, 0, 0, 0, 137, 0, 0]))
    pixels = decode_image(encoded(lab, "TIFF"), ImageRules(channels=3))
    assert np.abs(pixels[:, 0].astype(int) - [255, 0, 128]).max() <= 2  # L* is stored in 8 bits


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    upright = first(SMOOTH)
    stored = {  # as a camera held so would store the picture
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x),
        7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }[orientation](SMOOTH)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    content = encoded(np.ascontiguousarray(stored), kind, exif=exif, **options)
    assert np.abs(decode_image(content, AS_IS).astype(int) - upright).max() <= (4 if kind == "JPEG" else 0)
    small = ImageRules(size=(8, 5))  # a JPEG is decoded at half its size, which is not a whole number of pixels
    expected = convert_images(upright[None], small)[0]
    assert np.abs(decode_image(content, small).astype(int) - expected).max() <= (4 if kind == "JPEG" else 0)


def test_a_picture_with_damaged_exif_is_read() -> None:
    content = encoded(SMOOTH, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert decode_image(content, AS_IS).shape == (3, 40, 52)


def test_value_range_maps_two_values_to_black_and_white_for_any_dtype() -> None:
    values = np.array([[0, 10, 35, 60, 110, 250]])
    expected = np.array([[[0, 0, 64, 128, 255, 255]]], dtype=np.uint8)  # 63.75, and 127.5, which is rounded to even
    rules = ImageRules(value_range=(10, 110))
    for dtype in ("uint8", "uint16", ">u2", "int16", "int32", "int64", ">f4", "float16", "float64"):
        assert np.array_equal(convert_images(values.astype(dtype)[None], rules)[0], expected), dtype
    for dtype in (np.uint8, np.uint16, np.int32, np.float32):
        kind = "PNG" if dtype in (np.uint8, np.uint16) else "TIFF"
        assert np.array_equal(decode_image(encoded(values.astype(dtype), kind), rules), expected), dtype
    negative = convert_images(values[None], ImageRules(value_range=(110, 10)))
    assert np.array_equal(negative, [[[[255, 255, 191, 128, 0, 0]]]])


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        ("bool", [0, 1], [0, 255]),
        ("uint8", [7, 255], [7, 255]),
        ("int8", [0, 127], [0, 255]),
        ("uint16", [257, 65535], [1, 255]),
        (">u2", [257, 65535], [1, 255]),
        ("int16", [0, 32767], [0, 255]),
        ("uint32", [2**31, 2**32 - 1], [128, 255]),
        (">i8", [2**62, 2**63 - 1], [128, 255]),
        ("float16", [0.25, 1], [64, 255]),
        ("float32", [-1e-7, 1 + 5e-7], [0, 255]),
        (">f8", [0.2, 0.999], [51, 255]),
    ],
)
def test_white_is_the_largest_integer_or_one(dtype: str, values: list[float], expected: list[int]) -> None:
    array = np.array([[values]], dtype=object).astype(dtype)
    assert np.array_equal(convert_images(array, AS_IS), [[[expected]]])


def test_the_axis_of_the_channels_is_found() -> None:
    images = CHANCE.integers(0, 256, (5, 3, 6, 8), dtype=np.uint8)
    last = np.moveaxis(images, 1, 3)
    assert np.array_equal(convert_images(last, AS_IS), images)
    assert np.array_equal(convert_images(images[:, 0], AS_IS), images[:, :1])
    assert np.array_equal(convert_images(last[..., :1], AS_IS), images[:, :1])
    # 3 channels are likelier than 4 or 2
    assert np.array_equal(convert_images(images[:, :, :, :4], AS_IS), images[:, :, :, :4])
    assert np.array_equal(convert_images(last[:, :2], AS_IS), images[:, :, :2])
    for shape in ((5, 3, 6, 3), (5, 3, 6, 1), (5, 2, 6, 4)):
        with pytest.raises(Unusable, match=r"may come first or last"):
            convert_images(np.zeros(shape), AS_IS)
    for shape in ((5,), (5, 6), (5, 6, 7, 8), (2, 5, 3, 6, 8)):
        with pytest.raises(Unusable, match=r"should be \(N, H, W\)"):
            convert_images(np.zeros(shape), AS_IS)


def test_an_array_that_needs_no_conversion_is_not_copied() -> None:
    grey, colour = np.ascontiguousarray(GREY[None, None]), np.ascontiguousarray(first(COLOUR)[None])
    assert convert_images(grey, AS_IS) is grey
    assert np.shares_memory(convert_images(colour, ImageRules(channels=3)), colour)
    assert np.shares_memory(convert_images(colour, ImageRules(size=(7, 11))), colour)


def test_grey_is_found_by_content_and_for_each_image() -> None:
    grey = np.repeat(GREY[None, None], 3, axis=1)
    mixed = np.concatenate([grey, first(COLOUR)[None]])
    for rules in (AS_IS, ImageRules(size=(4, 5))):
        images = convert_images(mixed, rules)
        assert [image.shape[0] for image in images] == [1, 3]
        assert np.array_equal(images[0], convert_images(GREY[None], rules)[0])
    one_dot = grey.copy()
    one_dot[0, 2, 6, 10] ^= 1
    assert [image.shape[0] for image in convert_images(one_dot, AS_IS)] == [3]


def test_one_channel_is_pillows_luminance_and_three_are_grey_repeated() -> None:
    every = np.stack(np.meshgrid(*[np.arange(0, 256, 15)] * 3), axis=-1).reshape(1, -1, 3).astype(np.uint8)
    luminance = decode_image(encoded(every, "PNG"), ImageRules(channels=1))
    assert np.array_equal(luminance[0], np.asarray(Image.fromarray(every).convert("L")))
    assert np.array_equal(decode_image(encoded(GREY, "PNG"), ImageRules(channels=3)), np.stack([GREY] * 3))


def test_grey_with_alpha_stays_grey_on_a_grey_background() -> None:
    pixels = decode_image(encoded(LA, "PNG"), ImageRules(background=(90, 90, 90)))
    assert np.array_equal(pixels, over(GREY, ALPHA, (90,)))


@pytest.mark.parametrize("fit", FITS)
def test_an_image_of_the_size_is_not_resampled(fit: Fit) -> None:
    for image in (COLOUR, GREY, G16, RGBA):
        content = encoded(image, "PNG")
        assert np.array_equal(decode_image(content, ImageRules(size=(7, 11), fit=fit)), decode_image(content, AS_IS))


def test_crop_cuts_the_centre_in_whole_pixels_where_one_side_fits() -> None:
    for image in (COLOUR, GREY, G16):
        cut = decode_image(encoded(image, "PNG"), ImageRules(size=(7, 6)))
        assert np.array_equal(cut, decode_image(encoded(image, "PNG"), AS_IS)[:, :, 2:8])


def test_pad_centres_on_the_background() -> None:
    rules = ImageRules(size=(12, 11), fit="pad", background=BEHIND)
    for image in (COLOUR, GREY, G16, FLOATS):
        kind = "TIFF" if image is FLOATS else "PNG"
        padded = decode_image(encoded(image, kind), rules)
        whole = decode_image(encoded(image, kind), ImageRules(channels=3))
        assert np.array_equal(padded[:, 2:9], whole)
        for rows in (padded[:, :2], padded[:, 9:]):
            assert (rows == np.array(BEHIND)[:, None, None]).all()
    grey = decode_image(encoded(GREY, "PNG"), ImageRules(size=(12, 11), fit="pad", background=(9, 9, 9)))
    assert grey.shape == (1, 12, 11)
    assert grey[0, 0, 0] == 9


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("fit", FITS)
def test_a_plane_of_one_value_keeps_it_at_any_size(fit: Fit, dtype: str) -> None:
    value = {"uint8": 77, "uint16": 77 * 257, "float32": 77 / 255}[dtype]
    images = np.full((2, 9, 31), value, dtype=dtype)
    pixels = np.stack(list(convert_images(images, ImageRules(size=(20, 5), fit=fit, background=(77, 77, 77)))))
    assert pixels.shape == (2, 1, 20, 5)
    assert (pixels == 77).all()


def test_reducing_is_antialiased() -> None:
    checkerboard = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = convert_images(checkerboard[None], ImageRules(size=(8, 8)))[0]
    assert np.abs(pixels.astype(int) - 127).max() <= 4


def test_16_bits_are_reduced_before_they_are_rounded() -> None:
    # 8 bits would see 0 and 1 only; the mean is 0.4 levels of 8 bits below 1 everywhere
    levels = np.tile(np.array([0, 257 * 2], np.uint16), (64, 32))[None]
    assert (convert_images(levels, ImageRules(size=(8, 8), fit="stretch"))[0] == 1).all()
    faint = np.full((1, 64, 64), 100, np.uint16)
    assert (convert_images(faint, ImageRules(size=(8, 8), value_range=(0, 200)))[0] == 128).all()


def test_a_large_jpeg_is_reduced_while_it_is_decoded_and_looks_the_same() -> None:
    rows, columns = np.mgrid[:301, :403]
    waves = [128 + 60 * np.sin(rows / a) + 60 * np.cos(columns / b) for a, b in ((9, 14), (20, 11), (31, 17))]
    content = encoded(np.stack(waves, axis=-1).astype(np.uint8), "JPEG", quality=95)
    whole = decode_image(content, AS_IS)
    for size in ((16, 24), (37, 37), (64, 48)):
        for fit in FITS:
            rules = ImageRules(size=size, fit=fit)
            difference = decode_image(content, rules).astype(int) - convert_images(whole[None], rules)[0]
            assert np.abs(difference).max() <= 6  # a factor that is not applied to the cut pixels gives 30
    for size in ((151, 202), (200, 300)):  # not more than twice the size: exactly
        rules = ImageRules(size=size)
        assert np.array_equal(decode_image(content, rules), convert_images(whole[None], rules)[0])


SIDES = st.integers(1, 12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_file_and_the_array_of_its_pixels_are_equal(data: st.DataObject) -> None:
    height, width, channels = data.draw(SIDES), data.draw(SIDES), data.draw(st.sampled_from([1, 2, 3, 4]))
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16])) if channels == 1 else np.uint8
    image = data.draw(arrays.arrays(dtype, (height, width, channels)))
    rules = ImageRules(
        size=data.draw(st.none() | st.tuples(SIDES, SIDES)),
        fit=data.draw(st.sampled_from(FITS)),
        channels=data.draw(st.sampled_from(["auto", 1, 3])),
        background=data.draw(st.sampled_from([(255, 255, 255), BEHIND])),
        value_range=data.draw(st.sampled_from([None, (0, 200), (31.5, 90)])),
    )
    stored = image[..., 0] if channels == 1 else image
    array = stored[None] if channels == 1 else np.moveaxis(image, 2, 0)[None]
    if array.ndim == 4 and width <= 4:
        array = np.moveaxis(array, 1, 3)
        assume(height > 4)  # else it is ambiguous which axis holds the channels
    expected = convert_images(array, rules)[0]
    assert np.array_equal(decode_image(encoded(stored, "PNG"), rules), expected)
    assert expected.shape[0] in (1, 3)
    assert rules.size in (None, expected.shape[1:])


def test_a_path_bytes_and_an_open_file_are_read_alike(tmp_path: Path) -> None:
    for kind, compression in (("PNG", None), ("BMP", None), ("TIFF", "tiff_lzw"), ("TIFF", None)):
        file = tmp_path / "no suffix"
        file.write_bytes(encoded(COLOUR, kind, compression=compression))
        with file.open("rb") as opened:
            opened.read(3)
            pixels = [decode_image(content, AS_IS) for content in (file, file.read_bytes(), opened)]
            assert not opened.closed
        assert all(np.array_equal(each, first(COLOUR)) for each in pixels)


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"not an image, though its name ends in .jpg", "is no image that can be read (none of JPEG, PNG,"),
    "another format": (encoded(COLOUR, "ICO"), "is no image that can be read"),
    "a damaged header": (
        encoded(COLOUR, "PNG")[:20] + b"damage" + encoded(COLOUR, "PNG")[26:],
        "is a PNG image that is damaged or of a kind",
    ),
    "double precision": (tiff(FLOATS.astype("f8"), sample_format=3), "is a TIFF image that is damaged or of a kind"),
    "truncated JPEG": (encoded(COLOUR, "JPEG")[:-90], "is truncated: "),
    "truncated PNG": (encoded(COLOUR, "PNG")[:-90], "is truncated: "),
    "truncated BMP": (encoded(COLOUR, "BMP")[:-90], "is truncated: "),
    "no pixels": (b"P5 0 4 255\n", "is a PPM image that is damaged"),
    "20000 x 20000": (png(20000, 20000, 8, 2, b""), f"has more than {MAX_PIXELS:,} pixels"),
    "just too large": (png(13378, 13378, 1, 0, b""), f"has more than {MAX_PIXELS:,} pixels"),
    "almost too large": (png(13377, 13377, 1, 0, b""), "is truncated"),
    "NaN": (encoded(FLOATS * np.nan, "TIFF"), "has values that are NaN or infinite"),
    "floats of 0 to 255": (
        encoded(np.array([[0, 127.5, 255]], np.float32), "TIFF"),
        "has float32 values from 0 to 255, outside of [0, 1]; set data.value_range, as in data.value_range 0,255",
    ),
    "below zero": (
        tiff(np.array([[-1000, 3000]], "<i2"), sample_format=2),
        "values from -1000 to 3000, some below 0; set data.value_range, as in data.value_range -1000,3000",
    ),
    "all black": (
        tiff(np.array([[0, 255]], "<i4"), sample_format=2),
        "values from 0 to 255, all of which are black where white is 2147483647; set data.value_range",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_used_is_refused_with_one_line(kind: str) -> None:
    content, reason = REFUSED[kind]
    with pytest.raises(Unusable) as refusal:
        decode_image(content, AS_IS)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_limit_of_pixels_holds_where_pillows_was_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(Unusable, match=r"has more than 178,956,970 pixels"):
        decode_image(png(13378, 13378, 1, 0, b""), AS_IS)


def test_values_of_16_bits_in_colour_have_no_range() -> None:
    with pytest.raises(Unusable, match=r"16 bits a channel .* data\.value_range cannot apply"):
        decode_image(EXACT["16 bits of RGB"][0], ImageRules(value_range=(0, 4095)))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in ((tmp_path / "pipe", "pipe"), (tmp_path, "directory"), (tmp_path / "x", "No such file")):
        with pytest.raises(Unusable, match=reason):
            decode_image(path, AS_IS)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full((2, 5, 6), 1 + 1j), "dtype complex128"),
        (np.full((2, 5, 6), "a"), "dtype <U1"),
        (np.full((2, 5, 6), None), "dtype object"),
        (np.full((2, 5, 6), 3.0), "from 3 to 3, outside of"),
        (np.full((2, 5, 6), np.inf), "NaN or infinite"),
        (np.full((2, 5, 6), -1), "some below 0"),
        (np.full((2, 5, 6), 255), "all of which are black"),
        (np.zeros((0, 5, 6)), "no pixels"),
        (np.zeros((2, 0, 6)), "no pixels"),
    ],
    ids=str,
)
def test_arrays_that_cannot_be_images_are_refused(values: NDArray[Any], reason: str) -> None:
    for rules in (AS_IS, ImageRules(size=(3, 4))):
        with pytest.raises(Unusable, match=reason):
            convert_images(values, rules)


def test_one_dark_image_among_bright_ones_is_dark() -> None:
    images = np.zeros((2, 5, 6), np.int32)
    images[0], images[1] = 2**31 - 1, 3
    for rules in (AS_IS, ImageRules(size=(3, 4))):
        assert [int(image.max()) for image in convert_images(images, rules)] == [255, 0]


@pytest.mark.parametrize("fit", FITS)
def test_any_shape_becomes_any_shape(fit: Fit) -> None:
    for height, width in ((1, 5000), (5000, 1), (1, 1), (3, 700)):
        for size in ((64, 48), (1, 1), (2, 300)):
            content = encoded(np.full((height, width, 3), BEHIND, np.uint8), "PNG")
            pixels = decode_image(content, ImageRules(size=size, fit=fit, background=BEHIND))
            assert pixels.shape == (3, *size)
            assert (pixels == np.array(BEHIND)[:, None, None]).all()


def damaged(content: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.3:
        return content[: chance.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        where = chance.randrange(min(len(content), chance.choice([40, 300, len(content)])))
        where = where if chance.random() < 0.7 else -1 - where  # the tags of a TIFF are at its end
        changed[where] = chance.choice([0, 127, 128, 255, chance.randrange(256)])
    return bytes(changed)


INTACT: dict[str, bytes] = {kind: content for kind, (content, _) in EXACT.items()} | {
    "JPEG with EXIF": encoded(SMOOTH, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"),
    "progressive JPEG": encoded(SMOOTH, "JPEG", progressive=True),
    "CMYK JPEG": encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG"),
    "lossy WebP": encoded(SMOOTH, "WEBP"),
    "plain PPM": b"P3 2 2 255\n1 2 3 4 5 6 7 8 9 10 11 12\n",
    **{
        f"TIFF of {compression}": encoded(SMOOTH, "TIFF", compression=compression)
        for compression in ("tiff_adobe_deflate", "jpeg", "packbits", "zstd", "lzma")
    },
}


@pytest.mark.parametrize("kind", INTACT)
def test_damaged_files_are_read_or_refused_in_silence(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever Pillow raises, warns of or logs, and whatever its libraries print; here a warning is an error."""
    chance = random.Random(kind)
    refusals = []
    for _ in range(40):
        try:
            pixels = decode_image(damaged(INTACT[kind], chance), ImageRules(size=chance.choice([None, (5, 4)])))
        except Unusable as error:
            refusals.append(str(error))
        else:
            assert pixels.shape[0] in (1, 3)
    assert refusals
    assert [refusal for refusal in refusals if "\n" in refusal or not 0 < len(refusal) < 250] == []
    assert capfd.readouterr() == ("", "")


def test_decoding_imports_no_torch() -> None:
    code = "import sys, vae_ray.data.decoding; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
