"""MNIST and its drop-in replacements, in the IDX files in which they were published."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vae_ray.config.sections.data import PublishedData
from vae_ray.data.sources.decoded import Decoded, DecodedSource
from vae_ray.data.sources.published import stamps, warn_unless_published
from vae_ray.errors import UserError, one_line
from vae_ray.storage.filesystems import with_timeout
from vae_ray.storage.locations import is_uri, join_location
from vae_ray.storage.mirror import Mirror
from vae_ray.storage.remote import RemoteDirectory

logger = logging.getLogger(__name__)

CLASS_NAMES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
"""torchvision's."""
PUBLISHED = {
    "MNIST/train-images-idx3-ubyte": (
        47_040_016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "MNIST/train-labels-idx1-ubyte": (60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "MNIST/t10k-images-idx3-ubyte": (7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "MNIST/t10k-labels-idx1-ubyte": (10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}
"""Bytes and SHA-256 of raw files as their authors published them. Other files under these names are read too."""


class Mnist(DecodedSource):
    """MNIST and its drop-in replacements in `root/NAME/raw/*-ubyte`, torchvision's layout; it downloads them too."""

    def __init__(self, config: PublishedData, *, root: Path) -> None:
        self.source, self.class_name = config.source, CLASS_NAMES[config.source]
        self.root, self.download = root, config.download
        self.uri = config.root if config.root is not None and is_uri(config.root) else None

    def describe(self) -> str:
        return self.source

    def _raw_files(self, split: str) -> tuple[Path, Path]:
        prefix = {"train": "train", "test": "t10k"}[split]
        raw = self.root / self.class_name / "raw"
        return raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte"

    def fingerprint(self) -> str:
        files = [*self._raw_files("train"), *self._raw_files("test")]
        if self.uri is not None:
            self._fetch(self.uri, {file.name for file in files})
        missing = [file for file in files if not file.is_file()]
        if missing and self.uri is not None:
            raise UserError(f"data.root: got {self.uri!r}, which lacks {self.class_name}/raw/{missing[0].name}")
        if missing and self.download:
            self._download(missing)
        elif missing:
            raise UserError(self._how_to_get(missing[0], "and data.download is false"))
        return stamps(files)

    def _fetch(self, uri: str, names: set[str]) -> None:
        """Copy the raw files from `uri` to this node; the copy it has serves while the URI does not answer."""
        raw = self.root / self.class_name / "raw"
        mirror = Mirror(raw, RemoteDirectory(join_location(uri, self.class_name, "raw"), key="data.root"))
        try:
            with_timeout(mirror.remote.list)
            mirror.pull(names.__contains__)
        except OSError as error:
            reason = one_line(error)[:200]
            if not all((raw / name).is_file() for name in names):
                raise UserError(f"data.root: got {uri!r}, which cannot be read ({reason})") from None
            logger.warning("data.root: %s cannot be read (%s); using this node's copy", uri, reason)

    def _download(self, missing: list[Path]) -> None:
        import torchvision.datasets

        try:
            os.makedirs(self.root, exist_ok=True)
            # torchvision prints its progress to stdout, which belongs to --json
            with contextlib.redirect_stdout(io.StringIO()):
                getattr(torchvision.datasets, self.class_name)(str(self.root), download=True)
        except (OSError, RuntimeError) as error:  # torchvision: URLError is an OSError, all mirrors failed
            reason = one_line(error)[:200]
            raise UserError(self._how_to_get(missing[0], f"and could not be downloaded ({reason})")) from None

    def _how_to_get(self, missing: Path, why: str) -> str:
        return (
            f"data.source {self.source}: file {missing} is missing {why}; "
            f"try --data.root DIR where DIR/{self.class_name}/raw holds the files; the preset digits needs none"
        )

    def load(self, split: str) -> Decoded:
        # Not by torchvision, which prefers a pickle in ROOT/NAME/processed, should there be one, to the raw files.
        pixels, labels = (read_idx_file(file) for file in self._raw_files(split))
        if len(pixels) != len(labels):
            raise UserError(
                f"{self._raw_files(split)[1]}: expected {len(pixels)} labels, one per image, found {len(labels)}"
            )
        if not pixels.size:
            raise UserError(f"{self._raw_files(split)[0]}: holds no pixels, its shape is {pixels.shape}")
        for file in self._raw_files(split):
            size, sha256 = PUBLISHED.get(f"{self.class_name}/{file.name}", (-1, ""))
            if file.stat().st_size == size:
                warn_unless_published(file, sha256)
        return pixels[:, None], {"label": labels.astype(np.int64)}


IDX_TYPES = {0x08: "uint8", 0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
GZIP = b"\x1f\x8b"


def read_idx_file(file: Path) -> NDArray[np.uint8]:
    """The array in an IDX file of unsigned bytes; raises `UserError`, with expected and found, unless it is whole.

    The format: two zero bytes, the type (8 = uint8), the number of dimensions, each dimension as a
    big-endian int32, then the values (http://yann.lecun.com/exdb/mnist, "the IDX file format").
    """
    num_dimensions, axes = (3, "(N, H, W)") if "idx3" in file.name else (1, "(N,)")
    with file.open("rb") as stream:
        num_bytes = os.fstat(stream.fileno()).st_size
        magic = stream.read(4)
        if magic.startswith(GZIP):
            raise UserError(f"{file}: is compressed; unpack it with gunzip")
        if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_TYPES:
            raise UserError(
                f"{file}: damaged, expected it to begin with 000008{num_dimensions:02x}, found "
                f"{magic.hex() or 'nothing'}; replace the file"
            )
        dtype, header = np.dtype(IDX_TYPES[magic[2]]), stream.read(4 * magic[3])
        if len(header) == 4 * magic[3]:
            shape = struct.unpack(f">{magic[3]}I", header)
            expected = 4 + len(header) + math.prod(shape) * dtype.itemsize
            detail = f"expected {expected} bytes for {dtype} of shape {shape}, found {num_bytes}"
        else:
            expected, detail = -1, f"expected a header of {4 + 4 * magic[3]} bytes, found {num_bytes}"
        if num_bytes != expected:
            raise UserError(f"{file}: truncated or damaged, {detail}; replace the file")
        if dtype != np.uint8 or len(shape) != num_dimensions:
            raise UserError(
                f"{file}: holds {dtype} of shape {shape}, should be unsigned bytes {axes}; convert it, or read it by a "
                "--data.source MODULE:NAME of your own"
            )
        # only now is anything allocated for what the header says
        return np.frombuffer(stream.read(math.prod(shape)), dtype=np.uint8).reshape(shape)
