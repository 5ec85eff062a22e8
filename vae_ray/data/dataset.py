"""A prepared data set as the rest of the package reads it: splits of images in mapped shards.

Between the shards and the batches. Shards are mapped when they are first needed and shared by all processes of a node;
of a data set at a URI they are fetched into the node's cache first.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import math
import os
import platform
import threading
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vae_ray.data.shards import (
    DATASET_FILE,
    MAX_DATASET_BYTES,
    SKIPPED_FILE,
    SUMS_FILE,
    Description,
    File,
    digests_of,
    fingerprint_of,
    read_shard,
)
from vae_ray.errors import CorruptFile, UserError, one_line
from vae_ray.storage.atomic import atomic_write
from vae_ray.storage.reading import read_bytes
from vae_ray.storage.remote import RemoteDirectory

logger = logging.getLogger(__name__)

NUM_FETCHES = 4
"""Shards that are fetched at the same time."""


class Split:
    """Images of one split, in memory that all processes of the node share; read only."""

    def __init__(
        self, shards: Sequence[Shard], *, name: str, image_shape: tuple[int, int, int], fingerprint: str
    ) -> None:
        self.shards, self.name, self.image_shape = shards, name, image_shape
        self.fingerprint = fingerprint
        """SHA-256 of the images: wherever they were read from; without the labels."""
        numbers = torch.tensor([0, *(shard.num_images for shard in shards)])
        self.starts = numbers.cumsum(0)
        """The first row of each shard, and the number of rows."""
        self.names: dict[str, list[str]] = {}
        """Of the values 0, 1, ... of label columns, by column."""
        self._rows_file: Path | None = None

    @classmethod
    def in_memory(cls, pixels: Tensor, columns: dict[str, Tensor] | None = None) -> Split:
        """The split of uint8 pixels `(N, C, H, W)`."""
        images = pixels.numpy()
        digests, shape = digests_of(images), (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        fingerprint = fingerprint_of(shape, digests)
        split = cls([Shard.in_memory(pixels)], name="train", image_shape=shape, fingerprint=fingerprint)
        split.__dict__["_rows"] = (torch.from_numpy(digests), columns or {})
        return split

    def __len__(self) -> int:
        return int(self.starts[-1])

    @functools.cached_property
    def _rows(self) -> tuple[Tensor, dict[str, Tensor]]:
        assert self._rows_file is not None
        try:
            table = read_shard(pa.memory_map(str(self._rows_file)))
            if len(table.digests) != len(self):
                raise ValueError(f"{len(table.digests)} rows, should be {len(self)}")
        except (OSError, ValueError) as error:
            raise CorruptFile(f"{self._rows_file}: damaged ({one_line(error)[:200]})") from None
        return _tensor(table.digests), {name: _tensor(values) for name, values in table.columns.items()}

    @property
    def digests(self) -> Tensor:
        """int64 `(N,)`: a hash of each image."""
        return self._rows[0]

    @property
    def columns(self) -> dict[str, Tensor]:
        """Labels and factors by name: int64 or float64 `(N,)`."""
        return self._rows[1]

    def counts(self) -> dict[str, dict[str, int]]:
        """Numbers of images by value, of each column of labels that has names; without those that have no label, -1."""
        counts = {}
        for column, names in self.names.items():
            values = self.columns[column]
            numbers = values[values >= 0].bincount(minlength=len(names)).tolist()
            counts[column] = dict(zip(names, numbers, strict=False))
        return counts

    def gather(self, indices: Tensor) -> Tensor:
        """The images at `indices`, uint8 `(n, C, H, W)`."""
        if len(self.shards) == 1:
            # index_select is 20x faster than pixels[indices] for uint8 rows
            return self.shards[0].pixels.index_select(0, indices)
        # by NumPy: torch copies uint8 rows to places of a tensor element by element
        rows, starts = indices.numpy(), self.starts.numpy()
        shard_of = np.searchsorted(starts, rows, side="right") - 1
        images = np.empty((len(rows), math.prod(self.image_shape)), np.uint8)
        for number in np.unique(shard_of).tolist():
            places = np.flatnonzero(shard_of == number)
            pixels = self.shards[number].pixels.flatten(1).numpy()
            images[places] = pixels[rows[places] - starts[number]]
        return torch.from_numpy(images).view(-1, *self.image_shape)

    def release(self, *, before: int) -> None:
        """Give the memory of the shards back whose images all come before an index."""
        for shard in self.shards[: int(torch.searchsorted(self.starts, before, right=True)) - 1]:
            shard.release()

    def first(self, num: int) -> Tensor:
        """The first `num` images, uint8 `(n, C, H, W)`; all where there are fewer."""
        return self.gather(torch.arange(min(num, len(self))))


class Shard:
    """The images of one shard; its file is mapped when they are first asked for."""

    def __init__(self, file: File, files: ShardFiles, image_shape: tuple[int, ...]) -> None:
        self.file, self._files, self._shape = file, files, (file.num_rows, *image_shape)
        self.num_images = file.num_rows
        self._pixels: Tensor | None = None

    @classmethod
    def in_memory(cls, pixels: Tensor) -> Shard:
        shard = cls(File("", len(pixels), pixels.nbytes, ""), LocalFiles(Path()), tuple(pixels.shape[1:]))
        shard._pixels = pixels
        return shard

    @property
    def pixels(self) -> Tensor:
        """uint8 `(n, C, H, W)`."""
        if self._pixels is None:
            path = self._files.path(self.file)
            try:
                # The mapping lives as long as the tensors that point into it.
                pixels = read_shard(pa.memory_map(str(path))).pixels
                if pixels.shape != self._shape:
                    raise ValueError(f"images of shape {pixels.shape}, should be {self._shape}")
                self._pixels = _tensor(pixels)
            except (OSError, ValueError) as error:
                raise CorruptFile(
                    f"{path}: cannot be read ({one_line(error)[:200]}); prepare the images again"
                ) from None
        return self._pixels

    def read_ahead(self) -> None:
        """Have the file read (and fetched) before it is needed; can run in a thread."""
        _advise(self._files.path(self.file), "POSIX_FADV_WILLNEED")

    def release(self) -> None:
        """Give the memory of its pages back."""
        if self.file.name and self._pixels is not None:
            self._pixels = None
            # not by `path`, which would fetch a file again that has made room
            _advise(self._files.directory / self.file.name, "POSIX_FADV_DONTNEED")


class LocalFiles:
    """Shards that lie in a directory of this machine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, file: File) -> Path:
        """Where the file lies."""
        return self.directory / file.name


