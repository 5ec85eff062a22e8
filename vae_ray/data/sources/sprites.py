"""Sprites: a generated, labelled set of white shapes on black, 64 x 64 pixels, for the study of latent factors.

The factors are those of dSprites (Matthey et al. 2017), https://github.com/deepmind/dsprites-dataset, in its order and
with its numbers of values. The shapes are drawn here and are not its pixels; the published file is read as well.

The published order sorts by shape, and sets larger than memory are shuffled in windows only. So the rows of both are in
a pseudo-random order, which is always the same.
"""

from __future__ import annotations

import contextlib
import functools
import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from vae_ray.data.decoding import ImageRules, convert_images
from vae_ray.data.rows import Part, Rows
from vae_ray.errors import UserError, one_line

SIDE = 64
FACTORS: dict[str, NDArray[np.float64]] = {
    "shape": np.arange(3.0),
    "scale": np.linspace(0.5, 1, 6),
    "orientation": np.linspace(0, 2 * math.pi, 40),
    "position_x": np.linspace(0, 1, 32),
    "position_y": np.linspace(0, 1, 32),
}
"""What the codes 0, 1, ... of each factor mean. Orientation is in radians, and its last value equals its first."""
SIZES = tuple(map(len, FACTORS.values()))
NUM_SPRITES = math.prod(SIZES)
"""737,280: every combination once."""
ALL = (1,) * len(SIZES)
"""The stride that leaves none out."""
SHAPES = ["square", "ellipse", "heart"]

DRAWING_VERSION = 1
"""Raised when the generated pixels or their order change."""
PUBLISHED_NAME = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"

STEPS = SIZES[-1] - 1
SPRITE_SIDE = SIDE - STEPS
"""33: what a shape may cover so that 32 positions, one pixel apart, never cut it off."""


