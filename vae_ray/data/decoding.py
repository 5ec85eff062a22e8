"""One image from its bytes, and arrays of images, to the pixels that a data set holds: uint8, 1 or 3 channels.

Used by every source, in any process: imports no torch. What files hold besides 8-bit grey and colour is converted so:

- 16 bits of grey are divided by 65535. Of 16 bits a channel in colour or with alpha, Pillow reads the upper byte only.
- Palettes, CMYK, YCbCr and LAB become RGB. Colour profiles and gamma are ignored.
- Of several frames or pages the first is read. EXIF orientation is applied.
- Any transparency (alpha, premultiplied alpha, a transparent colour) is composited on the background before resizing.
"""

from __future__ import annotations

import ctypes
import io
import logging
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import (
    ExifTags,
    Image,
    ImageFile,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401  registers itself, as TIFF does: Pillow would import all of its formats to find the two
    _imaging,
)

from vae_ray.errors import one_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 178_956_970
"""Larger images are taken for decompression bombs; where Pillow refuses them as well."""
ROUNDING = 1e-6
"""How far a float may lie outside of [0, 1], as (2x - 1 + 1) / 2 does."""
CHUNK_VALUES = 1 << 21
"""Values of an array that are converted at once: bounds the memory of floats."""

# Overshoots less at hard edges than LANCZOS and costs less; antialiased, as Pillow widens it where it reduces.
RESAMPLING = Image.Resampling.BICUBIC

ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_KEYS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
"""Where Pillow finds EXIF in the information about a picture that is not a TIFF, which it turns itself."""
SIDEWAYS = {ORIENTATIONS[number] for number in (5, 6, 7, 8)}
MIRRORED_X = {ORIENTATIONS[number] for number in (2, 3, 7, 8)}
MIRRORED_Y = {ORIENTATIONS[number] for number in (3, 4, 6, 7)}

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""
Floats = NDArray[np.floating[Any]]
Pixels = Image.Image | Floats
"""An image without transparency: of mode L or RGB, or floats `(1 or 3, H, W)` in 0..255 for more than 8 bits."""


@dataclass(frozen=True)
class ImageRules:
    """How images become pixels."""

    size: tuple[int, int] | None = None
    """(height, width); None: as they are."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """crop: scaled to cover the size, the centre is cut out. pad: scaled to fit, centred on the background."""
    channels: Literal["auto", 1, 3] = "auto"
    """auto: 1 where all channels are equal, else 3. 1: luminance (ITU-R 601). 3: grey is repeated."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Behind transparency, and around an image that `pad` fits."""
    value_range: tuple[float, float] | None = None
    """The values of black and white. None: 0 and the dtype's largest for integers, 0 and 1 for floats."""


class Unusable(Exception):
    """One line: why an image cannot be used. The caller adds its name."""


class _Depth(NamedTuple):
    """What a file says of its numbers, where Pillow's mode does not."""

    rawmode: str
    white: float
    """The largest value of an integer that is not of 8 bits."""
    is_inverted: bool = False
    """Whether 0 is white; Pillow inverts 8 bits and less only."""


def decode_image(content: bytes | Path | BinaryIO, rules: ImageRules) -> NDArray[np.uint8]:
    """The pixels of an image, `(C, H, W)` with C in (1, 3), from bytes, a file's path, or an open file that can seek.

    Raises `Unusable`, and nothing else, whatever the bytes are.
    """
    try:
        file = _open(content)
        try:
            with warnings.catch_warnings():
                # Pillow warns of harmless damage, and of sizes near its limit: errors under -W error.
                warnings.simplefilter("ignore")
                return _decode(file, rules)
        finally:
            if isinstance(content, Path):
                file.close()
    except Unusable:
        raise
    except Exception as error:  # parsers of damaged bytes raise whatever Python can raise
        raise Unusable(_reason(error)) from None