class RemoteFiles:
    """Shards at a URI, copied to `directory` when they are needed, within `limit_bytes`; shared by its processes."""

    def __init__(self, remote: RemoteDirectory, directory: Path, *, limit_bytes: float | None) -> None:
        self._remote, self.directory, self._limit = remote, directory, limit_bytes
        self._lock = threading.Lock()
        self._intact: set[str] = set()
        """Files that this process has verified."""

    def path(self, file: File) -> Path:
        """Where the fetched and verified file lies; raises `UserError` if it cannot be fetched."""
        path = self.directory / file.name
        with filelock.FileLock(self.directory / f".{file.name}.lock"):
            try:
                if not self._is_intact(file, path):
                    self._fetch(file, path)
                    self._make_room(path)
                self._intact.add(file.name)
                os.utime(path)  # the order in which files make room
                os.utime(self.directory)  # when it was last used, for data clean
            except OSError as error:
                where = f"{self._remote.uri}/{file.name}"
                raise UserError(f"data.root: {where} cannot be fetched ({one_line(error)[:200]})") from None
        return path

    def _is_intact(self, file: File, path: Path) -> bool:
        """Whether the copy is there and what was written: also after a power cut, or if someone else has changed it."""
        if not path.is_file() or path.stat().st_size != file.num_bytes:
            return False
        return file.name in self._intact or file.is_intact(_mapped(path))

    def _fetch(self, file: File, path: Path) -> None:
        partial = path.with_name(f".partial-{path.name}")
        for is_last in (False, True):
            self._remote.download(file.name, partial)
            if file.is_intact(partial.read_bytes()):
                os.replace(partial, path)
                return
            if is_last:
                partial.unlink()
                raise CorruptFile(f"{self._remote.uri}/{file.name}: damaged")

    def _make_room(self, newest: Path) -> None:
        """Delete the shards that were not needed for longest; processes that have them mapped keep them."""
        if self._limit is None:
            return
        with self._lock:
            stats = {}
            for path in self.directory.glob("*.arrow"):
                with contextlib.suppress(FileNotFoundError):  # another process makes room too
                    stats[path] = path.stat()
            total = sum(stat.st_size for stat in stats.values())
            stats.pop(newest, None)
            for path in sorted(stats, key=lambda path: stats[path].st_mtime_ns):
                if total <= self._limit:
                    break
                total -= stats[path].st_size
                path.unlink(missing_ok=True)


ShardFiles = LocalFiles | RemoteFiles


