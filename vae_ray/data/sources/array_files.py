"""The arrays in .npy, .npz and HDF5 files, of which rows can be read without the rest.

Nothing is unpickled: an array of Python objects is listed, and refused when its rows are asked for.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import stat
import struct
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vae_ray.errors import UserError, one_line

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
SUFFIXES = (".npy", ".npz", *HDF5_SUFFIXES)
MAX_HEADER_BYTES = 1 << 16
"""Of the .npy format; numpy refuses more than 10,000."""
DAMAGE = (
    *(OSError, ValueError, EOFError, MemoryError, RuntimeError, KeyError, TypeError, OverflowError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)
"""What numpy, zipfile and h5py raise for files that are not what they should be."""


class StoredArray(NamedTuple):
    """An array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rows: Callable[[int, int], NDArray[Any]]
    """Those from the first to before the last, in memory; use it inside `errors_named`."""

    @property
    def holds_numbers(self) -> bool:
        return self.dtype.kind in "buif"

    @property
    def holds_text(self) -> bool:
        return self.dtype.kind in "US"

    def __str__(self) -> str:
        names = {"U": "text", "S": "text", "O": "objects"}
        return f"{names.get(self.dtype.kind, self.dtype.name)} {self.shape}"


def array_files(root: Path) -> list[Path]:
    """The file at `root`, or the .npy files in that directory, sorted; raises `UserError` where there are none."""
    try:
        is_directory = stat.S_ISDIR(root.stat().st_mode)
        visible = sorted(file for file in root.iterdir() if not file.name.startswith(".")) if is_directory else [root]
        files = [file for file in visible if not is_directory or file.suffix.lower() == ".npy"]
        irregular = [file for file in files if not stat.S_ISREG(file.stat().st_mode)]
    except OSError as error:
        raise UserError(f"data.root: {root} cannot be read ({error.strerror or one_line(error)})") from None
    if irregular:
        raise UserError(f"data.root: {irregular[0]} is a directory, a pipe or a device, should be a regular file")
    if not files:
        raise UserError(f"data.root: {root} has no .npy files; should be a directory of .npy files, or one file")
    if not is_directory and root.suffix.lower() not in SUFFIXES:
        raise UserError(f"data.root: {root} is not a file of arrays; should end in one of {', '.join(SUFFIXES)}")
    return files


def stamp(root: Path) -> str:
    """A string that changes when the files do: their resolved paths, sizes and times; raises `UserError`."""
    files = array_files(root)
    stats = [file.stat() for file in files]
    return ";".join(f"{file.resolve()}:{s.st_size}:{s.st_mtime_ns}" for file, s in zip(files, stats, strict=True))


def open_arrays(root: Path, stamp: str) -> dict[str, StoredArray]:
    """The arrays by name, open until this process opens others; raises `UserError`.

    They are kept open here, not in the source: each task of a process pool may bring its own copy of that, and a
    compressed array that is opened again is decompressed from its start.
    """
    key = (root, stamp, os.getpid())  # a forked child must not share positions in files with its parent
    with _lock:
        if key not in _opened:
            _opened.clear()  # first: the HDF5 library answers for a file that was replaced from the one that is open
            _opened[key] = _open(root)
        return _opened[key]


_opened: dict[tuple[Path, str, int], dict[str, StoredArray]] = {}
"""Of this process; the last one only."""
_lock = threading.Lock()


def _open(root: Path) -> dict[str, StoredArray]:
    arrays: dict[str, StoredArray] = {}
    for file in array_files(root):
        suffix = file.suffix.lower()
        with errors_named(file):
            if suffix == ".npz":
                arrays.update(_npz_arrays(file))
            elif suffix in HDF5_SUFFIXES:
                arrays.update(_hdf5_arrays(file))
            else:
                arrays[file.stem] = _mapped(file, start=0, num_bytes=file.stat().st_size)
    return arrays


@contextlib.contextmanager
def errors_named(file: Path) -> Iterator[None]:
    """Raise what reading raises as a `UserError` that names the file."""
    try:
        yield
    except DAMAGE as error:
        reason = getattr(error, "strerror", None) or one_line(error)[:150] or type(error).__name__
        raise UserError(f"data.root: {file} cannot be read ({reason}); it may be damaged or truncated") from None


class _Header(NamedTuple):
    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype[Any]
    num_bytes: int
    """Of the header itself."""


