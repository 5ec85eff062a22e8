"""CIFAR-10 and SVHN from the files that their authors published, downloaded where that is allowed.

A file of another size than the published one is refused; one of the same size and other content is read with a warning.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import logging
import os
import tarfile
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vae_ray.data.decoding import ImageRules, convert_images
from vae_ray.data.rows import Part, Rows
from vae_ray.errors import UserError, one_line

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 60
"""For the connection, and for each piece of a download."""


class PublishedFile(NamedTuple):
    """A file as its authors published it."""

    url: str
    num_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


# Sizes and SHA-256 as in TensorFlow Datasets, tensorflow_datasets/url_checksums/{cifar10,svhn_cropped}.txt (commit
# 333639b37af6c6fedf3610a4a2d42f1c6ef6f7d5 of tensorflow/datasets).
CIFAR10 = PublishedFile(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    170_052_171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
)
SVHN = {
    "train": PublishedFile(
        "http://ufldl.stanford.edu/housenumbers/train_32x32.mat",
        182_040_794,
        "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
    ),
    "test": PublishedFile(
        "http://ufldl.stanford.edu/housenumbers/test_32x32.mat",
        64_275_384,
        "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    ),
}
SHAPE = (3, 32, 32)


def ensure_present(files: Sequence[Path], published: Sequence[PublishedFile], *, source: str, download: bool) -> None:
    """Download what is missing, if `download`; raises `UserError` for a file that stays missing or has another size."""
    for file, expected in zip(files, published, strict=True):
        if not file.exists():
            where = f"try --data.root DIR where DIR holds {expected.name} from {expected.url}"
            if not download:
                raise UserError(f"data.source {source}: file {file} is missing and data.download is false; {where}")
            try:
                download_file(file, expected)
            except (OSError, ValueError) as error:  # ValueError: a reply that is no HTTP
                reason = one_line(error)[:200]
                raise UserError(
                    f"data.source {source}: file {file} is missing and could not be downloaded ({reason}); {where}"
                ) from None
        check_size(file, expected)


def download_file(file: Path, published: PublishedFile) -> None:
    """Download to `file`, which then has the published content; raises `OSError`, and leaves nothing."""
    logger.info("downloading %s (%d MB) to %s", published.url, published.num_bytes // 1_000_000, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".partial-{os.getpid()}-{file.name}")
    digest, num_bytes = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(published.url, timeout=TIMEOUT_SECONDS) as reply, partial.open("wb") as stream:
            while num_bytes <= published.num_bytes and (content := reply.read(1 << 20)):
                num_bytes += len(content)
                digest.update(content)
                stream.write(content)
        if (num_bytes, digest.hexdigest()) != published[1:]:
            raise OSError(
                f"{published.url} gave {num_bytes} bytes with sha256 {digest.hexdigest()}, the published file has "
                f"{published.num_bytes} with {published.sha256}"
            )
        os.replace(partial, file)
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise
    finally:
        partial.unlink(missing_ok=True)


def check_size(file: Path, published: PublishedFile) -> None:
    """Raise `UserError` for a file of another size than the published one."""
    num_bytes = file.stat().st_size
    if num_bytes != published.num_bytes:
        raise UserError(
            f"{file}: truncated, or not the published file: expected {published.num_bytes} bytes, found {num_bytes}; "
            f"remove it, or replace it by {published.url}"
        )


def warn_unless_published(file: Path, sha256: str) -> None:
    """Warn of a file that has the published one's name and size, but not its content."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != sha256:
        logger.warning("%s: is not the published file (sha256 %s, not %s)", file, digest, sha256)


def stamps(files: Sequence[Path]) -> str:
    """A string that changes when one of the files does, without reading them."""
    stats = [file.stat() for file in files]
    return ";".join(f"{file.resolve()}:{s.st_size}:{s.st_mtime_ns}" for file, s in zip(files, stats, strict=True))


def _parts(sizes: dict[str, int], num_rows: int) -> Iterator[Part]:
    """Ranges of rows of each split, as (first, after the last) in the split."""
    for split, num in sizes.items():
        for start in range(0, num, num_rows):
            stop = min(start + num_rows, num)
            yield Part(split, stop - start, (start, stop))


