"""Sixty labelled colour pictures, synthetic and real, and what a source makes of the files that hold them."""

from __future__ import annotations

import io
import pickle
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.conftest import MNIST_ROOT
from vae_ray.data.decoding import ImageRules, decode_image

CIFAR10 = MNIST_ROOT / "cifar10-jpeg" / "train"
COLOUR = ImageRules(channels=3)


class Pictures(NamedTuple):
    pixels: NDArray[np.uint8]
    """`(60, C, H, W)`."""
    files: list[bytes]
    """The same, encoded."""
    label: NDArray[np.int64]
    camera: list[str]
    angle: NDArray[np.float64]

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """As a source gives them."""
        codes = np.array([CAMERAS.index(name) for name in self.camera])
        return {"label": self.label, "camera": codes, "angle": self.angle}


CAMERAS = ["left", "right", "über"]


def _with_columns(pixels: NDArray[np.uint8], files: list[bytes]) -> Pictures:
    generator = np.random.default_rng(7)
    camera = [CAMERAS[index] for index in generator.permutation(np.arange(60) % 3)]
    return Pictures(pixels, files, generator.permutation(np.arange(60) % 4), camera, generator.normal(size=60))


def synthetic() -> Pictures:
    """60 x 3 x 5 x 8 of noise, as PNG."""
    pixels = np.random.default_rng(1).integers(0, 256, (60, 3, 5, 8), dtype=np.uint8)
    return _with_columns(pixels, [png(image) for image in pixels])


def cifar10() -> Pictures:
    """The first 60 JPEGs of CIFAR-10; skips the test where they are absent."""
    paths = sorted(CIFAR10.glob("*/*.jpg"))[:60]
    if len(paths) < 60:
        pytest.skip("needs ../shared/data/cifar10-jpeg, which is absent")
    files = [path.read_bytes() for path in paths]
    return _with_columns(np.stack([decode_image(content, COLOUR) for content in files]), files)


ALL = {"synthetic": synthetic, "cifar10": cifar10}


def png(image: NDArray[np.uint8]) -> bytes:
    """`(C, H, W)` as a file."""
    stream = io.BytesIO()
    pixels = image[0] if len(image) == 1 else np.ascontiguousarray(np.moveaxis(image, 0, 2))
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


class Read(NamedTuple):
    """All rows of a source, of one split."""

    images: list[NDArray[np.uint8]]
    columns: dict[str, NDArray[Any]]
    skipped: list[tuple[str, str]]


def read_all(source: Any, *, num_rows: int = 1000, rules: ImageRules = COLOUR) -> dict[str | None, Read]:
    """The rows by split, each part read by a copy of the source that was pickled, as another process reads it."""
    found: dict[str | None, list[Any]] = {}
    for part in source.parts(num_rows):
        assert 0 < part.num <= num_rows
        copy, part = pickle.loads(pickle.dumps((source, part)))
        rows = copy.read(part, rules)
        assert {len(values) for values in rows.columns.values()} <= {len(rows.images)}
        assert len(rows.images) + len(rows.skipped) == part.num
        found.setdefault(part.split, []).append(rows)
    return {split: _joined(list(blocks)) for split, blocks in found.items()}


def _joined(blocks: list[Any]) -> Read:
    names = list(blocks[0].columns)
    assert all(list(block.columns) == names for block in blocks)
    columns = {name: np.concatenate([block.columns[name] for block in blocks]) for name in names}
    assert {values.dtype for values in columns.values()} <= {np.dtype(np.int64), np.dtype(np.float64)}
    skipped = [tuple(each) for block in blocks for each in block.skipped]
    return Read([image for block in blocks for image in block.images], columns, skipped)


def assert_holds(source: Any, pictures: Pictures, *, num_rows: int) -> None:
    """All pictures without a split, in order, with all of their columns."""
    assert source.num_images == 60
    (split, read), *others = read_all(source, num_rows=num_rows).items()
    assert split is None
    assert others == []
    assert read.skipped == []
    np.testing.assert_array_equal(np.stack(read.images), pictures.pixels)
    assert read.columns.keys() == pictures.columns.keys()
    for name, values in pictures.columns.items():
        np.testing.assert_array_equal(read.columns[name], values)
    assert source.names["camera"] == CAMERAS
    assert source.native_shape() == pictures.pixels.shape[1:]
