"""One set of methods for the files of a directory, on this machine or at a URI."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from vae_ray.storage.atomic import sync_directory
from vae_ray.storage.locations import is_uri, local_path
from vae_ray.storage.remote import CHUNK_BYTES, FileStat, RemoteDirectory


class LocalDirectory:
    """The methods of `RemoteDirectory` for a directory of this machine.

    A reader sees the old content of a file or the new, never a part; a power cut may lose what was not synced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def list(self) -> dict[str, FileStat]:
        """All files, in subdirectories too."""
        files = [Path(folder, name) for folder, _, names in os.walk(self.path) for name in names]
        return {file.relative_to(self.path).as_posix(): FileStat.of(file) for file in files}

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if it does not exist."""
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, name: str) -> BinaryIO | None:
        """A file, to read parts of it; None if it does not exist."""
        try:
            return (self.path / name).open("rb")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, content: bytes | BinaryIO) -> None:
        """Create or replace a file."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / f".partial-{name}"
        with partial.open("wb") as target:
            shutil.copyfileobj(io.BytesIO(content) if isinstance(content, bytes) else content, target, CHUNK_BYTES)
        os.replace(partial, self.path / name)

    def sync(self, names: Iterable[str]) -> None:
        """Make files survive a power cut."""
        for name in names:
            sync_directory(self.path / name)
        sync_directory(self.path)

    def delete(self, name: str) -> None:
        """Delete a file; no error if it does not exist."""
        (self.path / name).unlink(missing_ok=True)

    def delete_directory(self, name: str) -> None:
        """Delete a directory with all files; no error if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.path / name)

    def download(self, name: str, file: Path) -> None:
        """Copy a file from there."""
        shutil.copyfile(self.path / name, file)


Directory = LocalDirectory | RemoteDirectory


def open_directory(location: str, *, key: str) -> Directory:
    """The directory of a path or URI; raises `UserError`, naming `key`, for one that cannot be used."""
    return RemoteDirectory(location, key=key) if is_uri(location) else LocalDirectory(local_path(location, key=key))
