"""Sources of images: each finds its raw files, says what they are, and decodes them once to uint8.

The first stage of the data's way. A source is one entry of `SOURCES`; `arrow_store` calls it at most once per
node and data set. Labels are kept beside the images for those who look at latent spaces; training ignores them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vae_ray.config import DataConfig
from vae_ray.errors import UserError
from vae_ray.storage.locations import answered, child, is_uri
from vae_ray.storage.mirror import Mirror

logger = logging.getLogger(__name__)


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
        import sklearn

        return f"sklearn-{sklearn.__version__}"

    def decode(self, split: str) -> Images:
        from sklearn.datasets import load_digits

        digits = load_digits()
        is_test = np.arange(len(digits.target)) % 5 == 4
        chosen = is_test if split == "test" else ~is_test
        grey = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # levels 0..16
        return Images(grey[:, None], digits.target[chosen].astype(np.int64))


class TorchvisionMNIST:
    """MNIST and its drop-in replacements, read by torchvision from `root/NAME/raw/*-ubyte`."""

    def __init__(self, config: DataConfig, class_name: str, *, root: Path) -> None:
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

    def _dataset(self, *, train: bool, download: bool) -> object:
        import torchvision.datasets

        # torchvision prints its progress to stdout, which belongs to --json
        with contextlib.redirect_stdout(io.StringIO()):
            return getattr(torchvision.datasets, self.class_name)(str(self.root), train=train, download=download)

    def _fetch(self, uri: str, names: set[str]) -> None:
        """Copy the raw files from `uri` to this node; the copy it has serves while the URI does not answer."""
        raw = self.root / self.class_name / "raw"
        mirror = Mirror(raw, child(uri, self.class_name, "raw"), key="data.root")
        try:
            answered(mirror.listing)
            mirror.fetch(lambda name: name in names)
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
            if not all((raw / name).is_file() for name in names):
                raise UserError(f"data.root: got {uri!r}, which cannot be read ({reason})") from None
            logger.warning("data.root: %s cannot be read (%s); using this node's copy", uri, reason)

    def _download(self, missing: list[Path]) -> None:
        try:
            os.makedirs(self.root, exist_ok=True)
            self._dataset(train=True, download=True)
        except (OSError, RuntimeError) as error:  # torchvision: URLError is an OSError, all mirrors failed
            reason = " ".join(str(error).split())[:200]
            raise UserError(self._how_to_get(missing[0], f"and could not be downloaded ({reason})")) from None

    def _how_to_get(self, missing: Path, why: str) -> str:
        return (
            f"data.source {self.source}: file {missing} is missing {why}; "
            f"try --data.root DIR where DIR/{self.class_name}/raw holds the files, or the preset digits"
        )

    def decode(self, split: str) -> Images:
        for file in self._raw_files(split):
            check_idx_file(file)
        dataset = self._dataset(train=split == "train", download=False)
        pixels = np.ascontiguousarray(dataset.data.numpy()[:, None])  # type: ignore[attr-defined]
        labels = dataset.targets.numpy().astype(np.int64)  # type: ignore[attr-defined]
        if len(pixels) != len(labels):
            raise UserError(
                f"{self._raw_files(split)[1]}: expected {len(pixels)} labels, one per image, found {len(labels)}"
            )
        return Images(pixels, labels)


def check_idx_file(file: Path) -> None:
    """Raise `UserError`, with expected and found, unless `file` is a whole IDX file of unsigned bytes.

    The format: two zero bytes, the type (8 = uint8), the number of dimensions, each dimension as a
    big-endian int32, then the values (http://yann.lecun.com/exdb/mnist, "the IDX file format").
    """
    found = file.stat().st_size
    with file.open("rb") as stream:
        magic = stream.read(4)
        num_dimensions = 3 if "idx3" in file.name else 1
        expected_magic = bytes([0, 0, 8, num_dimensions])
        if magic != expected_magic:
            raise UserError(
                f"{file}: damaged, expected it to begin with {expected_magic.hex()}, found {magic.hex() or 'nothing'}; "
                "replace the file"
            )
        header = stream.read(4 * num_dimensions)
    if len(header) == 4 * num_dimensions:
        shape = struct.unpack(f">{num_dimensions}I", header)
        expected = 4 + len(header) + int(np.prod(shape, dtype=object))
        if found == expected:
            return
        detail = f"expected {expected} bytes for shape {shape}, found {found}"
    else:
        detail = f"expected a header of {4 + 4 * num_dimensions} bytes, found {found}"
    raise UserError(f"{file}: truncated or damaged, {detail}; replace the file")


SOURCES: dict[str, Callable[[DataConfig, Path], Source]] = {
    # each is given the configuration and the directory for raw files
    "digits": lambda config, root: Digits(),
    "mnist": lambda config, root: TorchvisionMNIST(config, "MNIST", root=root),
    "fashion_mnist": lambda config, root: TorchvisionMNIST(config, "FashionMNIST", root=root),
    "kmnist": lambda config, root: TorchvisionMNIST(config, "KMNIST", root=root),
}