def convert_images(values: NDArray[Any], rules: ImageRules) -> list[NDArray[np.uint8]] | NDArray[np.uint8]:
    """Arrays of images as `decode_image` would give them: `(N, C, H, W)`, or a list where C differs between images.

    Takes bool, integers and floats: `(N, H, W)`, `(N, H, W, C)` and `(N, C, H, W)` with 1 to 4 channels (2: grey and
    alpha, 4: RGB and alpha; alpha is scaled by its dtype, never by `value_range`). Where both axes could be the
    channels, 1 or 3 channels are preferred to 2 or 4. What needs no conversion is returned as it is, not copied. Raises
    `Unusable` for all of the array if one image cannot be converted.
    """
    values = _channels_first(values)
    if values.dtype.kind not in "buif" or values.dtype.itemsize > 8:
        raise Unusable(f"has values of dtype {values.dtype}, should be bool, integers or floats of at most 64 bits")
    if not values.size:
        raise Unusable(f"has no pixels, shape {values.shape}")
    num_colours = values.shape[1] - (values.shape[1] in (2, 4))
    _check_values(values[:, :num_colours], rules, _white(values.dtype))
    if num_colours < values.shape[1]:
        _check_values(values[:, num_colours:], ImageRules(), _white(values.dtype))
    if rules.size is not None and values.shape[2:] != rules.size:
        images = [_with_channels(_fitted(_pixels_of_array(row, rules), rules), rules.channels) for row in values]
        return np.stack(images) if len({len(image) for image in images}) == 1 else images
    return _with_channels_each(_converted(values, rules), rules.channels)


def _open(content: bytes | Path | BinaryIO) -> BinaryIO:
    """An open file. Pillow gets no paths: it would map a file to memory, and one cut off meanwhile is a SIGBUS."""
    if isinstance(content, bytes):
        return io.BytesIO(content)
    if not isinstance(content, Path):
        return content
    if content.exists() and not content.is_file():
        raise Unusable("is a directory, a pipe or a device")
    return content.open("rb")


def _decode(file: BinaryIO, rules: ImageRules) -> NDArray[np.uint8]:
    _silence_parsers()
    file.seek(0)
    prefix = file.read(16)
    if not prefix:
        raise Unusable("is empty")
    try:
        opened = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        like = [name for name in FORMATS if (accept := Image.OPEN[name][1]) and accept(prefix)]
        kinds = f"is a {like[0]} image that is damaged or of a kind that Pillow does not read" if like else ""
        raise Unusable(kinds or f"is no image that can be read (none of {', '.join(FORMATS)})") from None
    with opened as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise Image.DecompressionBombError  # whatever others have set Pillow's limit to
        depth = _depth(picture)
        box = _reduce(picture, rules.size) if rules.size is not None else None
        picture.load()
        method = _transposition(picture)  # again: a PNG may have its EXIF behind the pixels
        upright = picture if method is None else picture.transpose(method)
        pixels = _pixels_of_file(upright, depth, rules)
    return _with_channels(_fitted(pixels, rules, box), rules.channels)


def _depth(picture: ImageFile.ImageFile) -> _Depth:
    """Asked before loading: Pillow forgets the raw mode."""
    args = picture.tile[0].args if picture.tile else None
    rawmode = str(args[0] if isinstance(args, tuple) and args else args)
    if not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return _Depth(rawmode, 65535)
    bits, is_signed = picture.tag_v2.get(258, (1,))[0], picture.tag_v2.get(339, (1,))[0] == 2
    return _Depth(rawmode, 2.0 ** (bits - is_signed) - 1, picture.tag_v2.get(262) == 0)