class Sprites:
    """The generated sprites, or with `root` those of the published .npz (the file, or a directory that holds it).

    Of each factor every so many values are used as `stride` says, from code 0 on; the published file is then taken to
    be in its order. Images of `side` 32 are every other row and column: larger pixels, still 0 or 255.

    Columns are the codes of the factors, int64; the published colour, which has one value, is left out. The rows have
    no split. Of the published file its pickled member is never read; while it is read, 512 bytes an image are held
    (360 MiB in all).
    """

    def __init__(self, root: Path | None = None, *, side: int = SIDE, stride: tuple[int, ...] = ALL) -> None:
        self.names = {"shape": SHAPES}
        self.side, self.stride = side, stride
        self.file = None if root is None else _find_published(root)
        self.in_process = self.file is not None  # a copy of the pixels in each process would be too many
        self.num_rows = NUM_SPRITES if self.file is None else _num_published(self.file)
        self.num_images: int | None = len(_order(self.num_rows, stride))

    def describe(self) -> str:
        """What they are."""
        origin = "generated" if self.file is None else f"from {self.file}"
        return f"{self.num_images:,} sprites, {origin}, with the factors {', '.join(FACTORS)}"

    def fingerprint(self) -> str:
        """Of the generated sprites the version of the drawing, else the file's path, size and time."""
        drawing = f"sprites-{DRAWING_VERSION}"
        if self.side != SIDE or self.stride != ALL:
            drawing += f"-{self.side}-{','.join(map(str, self.stride))}"
        if self.file is None:
            return drawing
        stat = self.file.stat()
        return f"{drawing};{self.file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"

    def native_shape(self) -> tuple[int, int, int]:
        """One channel."""
        return 1, self.side, self.side

    def parts(self, num_rows: int) -> Iterator[Part]:
        """Ranges of rows."""
        num = self.num_images or 0
        for start in range(0, num, num_rows):
            stop = min(start + num_rows, num)
            yield Part(None, stop - start, (start, stop))

    def read(self, part: Part, rules: ImageRules) -> Rows:
        """Draws the rows, or unpacks them; raises `UserError` for a damaged file."""
        start, stop = part.payload
        rows = _order(self.num_rows, self.stride)[start:stop]
        if self.file is None:
            codes = np.stack(np.unravel_index(rows, SIZES), axis=1)
            pixels = draw(codes)
        else:
            packed, all_codes = self._published
            codes = all_codes[rows]
            pixels = np.unpackbits(packed[rows], axis=1).reshape(-1, SIDE, SIDE) * np.uint8(255)
        columns = {name: codes[:, number].astype(np.int64) for number, name in enumerate(FACTORS)}
        step = SIDE // self.side
        return Rows(list(convert_images(pixels[:, ::step, ::step], rules)), columns, [], Counter())

    @functools.cached_property
    def _published(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        assert self.file is not None
        return _read_published(self.file)


@functools.lru_cache(maxsize=1)
def _order(num: int, stride: tuple[int, ...] = ALL) -> NDArray[np.int64]:
    """A permutation of the published row numbers below `num` whose codes are multiples of `stride`.

    By the generator whose numbers NumPy never changes.
    """
    codes = np.ix_(*(np.arange(0, size, step) for size, step in zip(SIZES, stride, strict=True)))
    rows = np.ravel_multi_index(codes, SIZES).ravel()
    return np.random.RandomState(0).permutation(rows[rows < num])


# --- drawing


def draw(codes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Sprites `(n, 64, 64)`, 0 or 255, by their codes `(n, 5)` in the order of `FACTORS`.

    x grows to the right and y downwards; an orientation turns a shape clockwise.
    """
    shape, scale, orientation, x, y = codes.T
    number = np.ravel_multi_index((shape, scale, orientation), SIZES[:3])
    windows = np.lib.stride_tricks.sliding_window_view(_canvases(), (SIDE, SIDE), axis=(1, 2))
    return windows[number, STEPS - y, STEPS - x]


@functools.cache
def _canvases() -> NDArray[np.uint8]:
    """Each shape in each scale and orientation, `(720, 95, 95)`: every position is a window of 64 x 64 of it."""
    shape, scale, orientation = np.indices(SIZES[:3]).reshape(3, -1, 1, 1)
    # From a centre that is none of the pixels' axes of symmetry: else quarter turns coincide and small squares, 2.3
    # degrees apart modulo 90, often have equal pixels.
    right = np.arange(SPRITE_SIDE) - (SPRITE_SIDE - 1) / 2 - 0.2
    up = ((SPRITE_SIDE - 1) / 2 - 0.3 - np.arange(SPRITE_SIDE))[:, None]
    angle = FACTORS["orientation"][orientation % (SIZES[2] - 1)]  # the last is the first, exactly
    size = FACTORS["scale"][scale]
    u = (np.cos(angle) * right - np.sin(angle) * up) / size
    v = (np.sin(angle) * right + np.cos(angle) * up) / size
    is_inside = np.select([shape == 0, shape == 1], [_square(u, v), _ellipse(u, v)], _heart(u, v))
    canvases = np.zeros((len(is_inside), SIDE + STEPS, SIDE + STEPS), np.uint8)
    canvases[:, STEPS:SIDE, STEPS:SIDE] = is_inside * np.uint8(255)
    return canvases


# Each is true inside of the shape of scale 1; (u, v) are pixels from its centre, to the right and upwards. None reaches
# further than 16.2 pixels, so that a sprite holds it in every orientation.


def _square(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.maximum(abs(u), abs(v)) <= 11.4


def _ellipse(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (u / 16) ** 2 + (v / 8) ** 2 <= 1


def _heart(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(x^2 + y^2 - 1)^3 <= x^2 y^3, around the centre of its smallest enclosing circle."""
    x, y = u / 12.3, v / 12.3 + 0.24
    return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3


# --- the published file


def _find_published(root: Path) -> Path:
    file = root / PUBLISHED_NAME if root.is_dir() else root
    if not file.is_file():
        raise UserError(
            f"data.root: got {str(root)!r}, should be {PUBLISHED_NAME} or a directory with it; without data.root the "
            "sprites are generated"
        )
    return file


def _num_published(file: Path) -> int:
    with _errors_named(file), zipfile.ZipFile(file) as archive, archive.open("imgs.npy") as stream:
        return _num_images(stream, archive.getinfo("imgs.npy").file_size)


def _read_published(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels `(N, 512)`, eight a byte, and codes `(N, 5)`, in the order of the file.

    The pixels are inflated in one pass, as a deflated member cannot be read from its middle.
    """
    with _errors_named(file), zipfile.ZipFile(file) as archive:
        with archive.open("imgs.npy") as stream:
            packed = _packed(stream, _num_images(stream, archive.getinfo("imgs.npy").file_size))
        with archive.open("latents_classes.npy") as stream:
            codes = np.lib.format.read_array(stream, allow_pickle=False)
        if codes.dtype.kind not in "iu" or codes.shape != (len(packed), 1 + len(FACTORS)):
            raise ValueError(f"latents_classes is {codes.dtype} {codes.shape}, should be integers ({len(packed)}, 6)")
    return packed, codes[:, 1:].astype(np.int64)


def _num_images(stream: IO[bytes], num_bytes: int) -> int:
    """How many images a member holds, by its header; the stream is then at the first."""
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"imgs is of the .npy format {version[0]}.{version[1]}, should be 1.0 or 2.0")
    shape, is_fortran, dtype = read_header[version](stream)
    is_expected = dtype == np.uint8 and not is_fortran and shape[1:] == (SIDE, SIDE) and 0 < shape[0] <= NUM_SPRITES
    if not is_expected:
        raise ValueError(f"imgs is {dtype} {shape}, should be uint8 ({NUM_SPRITES}, {SIDE}, {SIDE})")
    if num_bytes - stream.tell() != math.prod(shape):
        raise ValueError(f"imgs has {num_bytes - stream.tell()} bytes for pixels of shape {shape}")
    return int(shape[0])


def _packed(stream: IO[bytes], num: int, *, chunk: int = 4096) -> NDArray[np.uint8]:
    packed = np.empty((num, SIDE * SIDE // 8), np.uint8)
    for start in range(0, num, chunk):
        rows = packed[start : start + chunk]
        content = stream.read(len(rows) * SIDE * SIDE)
        pixels = np.frombuffer(content, np.uint8).reshape(len(rows), SIDE * SIDE)
        if pixels.max() > 1:
            raise ValueError(f"imgs has the value {pixels.max()}, should be 0 and 1")
        rows[:] = np.packbits(pixels, axis=1)
    return packed


@contextlib.contextmanager
def _errors_named(file: Path) -> Iterator[None]:
    """Errors of damaged and of other files as one `UserError` with the file's name."""
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = one_line(error.args[0] if isinstance(error, KeyError) else error)[:160]
        raise UserError(f"{file}: is not the published {PUBLISHED_NAME}, or is damaged ({reason})") from None
