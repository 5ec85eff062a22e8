"""Parquet files at a location, and rows of their row groups. Imported by the Parquet source only: it needs pyarrow."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
from numpy.typing import NDArray

from vae_ray.errors import UserError, one_line
from vae_ray.storage.filesystems import open_filesystem, with_timeout
from vae_ray.storage.locations import is_uri, local_path
from vae_ray.storage.retry import is_away, retry_io

SUFFIX = ".parquet"
BATCH_ROWS = 256
"""Rows that are decoded at once: bounds the memory of a large row group."""
BUFFER_BYTES = 4 << 20
"""Of a column that are read at once, instead of its whole part of a row group."""

RowNumbers = range | NDArray[np.int64]
"""Rows of a row group, ascending."""


class ParquetFile(NamedTuple):
    """A file at a location."""

    location: str
    path: str
    """In the file system of the location."""
    name: str
    """Relative to the location, with `/`; the file's own where it is the location."""
    num_bytes: int
    modified_ns: int


def list_files(location: str) -> list[ParquetFile]:
    """The Parquet files at a path or URI, in subdirectories too, by name; raises `UserError` if there are none.

    Hidden files and directories, and those that begin with `_` as Spark's `_temporary` does, are left out.
    """
    try:
        files = with_timeout(lambda: _list_uri(location)) if is_uri(location) else _list_path(location)
    except OSError as error:
        raise UserError(f"data.root: {location} cannot be read ({error.strerror or one_line(error)[:200]})") from None
    if not files:
        raise UserError(f"data.root: {location} has no {SUFFIX} files; should be one, or a directory of them")
    return sorted(files, key=lambda file: file.name)


def _list_path(location: str) -> list[ParquetFile]:
    root = local_path(location, key="data.root")
    if not stat.S_ISDIR(root.stat().st_mode):
        return [_local_file(location, root, root.name)]
    found = []
    for directory, directories, files in os.walk(root, onerror=_raise):
        directories[:] = [name for name in directories if name[0] not in "._"]
        paths = [Path(directory, name) for name in files if _is_visible_parquet(name)]
        found += [_local_file(location, path, path.relative_to(root).as_posix()) for path in paths]
    return found


def _raise(error: OSError) -> None:
    raise error


def _local_file(location: str, path: Path, name: str) -> ParquetFile:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"data.root: {path} is a pipe or a device, should be a regular file")
    return ParquetFile(location, str(path), name, status.st_size, status.st_mtime_ns)


def _list_uri(location: str) -> list[ParquetFile]:
    filesystem, root = _filesystem(location, os.getpid())
    info = filesystem.get_file_info(root)
    if info.type == pyarrow.fs.FileType.NotFound:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    if info.type == pyarrow.fs.FileType.File:
        return [ParquetFile(location, root, info.base_name, info.size, info.mtime_ns or 0)]
    return [
        ParquetFile(location, info.path, info.path[len(root) + 1 :], info.size, info.mtime_ns or 0)
        for info in filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
        if info.type == pyarrow.fs.FileType.File
        and _is_visible_parquet(info.base_name)
        and not any(part[0] in "._" for part in info.path[len(root) + 1 :].split("/"))
    ]


def _is_visible_parquet(name: str) -> bool:
    return name.lower().endswith(SUFFIX) and name[0] not in "._"


@functools.lru_cache(maxsize=4)
def _filesystem(location: str, process_id: int) -> tuple[pyarrow.fs.FileSystem, str]:
    """For one process: the clients of object stores do not work in a forked one."""
    return open_filesystem(location, key="data.root")


@contextlib.contextmanager
def errors_named(file: ParquetFile) -> Iterator[None]:
    """Raise what reading raises as a `UserError` that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)[:200]
        raise UserError(
            f"data.root: {file.path} cannot be read as Parquet ({reason}); it may be damaged or truncated"
        ) from None


def open_file(file: ParquetFile) -> Any:
    """pyarrow's ParquetFile, which verifies the checksums of pages that have one; use it inside `errors_named`."""
    filesystem = _filesystem(file.location, os.getpid())[0] if is_uri(file.location) else pyarrow.fs.LocalFileSystem()
    return pyarrow.parquet.ParquetFile(
        file.path, filesystem=filesystem, buffer_size=BUFFER_BYTES, page_checksum_verification=True
    )


def read_rows(file: ParquetFile, row_group: int, rows: RowNumbers, columns: Sequence[str]) -> list[Any]:
    """Record batches of rows of a row group, in order.

    The row group stays open until this process reads another: the next rows do not decode the ones before again.
    Retries while the storage is away; raises `UserError`, naming the file.
    """

    def read() -> list[Any]:
        reader = _open_row_group(file, row_group, tuple(columns), os.getpid())
        try:
            return reader.read(rows)
        except BaseException:  # its position is unknown
            _open_row_group.cache_clear()
            raise

    with errors_named(file):
        batches: list[Any] = retry_io(
            # a file that was just listed and is not there was deleted
            read,
            where=file.path,
            is_transient=lambda error: is_away(error) and error.errno != errno.ENOENT,
        )
        return batches


@functools.lru_cache(maxsize=1)
def _open_row_group(file: ParquetFile, row_group: int, columns: tuple[str, ...], process_id: int) -> _RowGroup:
    return _RowGroup(open_file(file), row_group, columns)


class _RowGroup:
    """Reads a row group in batches, forwards; starts again for rows that lie before the current batch."""

    def __init__(self, file: Any, row_group: int, columns: tuple[str, ...]) -> None:
        self._file, self._row_group, self._columns = file, row_group, columns
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self._batches = self._file.iter_batches(
            BATCH_ROWS, row_groups=[self._row_group], columns=list(self._columns), use_threads=False
        )
        self._advance(0)

    def read(self, rows: RowNumbers) -> list[Any]:
        found = []
        with self._lock:
            if rows[0] < self._first:
                self._start()
            while len(rows):
                last = self._first + self._batch.num_rows
                num = int(np.searchsorted(rows, last))
                if num:
                    found.append(self._select(rows[:num]))
                    rows = rows[num:]
                if len(rows):
                    self._advance(last)
        return found

    def _select(self, rows: RowNumbers) -> Any:
        if isinstance(rows, range):
            return self._batch.slice(rows.start - self._first, len(rows))
        return self._batch.take(pa.array(rows - self._first))

    def _advance(self, first: int) -> None:
        try:
            self._first, self._batch = first, next(self._batches)
        except StopIteration:
            raise ValueError(f"row group {self._row_group} ends after {first} rows") from None
