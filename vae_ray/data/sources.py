"""Sources of images: each finds its raw files, says what they are, and decodes them once to uint8.

The first stage of the data flow. A source is one entry of `SOURCES`; `arrow_store` calls it at most once per node and
data set. Labels are kept for latent-space analysis; training ignores them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import os
import struct
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vae_ray.config import user_code
from vae_ray.config.sections import DataConfig, MnistData, UserData
from vae_ray.data.images import as_tensor
from vae_ray.errors import UserError, one_line
from vae_ray.storage.filesystems import with_timeout
from vae_ray.storage.locations import is_uri, join_location
from vae_ray.storage.mirror import Mirror
from vae_ray.storage.remote import RemoteDirectory

logger = logging.getLogger(__name__)

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


class Images(NamedTuple):
    """Decoded images of one split."""

    pixels: NDArray[np.uint8]
    """`(N, C, H, W)`, 0 to 255."""
    labels: NDArray[np.int64]
    """`(N,)`."""


class Source(Protocol):
    """Where images come from."""

    def fingerprint(self) -> str:
        """A string that changes when the raw data does; makes them present (downloads) or raises `UserError`."""
        ...

    def decode(self, split: str) -> Images:
        """All images of "train" or "test"; raises `UserError` for a damaged file."""
        ...


class Digits:
    """The 1,797 handwritten digits of 8x8 pixels inside scikit-learn (UCI Optical Recognition, test part).

    They come without a split: every fifth image is test (359), the others are train (1,438).
    """

    def fingerprint(self) -> str:
        return f"sklearn-{version('scikit-learn')}"  # without its import, which takes a second and a half

    def decode(self, split: str) -> Images:
        from sklearn.datasets import load_digits

        digits = load_digits()
        is_test = np.arange(len(digits.target)) % 5 == 4
        is_wanted = is_test if split == "test" else ~is_test
        grey = np.rint(digits.images[is_wanted] * (255 / 16)).astype(np.uint8)  # levels 0..16
        return Images(grey[:, None], digits.target[is_wanted].astype(np.int64))


class TorchvisionMNIST:
    """MNIST and its drop-in replacements in `root/NAME/raw/*-ubyte`, torchvision's layout; it downloads them too."""

    def __init__(self, config: MnistData, class_name: str, *, root: Path) -> None:
        self.source, self.class_name = config.source, class_name
        self.root, self.download = root, config.download
        self.uri = config.root if config.root is not None and is_uri(config.root) else None

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
        stats = [file.stat() for file in files]
        return ";".join(f"{file.resolve()}:{s.st_size}:{s.st_mtime_ns}" for file, s in zip(files, stats, strict=True))

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

    def decode(self, split: str) -> Images:
        # Not by torchvision, which prefers a pickle in ROOT/NAME/processed, should there be one, to the raw files.
        pixels, labels = (read_idx_file(file) for file in self._raw_files(split))
        if len(pixels) != len(labels):
            raise UserError(
                f"{self._raw_files(split)[1]}: expected {len(pixels)} labels, one per image, found {len(labels)}"
            )
        if not pixels.size:
            raise UserError(f"{self._raw_files(split)[0]}: holds no pixels, its shape is {pixels.shape}")
        self._compare_with_published(split)
        return Images(pixels[:, None], labels.astype(np.int64))

    def _compare_with_published(self, split: str) -> None:
        """Warn of a file that has the published one's name and size, but not its content."""
        for file in self._raw_files(split):
            size, published = PUBLISHED.get(f"{self.class_name}/{file.name}", (-1, ""))
            if file.stat().st_size == size:
                with file.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                if digest != published:
                    logger.warning("%s: is not the published file (sha256 %s, not %s)", file, digest, published)


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


class UserSource:
    """A user's own function: it returns a `Source`, or the images themselves as `{"train": pixels, "test": pixels}`.

    Pixels are uint8 arrays or tensors `(N, C, H, W)`. They are decoded again when the function's file or its settings
    change; a `Source` of its own says by its fingerprint when the raw data do.
    """

    def __init__(self, config: UserData) -> None:
        self.path = config.source
        function = user_code.load(config.source, key="data.source")
        self.made = user_code.call(config.source, config.settings, key="data.source")
        self.version = f"{config.source};{sorted(config.settings.items())};{user_code.digest(function)}"

    def fingerprint(self) -> str:
        with user_code.errors_named(self.path, key="data.source"):
            own = self.made.fingerprint() if hasattr(self.made, "fingerprint") else ""
        return f"{self.version};{own}"

    def decode(self, split: str) -> Images:
        if hasattr(self.made, "decode"):
            with user_code.errors_named(self.path, key="data.source"):
                pixels, labels = self.made.decode(split)
        else:
            pixels, labels = self._given(split), None
        pixels = as_tensor(pixels, key=f"data.source: {self.path}")
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or not pixels.numel():
            dtype = str(pixels.dtype).removeprefix("torch.")
            raise UserError(
                f"data.source: {self.path} gave {dtype} of shape {tuple(pixels.shape)} for {split!r}, should be uint8 "
                "of shape (N, C, H, W) with at least one image"
            )
        _, channels, height, width = pixels.shape
        if split == "train" and channels > 4 and width in (1, 3, 4):
            logger.warning(
                "data.source: %s: images of shape %s are read as %d channels of %dx%d pixels; should be (channels, "
                "height, width)",
                *(self.path, tuple(pixels.shape[1:]), channels, height, width),
            )
        if labels is None:
            labels = torch.zeros(len(pixels))
        labels = as_tensor(labels, key=f"data.source: labels of {self.path}")
        if labels.shape != pixels.shape[:1] or not torch.equal(labels, labels.long().to(labels)):
            raise UserError(
                f"data.source: {self.path} gave labels of shape {tuple(labels.shape)} for {len(pixels)} images of "
                f"{split!r}, should be one whole number an image, or None"
            )
        return Images(pixels.contiguous().cpu().numpy(), labels.long().cpu().numpy())

    def _given(self, split: str) -> Any:
        try:
            return self.made[split]
        except (TypeError, KeyError, IndexError):
            raise UserError(
                f"data.source: {self.path} returned a {type(self.made).__name__}, should return a source or a dict "
                "with the keys 'train' and 'test'"
            ) from None


SOURCES: dict[str, Callable[[Any, Path], Source]] = {
    # each is given the settings of its entry and the directory for raw files
    "digits": lambda config, root: Digits(),
    "mnist": lambda config, root: TorchvisionMNIST(config, "MNIST", root=root),
    "fashion_mnist": lambda config, root: TorchvisionMNIST(config, "FashionMNIST", root=root),
    "kmnist": lambda config, root: TorchvisionMNIST(config, "KMNIST", root=root),
}


def build_source(config: DataConfig | UserData, root: Path) -> Source:
    """The source of an experiment's section `data`, with the directory for raw files."""
    return UserSource(config) if isinstance(config, UserData) else SOURCES[config.source](config, root)  # type: ignore[attr-defined]