class Dataset:
    """A prepared data set: its description and its splits."""

    def __init__(self, description: Description, files: ShardFiles) -> None:
        self.description, self._files = description, files
        self.splits = {split: self._split(split) for split in description.shards}

    def _split(self, name: str) -> Split:
        shape, fingerprint = self.description.image_shape, self.description.fingerprints[name]
        shards = [Shard(file, self._files, shape) for file in self.description.shards[name]]
        split = Split(shards, name=name, image_shape=shape, fingerprint=fingerprint)
        split.names = self.description.names
        split._rows_file = self._files.directory / f"{name}.rows"
        return split

    def sum_of_images(self, split: str) -> Tensor:
        """int64 `(C, H, W)`: the sum of all images of a split."""
        path = self._files.directory / SUMS_FILE
        try:
            with np.load(io.BytesIO(read_bytes(path, max_bytes=MAX_DATASET_BYTES)), allow_pickle=False) as sums:
                total = sums[split].astype(np.int64)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise CorruptFile(f"{path}: damaged ({one_line(error)[:200]})") from None
        if total.shape != self.description.image_shape:
            raise CorruptFile(f"{path}: damaged (sums of shape {total.shape})")
        return torch.from_numpy(total)

    @property
    def warnings(self) -> list[str]:
        """What a user should know of the images, each on one line."""
        skipped = str(self._files.directory / SKIPPED_FILE)
        return [one_line(line).replace(SKIPPED_FILE, skipped) for line in self.description.warnings]

    def describe(self) -> str:
        """One line: what was prepared, and how many images of what size each split has."""
        return self.description.describe()

    @property
    def directory(self) -> Path:
        """Where the files lie, or their copies of this node."""
        return self._files.directory


def open_local(directory: Path, *, verified: Path) -> Dataset | None:
    """The data set in a directory of this machine; None if there is none.

    Raises `CorruptFile` if a file is not what was written. Whoever verified all files of it on this node has left a
    note in the directory `verified`; files that have changed since are verified again.
    """
    try:
        content = read_bytes(directory / DATASET_FILE, max_bytes=MAX_DATASET_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError:
        raise CorruptFile(f"{directory / DATASET_FILE}: damaged, is a directory; prepare the images again") from None
    description = _description(content, str(directory / DATASET_FILE))
    _verify(description.files, directory, note=verified / _note_name(str(directory)))
    return Dataset(description, LocalFiles(directory))


def open_remote(uri: str, *, cache: Path, limit_bytes: float | None) -> Dataset | None:
    """The data set at a URI, of which files are copied to `cache` when they are needed; None if there is none.

    Raises `UserError` if it cannot be read, `CorruptFile` if it is damaged.
    """
    remote = RemoteDirectory(uri, key="data.root")
    try:
        content = remote.read(DATASET_FILE)
    except OSError as error:
        raise UserError(f"data.root: got {uri!r}, which cannot be read ({one_line(error)[:200]})") from None
    if content is None:
        return None
    description = _description(content, f"{uri}/{DATASET_FILE}")
    # another data set at the same URI has another directory
    directory = cache / f"fetched-{sha256(uri.encode() + content).hexdigest()[:16]}"
    directory.mkdir(parents=True, exist_ok=True)
    files = RemoteFiles(remote, directory, limit_bytes=limit_bytes)
    if not (directory / DATASET_FILE).exists():
        atomic_write(directory / DATASET_FILE, content)
    for file in description.others:
        files.path(file)
    return Dataset(description, files)


def read_ahead(shards: Iterable[Shard]) -> None:
    """Read shards ahead of their use, in threads; an error shows when the shard is used."""
    executor = ThreadPoolExecutor(NUM_FETCHES, "read ahead")
    for shard in shards:
        executor.submit(shard.read_ahead)
    executor.shutdown(wait=False)


def _description(content: bytes, name: str) -> Description:
    try:
        return Description.from_json(content)
    except ValueError as error:
        raise CorruptFile(f"{name}: damaged ({one_line(error)[:200]})") from None


def _note_name(location: str) -> str:
    return f"verified-{sha256(f'{platform.node()}:{location}'.encode()).hexdigest()[:16]}.json"


def _verify(files: Sequence[File], directory: Path, *, note: Path) -> None:
    """Compare the files with their checksums, unless the note says that this was done since they were written."""
    states: dict[str, Any] = {}
    for file in files:
        try:
            status = (directory / file.name).stat()
        except OSError as error:
            raise CorruptFile(f"{directory / file.name}: cannot be read ({error.strerror})") from None
        states[file.name] = [status.st_size, status.st_mtime_ns, status.st_ino]
    try:
        known = json.loads(note.read_bytes())
    except (OSError, ValueError):
        known = None
    if known == states:
        return
    for file in files:
        path = directory / file.name
        if not path.is_file() or path.stat().st_size != file.num_bytes or not file.is_intact(_mapped(path)):
            raise CorruptFile(f"{path}: damaged, is not what was written")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(note, json.dumps(states).encode())
    except OSError:  # verified again next time
        logger.debug("%s: cannot be written", note)


def _mapped(path: Path) -> Any:
    return pa.memory_map(str(path)).read_buffer() if path.stat().st_size else b""


def _advise(path: Path, advice: str) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.posix_fadvise(descriptor, 0, 0, getattr(os, advice))
    finally:
        os.close(descriptor)


def _tensor(values: np.ndarray[Any, Any]) -> Tensor:
    with warnings.catch_warnings():
        # torch warns that mapped memory is read-only; batches are copies, nothing writes into it
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(values)