def _read_header(stream: IO[bytes], num_bytes: int) -> _Header:
    """The header of the .npy format; raises `ValueError` unless `num_bytes` are just the header and the values."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"version {version} of the .npy format, should be (1, 0) or (2, 0)")
    header = _Header(shape, is_fortran, dtype, stream.tell())
    expected = header.num_bytes + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or (not dtype.hasobject and num_bytes < expected):
        raise ValueError(f"expected {expected} bytes for {dtype} of shape {shape}, found {num_bytes}")
    return header


def _mapped(file: Path, *, start: int, num_bytes: int) -> StoredArray:
    """An array in the .npy format that lies in `file` from byte `start`, mapped into memory."""
    with file.open("rb") as stream:
        stream.seek(start)
        header = _read_header(io.BytesIO(stream.read(MAX_HEADER_BYTES)), num_bytes)
    shape, is_fortran, dtype, header_bytes = header
    if dtype.hasobject:
        return _objects(shape)
    if not math.prod(shape) * dtype.itemsize:  # an empty array cannot be mapped
        return StoredArray(shape, dtype, lambda first, last: np.empty(shape, dtype)[first:last])
    values = np.memmap(
        file, dtype, mode="r", offset=start + header_bytes, shape=shape, order="F" if is_fortran else "C"
    )
    return StoredArray(shape, dtype, lambda first, last: np.array(values[first:last]))


def _npz_arrays(file: Path) -> dict[str, StoredArray]:
    archive = zipfile.ZipFile(file)
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist() if _is_array(info)}
    return {name: _npz_member(file, archive, info) for name, info in members.items()}


def _is_array(info: zipfile.ZipInfo) -> bool:
    return info.filename.endswith(".npy") and not info.is_dir()


def _npz_member(file: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> StoredArray:
    """Mapped where it is stored as it is (`numpy.savez`), else decompressed row by row (`savez_compressed`)."""
    if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:  # bit 0: encrypted
        with file.open("rb") as stream:
            stream.seek(info.header_offset)
            local_header = stream.read(30)
        if local_header[:4] != b"PK\3\4":
            raise zipfile.BadZipFile(f"{info.filename} does not begin where the directory says")
        name_bytes, extra_bytes = struct.unpack("<HH", local_header[26:30])
        start = info.header_offset + 30 + name_bytes + extra_bytes
        if start + info.file_size > file.stat().st_size:
            raise zipfile.BadZipFile(f"{info.filename} ends after the file does")
        return _mapped(file, start=start, num_bytes=info.file_size)
    with archive.open(info) as stream:
        header = _read_header(stream, info.file_size)
    if header.dtype.hasobject:
        return _objects(header.shape)
    member = _CompressedMember(archive, info, header)
    return StoredArray(header.shape, header.dtype, member.read_whole if header.is_fortran else member.read_rows)


class _CompressedMember:
    """Rows of a compressed member of a zip file, whose stream goes on from row to row and starts again to go back.

    One block is in memory, not the whole array, and an array that is read in order is decompressed once.
    """

    def __init__(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, header: _Header) -> None:
        self._archive, self._info, self._header = archive, info, header
        self._stream: IO[bytes] | None = None
        self._lock = threading.Lock()

    def read_rows(self, first: int, last: int) -> NDArray[Any]:
        shape, dtype = self._header.shape, self._header.dtype
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        last = min(last, shape[0])
        with self._lock:
            if self._stream is None:
                self._stream = self._archive.open(self._info)
            self._stream.seek(self._header.num_bytes + first * row_bytes)
            content = self._stream.read((last - first) * row_bytes)
        return np.frombuffer(content, dtype).reshape(last - first, *shape[1:])

    def read_whole(self, first: int, last: int) -> NDArray[Any]:
        """The same for an array in Fortran's order, whose rows are scattered: it is kept in memory."""
        return self._whole[first:last]

    @functools.cached_property
    def _whole(self) -> NDArray[Any]:
        with self._archive.open(self._info) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)


def _hdf5_arrays(file: Path) -> dict[str, StoredArray]:
    """The data sets of an HDF5 file by their paths in it; links to other files are not followed."""
    try:
        import h5py
    except ImportError:
        raise UserError(
            f"data.root: {file} is an HDF5 file, which needs the package h5py; pip install 'vae_ray[hdf5]'"
        ) from None
    arrays: dict[str, StoredArray] = {}

    def add(name: str | bytes, item: Any) -> None:
        if isinstance(name, str) and isinstance(item, h5py.Dataset) and item.shape is not None:  # bytes: not UTF-8
            arrays[name] = _hdf5_array(item, is_text=h5py.check_string_dtype(item.dtype) is not None)

    # "best-effort": some network file systems have no locks
    h5py.File(file, "r", locking="best-effort").visititems(add)
    return arrays


def _hdf5_array(dataset: Any, *, is_text: bool) -> StoredArray:
    if is_text:
        texts = dataset.asstr("utf-8", "backslashreplace")
        return StoredArray(dataset.shape, np.dtype(str), lambda first, last: np.asarray(texts[first:last], str))
    if dataset.dtype.hasobject:
        return _objects(dataset.shape)
    return StoredArray(dataset.shape, dataset.dtype, lambda first, last: np.asarray(dataset[first:last]))


def _objects(shape: tuple[int, ...]) -> StoredArray:
    def refuse(first: int, last: int) -> NDArray[Any]:
        raise ValueError("an array of Python objects, which could run code when it is read")

    return StoredArray(shape, np.dtype(object), refuse)