def _rows(pixels: NDArray[np.uint8], labels: NDArray[np.integer[Any]], rules: ImageRules) -> Rows:
    return Rows(list(convert_images(pixels, rules)), {"label": labels.astype(np.int64)}, [], Counter())


class Cifar10:
    """CIFAR-10 (Krizhevsky 2009): 50,000 training and 10,000 test images of 3 x 32 x 32, in 10 classes.

    Read from the binary version only, https://www.cs.toronto.edu/~kriz/cifar.html: the archive in `root`, without
    extracting it, else the extracted `root/cifar-10-batches-bin`. The Python version is pickles. All of it is held
    while it is read, 184 MB.
    """

    in_process = True
    num_images: int | None = 60_000
    names = {  # noqa: RUF012  never changed
        "label": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    }
    directory = "cifar-10-batches-bin"
    batches = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
    rows_per_batch = 10_000
    row_bytes = 1 + 3 * 32 * 32

    def __init__(self, root: Path, download: bool) -> None:
        self.root, self.download = root, download

    def describe(self) -> str:
        """What it is."""
        return f"CIFAR-10 ({self.num_images:,} images in 10 classes) in {self.root}"

    def fingerprint(self) -> str:
        """The files' paths, sizes and times; downloads the archive if neither form is there."""
        return stamps(self._files())

    def native_shape(self) -> tuple[int, int, int]:
        """In colour."""
        return SHAPE

    def parts(self, num_rows: int) -> Iterator[Part]:
        """Ranges of rows of train, then of test."""
        return _parts({"train": 5 * self.rows_per_batch, "test": self.rows_per_batch}, num_rows)

    def read(self, part: Part, rules: ImageRules) -> Rows:
        """Rows of the batches in order; raises `UserError` for damaged files."""
        start, stop = part.payload
        first = 5 * self.rows_per_batch if part.split == "test" else 0
        rows = self._content[first + start : first + stop]
        return _rows(rows[:, 1:].reshape(-1, *SHAPE), rows[:, 0], rules)

    def _files(self) -> list[Path]:
        """The archive, or the extracted files; each is present and of the published size."""
        archive = self.root / CIFAR10.name
        extracted = [self.root / self.directory / name for name in self.batches]
        if archive.exists() or not extracted[0].parent.is_dir():
            self._refuse_pickles(archive)
            ensure_present([archive], [CIFAR10], source="cifar10", download=self.download)
            return [archive]
        for file in extracted:
            if not file.is_file():
                raise UserError(f"data.source cifar10: file {file} is missing; extract {CIFAR10.url} again")
            self._check_batch_size(str(file), file.stat().st_size)
        return extracted

    def _refuse_pickles(self, archive: Path) -> None:
        """Raise `UserError` if only the Python version is there and the other may not be downloaded."""
        found = [name for name in ("cifar-10-batches-py", "cifar-10-python.tar.gz") if (self.root / name).exists()]
        if found and not archive.exists() and not self.download:
            raise UserError(
                f"data.source cifar10: {self.root / found[0]} is the Python version: pickles, which can run code and "
                f"are not read; put {CIFAR10.url} into {self.root}, or set data.download"
            )

    def _check_batch_size(self, name: str, num_bytes: int) -> None:
        expected = self.rows_per_batch * self.row_bytes
        if num_bytes != expected:
            raise UserError(f"{name}: truncated or damaged, expected {expected} bytes, found {num_bytes}; replace it")

    @functools.cached_property
    def _content(self) -> NDArray[np.uint8]:
        """`(60000, 3073)`: label, red, green, blue; the test images last."""
        files = self._files()
        content = np.empty((len(self.batches), self.rows_per_batch, self.row_bytes), np.uint8)
        if len(files) == 1:
            warn_unless_published(files[0], CIFAR10.sha256)
            self._read_archive(files[0], content)
        else:
            for file, batch in zip(files, content, strict=True):
                batch[:] = np.fromfile(file, np.uint8).reshape(batch.shape)
        for name, batch in zip(self.batches, content, strict=True):
            if batch[:, 0].max() > 9:
                raise UserError(f"{files[0].parent}: {name} has the label {batch[:, 0].max()}, should be 0 to 9")
        return content.reshape(-1, self.row_bytes)

    def _read_archive(self, file: Path, content: NDArray[np.uint8]) -> None:
        missing = {f"{self.directory}/{name}": batch for name, batch in zip(self.batches, content, strict=True)}
        try:
            with gzip.open(file) as inflated, tarfile.open(fileobj=inflated, mode="r:") as archive:
                for member in archive:  # in the order of the archive: it is inflated once
                    if member.isreg() and (batch := missing.pop(member.name, None)) is not None:
                        self._check_batch_size(f"{file}: {member.name}", member.size)
                        stream = archive.extractfile(member)
                        assert stream is not None
                        batch[:] = np.frombuffer(stream.read(), np.uint8).reshape(batch.shape)
                while inflated.read(1 << 20):  # to the end, where the checksum is
                    pass
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"{file}: damaged ({one_line(error)[:160]}); replace it by {CIFAR10.url}") from None
        if missing:
            raise UserError(f"{file}: has no {next(iter(missing))}; replace it by {CIFAR10.url}")


