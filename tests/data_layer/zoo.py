"""One image file of every kind that a folder of a user may hold, with the pixels that it stands for."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HEIGHT, WIDTH = 16, 24
"""Multiples of 8, so that blocks of JPEG end where the halves of an image do."""

Colour = tuple[int, int, int]
WHITE = (255, 255, 255)


class File(NamedTuple):
    name: str
    content: bytes
    left: Colour
    right: Colour
    tolerance: int = 0
    """Of a decoded value: JPEG computes in YCbCr."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """`(3, H, W)`."""
        return np.moveaxis(halves(self.left, self.right), 2, 0)


class Zoo(NamedTuple):
    readable: dict[str, File]
    """By their paths below `train/`."""
    skipped: dict[str, str]
    """The reason's first words, by the paths below `train/`."""
    ignored: list[str]
    """What the description says of the files that are not images."""


def halves(left: Any, right: Any) -> NDArray[np.uint8]:
    """`(H, W, C)`: two colours side by side."""
    pixels = np.empty((HEIGHT, WIDTH, len(left)), np.uint8)
    pixels[:, : WIDTH // 2], pixels[:, WIDTH // 2 :] = left, right
    return pixels


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(colour: Colour, kind: str = "PNG", **options: Any) -> bytes:
    """A file of one colour."""
    return encoded(Image.new("RGB", (WIDTH, HEIGHT), colour), kind, **options)


def values(left: float, right: float, dtype: Any) -> Image.Image:
    array = np.empty((HEIGHT, WIDTH), dtype)
    array[:, : WIDTH // 2], array[:, WIDTH // 2 :] = left, right
    return Image.fromarray(array)


def grey(value: int) -> Colour:
    return (value, value, value)


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in 69 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def readable_files() -> list[File]:
    """Files of every mode and of every strange but harmless name."""
    palette = Image.new("P", (WIDTH, HEIGHT))
    palette.putpalette([10, 20, 30, 250, 0, 5])
    palette.paste(1, (WIDTH // 2, 0, WIDTH, HEIGHT))
    rotated = Image.fromarray(np.rot90(halves(grey(0), grey(255)), 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the right when shown
    frames = [Image.new("L", (WIDTH, HEIGHT), level) for level in (40, 200, 90)]
    premultiplied = Image.fromarray(halves((200, 100, 50, 0), (200, 100, 50, 255)), "RGBA")
    cmyk = Image.new("CMYK", (WIDTH, HEIGHT), (255, 0, 0, 0))
    return [
        File("16 bits.png", encoded(values(0x1234, 0xFEDC, np.uint16), "PNG"), grey(18), grey(254)),
        File("16 bits.tiff", encoded(values(0x8080, 257, np.uint16), "TIFF"), grey(128), grey(1)),
        File("float.tif", encoded(values(0.2, 1.0, np.float32), "TIFF"), grey(51), grey(255)),
        File("rgba.png", encoded(premultiplied, "PNG"), WHITE, (200, 100, 50)),
        File("la.png", encoded(Image.fromarray(halves((7, 0), (90, 255)), "LA"), "PNG"), WHITE, grey(90)),
        File("palette.png", encoded(palette, "PNG", transparency=0), WHITE, (250, 0, 5)),
        File("palette.gif", encoded(palette, "GIF"), (10, 20, 30), (250, 0, 5)),
        File(
            "one bit.png", encoded(values(0, 1, np.uint8).point(lambda v: v * 255).convert("1"), "PNG"), grey(0), WHITE
        ),
        File("cmyk.jpg", encoded(cmyk, "JPEG", quality=95), (0, 255, 255), (0, 255, 255), tolerance=2),
        File("rotated.jpg", encoded(rotated, "JPEG", quality=95, exif=exif), grey(0), grey(255), tolerance=2),
        File("animated.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), grey(40), grey(40)),
        File("lossless.webp", plain((3, 2, 1), "WEBP", lossless=True), (3, 2, 1), (3, 2, 1)),
        File("windows.bmp", plain((30, 20, 10), "BMP"), (30, 20, 10), (30, 20, 10)),
        File("a PNG.jpg", plain((1, 2, 3)), (1, 2, 3), (1, 2, 3)),
        File("UPPER.PNG", plain((4, 5, 6)), (4, 5, 6), (4, 5, 6)),
        File("two\nlines \x1b[31m.png", plain((7, 8, 9)), (7, 8, 9), (7, 8, 9)),
        File("größe 猫 🐈.png", plain((11, 12, 13)), (11, 12, 13), (11, 12, 13)),
        File(os.fsdecode(b"not \xff UTF-8.png"), plain((14, 15, 16)), (14, 15, 16), (14, 15, 16)),
        File("deeper/and deeper/x.png", plain((17, 18, 19)), (17, 18, 19), (17, 18, 19)),
    ]


def unusable_files() -> dict[str, tuple[bytes, str]]:
    """The content, and how the reason begins."""
    noise = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    whole, photo = encoded(Image.fromarray(noise), "PNG"), encoded(Image.fromarray(noise), "JPEG")
    return {
        "bad/truncated.png": (whole[: len(whole) // 2], "is truncated"),
        "bad/truncated.jpg": (photo[: len(photo) // 2], "is truncated"),
        "bad/header only.png": (whole[:20], "is "),
        "bad/empty.png": (b"", "is empty"),
        "bad/text.png": (b"just some words\n", "is no image that can be read"),
        "bad/zeros.jpg": (bytes(500), "is no image that can be read"),
        "bad/bomb.png": (bomb(), "has more than 178,956,970 pixels"),
        "bad/new\nline \x1b[2J.png": (b"x", "is no image that can be read"),
        os.fsdecode(b"bad/\xfe.png"): (b"", "is empty"),
    }


OTHERS = {
    **dict.fromkeys((".hidden.png", ".DS_Store", "train/._16 bits.png", "train/Thumbs.db", "desktop.ini"), b"x"),
    **dict.fromkeys(("train/.ipynb_checkpoints/a-checkpoint.png", "train/.ipynb_checkpoints/b.png"), plain((9, 9, 9))),
    **dict.fromkeys(("notes.txt", "train/rgba.txt", "train/labels.csv", "README"), b"words"),
}
IGNORED = ["6 hidden", "2 .txt", "1 .csv", "1 without a suffix"]


def write_files(root: Path) -> Zoo:
    """The zoo without what only a file system of this machine has; images of `test/` are two of one colour each."""
    readable, unusable = {file.name: file for file in readable_files()}, unusable_files()
    contents = {
        **{f"train/{file.name}": file.content for file in readable.values()},
        **{f"train/{name}": content for name, (content, _) in unusable.items()},
        "test/1.png": plain((100, 0, 0)),
        "test/2.png": plain((0, 100, 0)),
        **OTHERS,
    }
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Zoo(readable, {name: reason for name, (_, reason) in unusable.items()}, IGNORED)


def add_links_and_pipes(root: Path, outside: Path, zoo: Zoo) -> Zoo:
    """Add what archives and object stores do not have: links, also to `outside`, a pipe, and a file of 3 GiB."""
    train = root / "train"
    outside.mkdir()
    (outside / "there.png").write_bytes(plain((61, 62, 63)))
    (train / "link.png").symlink_to(outside / "there.png")
    (train / "link to a folder").symlink_to(outside)
    (train / "above").symlink_to(train)
    (train / "loop.png").symlink_to("loop.png")
    (train / "broken.png").symlink_to("nowhere")
    os.mkfifo(train / "0 pipe.png")
    with (train / "large.bmp").open("wb") as file:
        file.truncate(3 << 30)
    linked = [File(name, b"", (61, 62, 63), (61, 62, 63)) for name in ("link.png", "link to a folder/there.png")]
    skipped = {
        "loop.png": "cannot be read (Too many levels of symbolic links)",
        "broken.png": "is a broken link",
        "0 pipe.png": "is a pipe or a device",
        "large.bmp": "has 3,221,225,472 bytes, more than any image that is read",
    }
    return zoo._replace(readable=zoo.readable | {f.name: f for f in linked}, skipped=zoo.skipped | skipped)