@cache
def _silence_parsers() -> None:
    """Keeps libtiff and Pillow from printing what is raised as well.

    libtiff writes to standard error past Python, Pillow logs, which is printed where nobody handles it.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with suppress(OSError, AttributeError):  # where Pillow's libtiff exports nothing, its messages are printed
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def _transposition(picture: Image.Image) -> Image.Transpose | None:
    """What EXIF says must be done to show the picture upright."""
    if EXIF_KEYS.isdisjoint(picture.info):  # Pillow looks longer
        return None
    try:
        return ORIENTATIONS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF beside intact pixels; its parser raises whatever Python can raise
        return None


def _reduce(picture: ImageFile.ImageFile, size: tuple[int, int]) -> Box | None:
    """Has a JPEG decoded at 1/2, 1/4 or 1/8 of its size where that leaves at least twice `size`, (height, width).

    Returns what part of the reduced and upright picture the whole one is: the last pixels may be cut.
    """
    if picture.format not in ("JPEG", "MPO") or min(picture.size) < 4 * min(size):
        return None
    method = _transposition(picture)
    height, width = size[::-1] if method in SIDEWAYS else size
    draft = picture.draft(None, (2 * width, 2 * height))
    if draft is None:
        return None
    whole_width, whole_height = draft[1][2:]
    left = picture.width - whole_width if method in MIRRORED_X else 0
    top = picture.height - whole_height if method in MIRRORED_Y else 0
    right, bottom = left + whole_width, top + whole_height
    return (top, left, bottom, right) if method in SIDEWAYS else (left, top, right, bottom)


def _pixels_of_file(picture: Image.Image, depth: _Depth, rules: ImageRules) -> Pixels:
    """A loaded picture without transparency."""
    transparent = picture.info.get("transparency")
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        if picture.mode == "I" and depth.rawmode == "I;32N":
            values = values.view(np.uint32)
        alpha = None if transparent is None else (values != transparent)[None].astype(np.float32)
        if depth.is_inverted and picture.mode != "F":
            values = int(depth.white) - values
        white = 1 if picture.mode == "F" else depth.white
        _check_values(values, rules, white)
        return _composited(_scaled(values[None], rules, white), alpha, rules.background)
    if isinstance(transparent, int) and depth.rawmode in ("L;2", "L;4"):  # Pillow scales the pixels, not this
        picture.info["transparency"] = transparent * (85 if depth.rawmode == "L;2" else 17)
    elif isinstance(transparent, tuple) and ";16" in depth.rawmode:
        picture.info["transparency"] = tuple(value >> 8 for value in transparent)
    if rules.value_range is None:
        return _opaque(picture, rules.background)
    if ";16" in depth.rawmode:
        raise Unusable(
            "has 16 bits a channel in colour, of which 8 are read: data.value_range cannot apply; try a .npy file"
        )
    mode = "RGBA" if picture.has_transparency_data else "L" if picture.mode in ("1", "L") else "RGB"
    return _pixels_of_array(np.moveaxis(np.atleast_3d(np.asarray(_converted_to(picture, mode))), 2, 0), rules)


def _pixels_of_array(values: NDArray[Any], rules: ImageRules) -> Pixels:
    """One image `(C, H, W)` of an array, as `_pixels_of_file` gives a file's."""
    if values.dtype == np.uint8 and rules.value_range is None:
        pixels = values[0] if len(values) == 1 else np.moveaxis(values, 0, 2)
        return _opaque(Image.fromarray(np.ascontiguousarray(pixels)), rules.background)
    return _float_pixels(values[None], rules)[0]