class Svhn:
    """The Street View House Numbers (Netzer et al. 2011), cropped: 73,257 training, 26,032 test images, 3 x 32 x 32.

    Read from `root/train_32x32.mat` and `test_32x32.mat`. In them the digit 0 has the label 10; here it is 0. One split
    is held while it is read, 225 MB.
    """

    in_process = True
    num_images: int | None = 99_289
    names = {"label": [str(digit) for digit in range(10)]}  # noqa: RUF012  never changed
    sizes = {"train": 73_257, "test": 26_032}  # noqa: RUF012  never changed

    def __init__(self, root: Path, download: bool) -> None:
        self.root, self.download = root, download
        self._loaded: tuple[str, NDArray[np.uint8], NDArray[np.integer[Any]]] | None = None

    def describe(self) -> str:
        """What it is."""
        return f"SVHN ({self.num_images:,} images of 10 digits) in {self.root}"

    def fingerprint(self) -> str:
        """The files' paths, sizes and times; downloads those that are missing."""
        return stamps(self._files())

    def native_shape(self) -> tuple[int, int, int]:
        """In colour."""
        return SHAPE

    def parts(self, num_rows: int) -> Iterator[Part]:
        """Ranges of rows of train, then of test."""
        return _parts(self.sizes, num_rows)

    def read(self, part: Part, rules: ImageRules) -> Rows:
        """Rows in the order of the file; raises `UserError` for a damaged one."""
        assert part.split is not None
        if self._loaded is None or self._loaded[0] != part.split:
            self._loaded = None  # first: two splits would be held at once
            self._loaded = (part.split, *self._load(part.split))
        rows = slice(*part.payload)
        _, pixels, labels = self._loaded
        return _rows(np.moveaxis(pixels[..., rows], (3, 2), (0, 1)), labels[rows] % 10, rules)

    def _files(self) -> list[Path]:
        files = [self.root / published.name for published in SVHN.values()]
        ensure_present(files, list(SVHN.values()), source="svhn", download=self.download)
        return files

    def _load(self, split: str) -> tuple[NDArray[np.uint8], NDArray[np.integer[Any]]]:
        """Pixels `(32, 32, 3, N)` and labels `(N,)`, 1 to 10."""
        from scipy.io import loadmat

        file = dict(zip(SVHN, self._files(), strict=True))[split]
        warn_unless_published(file, SVHN[split].sha256)
        try:
            arrays = loadmat(file, variable_names=["X", "y"])
            pixels, labels = np.asarray(arrays["X"]), np.asarray(arrays["y"]).reshape(-1)
        except Exception as error:  # its parser raises whatever Python can raise
            reason = f"no variable {error}" if isinstance(error, KeyError) else one_line(error)[:160]
            raise UserError(f"{file}: damaged ({reason}); replace it by {SVHN[split].url}") from None
        num = self.sizes[split]
        if pixels.dtype != np.uint8 or pixels.shape != (32, 32, 3, num) or labels.shape != (num,):
            raise UserError(
                f"{file}: X is {pixels.dtype} of shape {pixels.shape} and y of shape {labels.shape}, should be uint8 "
                f"(32, 32, 3, {num}) and ({num}, 1); replace it by {SVHN[split].url}"
            )
        if labels.dtype.kind not in "iu" or labels.min() < 1 or labels.max() > 10:
            raise UserError(f"{file}: y is {labels.dtype} from {labels.min()} to {labels.max()}, should be 1 to 10")
        return pixels, labels
