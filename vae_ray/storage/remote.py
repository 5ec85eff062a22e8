"""The files below a URI of an object store, which has no append, no rename and no lock."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow.fs

from vae_ray.storage.filesystems import open_filesystem

CHUNK_BYTES = 1 << 20


class FileStat(NamedTuple):
    """A file with another `FileStat` than before has changed."""

    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, file: Path) -> FileStat:
        """That of a file of this machine; raises `OSError`."""
        status = file.stat()
        return cls(status.st_size, status.st_mtime_ns)


class RemoteDirectory:
    """Reads and writes files by their names relative to `uri`, with `/`; all methods raise `OSError`.

    Raises `UserError`, naming `key`, for a URI that cannot be used.
    """

    def __init__(self, uri: str, *, key: str = "run.storage") -> None:
        self.uri = uri
        self._filesystem, self._path = open_filesystem(uri, key=key)

    def list(self) -> dict[str, FileStat]:
        """All files, in subdirectories too."""
        selector = pyarrow.fs.FileSelector(self._path, recursive=True, allow_not_found=True)
        return {
            info.path[len(self._path) + 1 :]: FileStat(info.size, info.mtime_ns or 0)
            for info in self._filesystem.get_file_info(selector)
            if info.type == pyarrow.fs.FileType.File
        }

    def read(self, name: str) -> bytes | None:
        """The content of a small file; None if it does not exist."""
        try:
            with self._filesystem.open_input_stream(self._path_of(name)) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def open(self, name: str) -> Any:
        """A file, to read parts of it; None if it does not exist."""
        try:
            return self._filesystem.open_input_file(self._path_of(name))
        except FileNotFoundError:
            return None

    def download(self, name: str, file: Path) -> None:
        """Copy a file from there."""
        with self._filesystem.open_input_stream(self._path_of(name)) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK_BYTES)

    def write(self, name: str, content: bytes | BinaryIO) -> None:
        """Create or replace a file."""
        path = self._path_of(name)
        try:
            target = self._filesystem.open_output_stream(path)
        except FileNotFoundError:  # unlike an object store, this one has directories
            self._filesystem.create_dir(path.rpartition("/")[0])
            target = self._filesystem.open_output_stream(path)
        with target:
            shutil.copyfileobj(io.BytesIO(content) if isinstance(content, bytes) else content, target, CHUNK_BYTES)

    def delete(self, name: str) -> None:
        """Delete a file; no error if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(self._path_of(name))

    def delete_directory(self, name: str) -> None:
        """Delete a directory with all files; no error if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_dir(self._path_of(name))

    def _path_of(self, name: str) -> str:
        return f"{self._path}/{name}"