def _opaque(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A picture of at most 8 bits a channel as mode L or RGB, its transparency composited."""
    if picture.mode == "L" or picture.mode == "RGB":
        if "transparency" not in picture.info:
            return picture
    elif not picture.has_transparency_data:
        return picture.convert("L" if picture.mode == "1" else "RGB")
    picture = _converted_to(picture, "RGBA")
    canvas = Image.new("RGB", picture.size, background)
    canvas.paste(picture, mask=picture.getchannel("A"))
    return canvas


def _converted_to(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode in ("La", "RGBa"):  # Pillow converts these to nothing else
        picture = picture.convert(picture.mode.upper())
    return picture.convert(mode)


def _fitted(pixels: Pixels, rules: ImageRules, box: Box | None = None) -> NDArray[np.uint8]:
    """The pixels inside the box (None: all), brought to the size, as `(1 or 3, H, W)`."""
    size = (pixels.height, pixels.width) if isinstance(pixels, Image.Image) else pixels.shape[1:]
    if rules.size is not None and size != rules.size:
        box = box or (0, 0, size[1], size[0])
        if isinstance(pixels, Image.Image):
            pixels = _resized([pixels], rules.size, box, rules)[0]
        else:
            planes = [Image.fromarray(plane.astype(np.float32)) for plane in pixels]
            pixels = np.stack([np.asarray(plane) for plane in _resized(planes, rules.size, box, rules)])
    if not isinstance(pixels, Image.Image):
        return _quantized(pixels)
    # np.asarray(pixels) would add a tenth to the time of a small image
    flat = np.frombuffer(pixels.tobytes(), dtype=np.uint8)
    return np.ascontiguousarray(flat.reshape(pixels.height, pixels.width, -1).transpose(2, 0, 1))


def _resized(planes: list[Image.Image], size: tuple[int, int], box: Box, rules: ImageRules) -> list[Image.Image]:
    """One image of mode L or RGB, or the channels of one as modes F."""
    height, width = size
    if rules.fit == "pad":
        return _padded(planes, (width, height), box, rules.background)
    if rules.fit == "crop":
        box = _centre(box, (width, height))
    return [plane.resize((width, height), RESAMPLING, box) for plane in planes]


def _centre(box: Box, size: tuple[int, int]) -> Box:
    """The largest part of the box with the aspect of `size`, (width, height), in its centre."""
    left, top, right, bottom = box
    scale = min((right - left) / size[0], (bottom - top) / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = left + (right - left - width) / 2, top + (bottom - top - height) / 2
    if scale == 1:  # whole pixels: half a pixel aside, all would be blurred
        left, top = left // 1, top // 1
    return (left, top, min(left + width, right), min(top + height, bottom))


def _padded(
    planes: list[Image.Image], size: tuple[int, int], box: Box, background: tuple[int, int, int]
) -> list[Image.Image]:
    """Planes of `size`, (width, height), with all of the box in the centre."""
    scale = min(size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1]))
    inner = max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale))
    if inner != size and len(set(background)) > 1 and planes[0].mode != "RGB" and len(planes) == 1:
        planes = [planes[0].convert("RGB")] if planes[0].mode == "L" else planes * 3  # colour around grey
    corner = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    padded = []
    for level, plane in zip(background, planes, strict=False):
        padded.append(Image.new(plane.mode, size, background if plane.mode == "RGB" else level))
        padded[-1].paste(plane.resize(inner, RESAMPLING, box), corner)
    return padded


def _channels_first(values: NDArray[Any]) -> NDArray[Any]:
    """A view `(N, C, H, W)`."""
    if values.ndim == 3:
        return values[:, None]
    expected = "should be (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 to 4 channels"
    if values.ndim != 4:
        raise Unusable(f"has shape {values.shape}, {expected}")
    ends = values.shape[1], values.shape[3]
    for counts in ((1, 2, 3, 4), (1, 3)):
        is_first, is_last = (end in counts for end in ends)
        if is_first != is_last:
            return values if is_first else np.moveaxis(values, 3, 1)
        if not is_first:
            break
    if ends[0] in (1, 2, 3, 4) and ends[1] in (1, 2, 3, 4):
        raise Unusable(
            f"has shape {values.shape}, where the channels may come first or last: images so narrow are ambiguous"
        )
    raise Unusable(f"has shape {values.shape}, {expected}")


def _converted(values: NDArray[Any], rules: ImageRules) -> NDArray[np.uint8]:
    """`(N, 1 to 4, H, W)` as uint8 `(N, 1 or 3, H, W)`; the same array where nothing is to be done."""
    num, channels, height, width = values.shape
    if values.dtype == np.uint8 and rules.value_range is None and channels in (1, 3):
        return np.ascontiguousarray(values)
    rows = max(1, CHUNK_VALUES // (channels * height * width))
    chunks = (values[start : start + rows] for start in range(0, num, rows))
    return np.concatenate([_quantized(_float_pixels(chunk, rules)) for chunk in chunks])


def _float_pixels(values: NDArray[Any], rules: ImageRules) -> Floats:
    """`(N, 1 to 4, H, W)` as floats in 0..255, composited: `(N, 1 or 3, H, W)`."""
    white = _white(values.dtype)
    if values.shape[1] in (1, 3):
        return _scaled(values, rules, white)
    alpha = _scaled(values[:, -1:], ImageRules(), white) / 255
    return _composited(_scaled(values[:, :-1], rules, white), alpha, rules.background)


def _white(dtype: np.dtype[Any]) -> int:
    return 1 if dtype.kind in "bf" else int(np.iinfo(dtype).max)


def _scaled(values: NDArray[Any], rules: ImageRules, white: float) -> Floats:
    """Values as floats in 0..255; those outside of the range are clipped."""
    low, high = (0.0, float(white)) if rules.value_range is None else rules.value_range
    if values.dtype.kind == "f" or values.dtype.itemsize > 2:
        floats = values.astype(np.float64)
        floats -= low
        floats /= high - low
        return np.clip(np.multiply(floats, 255, out=floats), 0, 255, out=floats)
    unsigned = np.uint8 if values.dtype.itemsize == 1 else np.uint16
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    every_value = np.arange(np.iinfo(unsigned).max + 1, dtype=unsigned).view(native.dtype).astype(np.float64)
    table = np.clip((every_value - low) / (high - low) * 255, 0, 255).astype(np.float32)
    return table[native.view(unsigned)]


def _check_values(values: NDArray[Any], rules: ImageRules, white: float) -> None:
    """Raises `Unusable` for NaN and infinity and, where no range is given, for values that the dtype's rules out."""
    dtype, is_float = values.dtype, values.dtype.kind == "f"
    if dtype in (np.bool_, np.uint8, np.uint16) or (rules.value_range is not None and not is_float):
        return
    smallest, largest = float(values.min()), float(values.max())  # NaN if one value is
    if not np.isfinite([smallest, largest]).all():
        raise Unusable("has values that are NaN or infinite")
    if rules.value_range is not None:
        return
    received = f"has {dtype} values from {smallest:.10g} to {largest:.10g}"
    remedy = f"set data.value_range, as in data.value_range {smallest:.10g},{largest:.10g}"
    if is_float and (smallest < -ROUNDING or largest > 1 + ROUNDING):
        raise Unusable(f"{received}, outside of [0, 1]; {remedy}")
    if dtype.kind == "i" and smallest < 0:
        raise Unusable(f"{received}, some below 0; {remedy}")
    if white > 65535 and 0 < largest * 255 < white / 2:
        raise Unusable(f"{received}, all of which are black where white is {white:.10g}; {remedy}")


def _composited(pixels: Floats, alpha: Floats | None, background: tuple[int, int, int]) -> Floats:
    """Pixels `(..., 1 or 3, H, W)` in 0..255 over the background, by alpha `(..., 1, H, W)` in [0, 1]."""
    if alpha is None or alpha.min() == 1:
        return pixels
    behind = np.array(background, dtype=np.float64)[:, None, None]
    return behind + (pixels - behind) * alpha


def _quantized(pixels: Floats) -> NDArray[np.uint8]:
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def _with_channels(pixels: NDArray[np.uint8], channels: Literal["auto", 1, 3]) -> NDArray[np.uint8]:
    """Pixels `(..., 1 or 3, H, W)` with the channels asked for; auto: of one image, 1 if it is grey."""
    if channels == 3:
        return pixels if pixels.shape[-3] == 3 else np.repeat(pixels, 3, axis=-3)
    if pixels.shape[-3] == 1:
        return pixels
    if channels == 1:
        return _luminance(pixels)
    red, green, blue = (channel.tobytes() for channel in pixels)  # compared faster than arrays: most differ early
    return pixels[:1] if red == green == blue else pixels


def _with_channels_each(
    images: NDArray[np.uint8], channels: Literal["auto", 1, 3]
) -> list[NDArray[np.uint8]] | NDArray[np.uint8]:
    """`_with_channels` of each image of `(N, C, H, W)`."""
    if channels != "auto" or images.shape[1] == 1:
        return _with_channels(images, channels)
    is_grey = _is_grey(images)
    if is_grey.all():
        return np.ascontiguousarray(images[:, :1])
    return (
        [image[:1] if grey else image for image, grey in zip(images, is_grey, strict=True)] if is_grey.any() else images
    )


def _is_grey(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether the three channels are equal, for each image of `(..., 3, H, W)`."""
    red, green, blue = (pixels[..., channel, :, :] for channel in range(3))
    return ((red == green) & (green == blue)).all(axis=(-2, -1))


def _luminance(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """ITU-R 601, in the integers of Pillow's conversion to L: grey stays as it is."""
    weights = np.array([19595, 38470, 7471], dtype=np.uint32)[:, None, None]
    return ((pixels * weights).sum(axis=-3, keepdims=True, dtype=np.uint32) + 32768 >> 16).astype(np.uint8)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"has more than {MAX_PIXELS:,} pixels"
    if isinstance(error, MemoryError):
        return "does not fit in memory"
    message = getattr(error, "strerror", None) or one_line(error)[:120] or type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({message})"
    return f"is truncated: {message}" if "truncated" in message.lower() else f"is damaged: {message}"
