"""What holds image files: a folder, a .zip or .tar of it, or a folder at a URI. Archives are never extracted."""

from __future__ import annotations

import functools
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from vae_ray.errors import UserError, one_line
from vae_ray.storage.locations import is_uri, join_location
from vae_ray.storage.retry import retry_io

ARCHIVE_ERRORS = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, zlib.error)
"""What reading a damaged or encrypted archive raises; NotImplementedError is a RuntimeError."""
MAX_FILE_BYTES = 2 << 30
"""More than the largest image takes without compression: eight bytes for each of `decoding.MAX_PIXELS`."""
OUTSIDE = ".."
"""The first part of the name of what an archive places outside of itself."""


class Entry(NamedTuple):
    """A file in a container."""

    name: str
    """Relative, with `/`."""
    num_bytes: int
    version: int
    """Changes with the content: a modification time or a checksum."""
    reference: Any = None
    """What `read` needs besides the name; can be pickled."""
    fault: str = ""
    """Why it cannot be read; empty if it can."""


class Container(Protocol):
    """Files by name; can be pickled."""

    kind: str

    def entries(self) -> tuple[list[Entry], list[str]]:
        """All files, and all directories, of which a folder's hidden ones are not entered; raises `UserError`."""
        ...

    def read_all(self, entries: Sequence[Entry]) -> Iterator[bytes | OSError]:
        """The content of each entry, or why it cannot be read."""
        ...


def open_container(location: str) -> Container:
    """The container at a path or URI, by its name and what it is."""
    if is_uri(location):
        return RemoteFolder(location)
    if os.path.isdir(location):
        return LocalFolder(location)
    return ZipArchive(location) if location.lower().endswith(".zip") else TarArchive(location)


def is_archive(location: str) -> bool:
    """Whether the name is one of an archive that can be read."""
    return location.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"))


class LocalFolder:
    """A directory of this machine; links are followed."""

    kind = "folder"

    def __init__(self, path: str) -> None:
        self.path = path

    def entries(self) -> tuple[list[Entry], list[str]]:
        found: list[Entry] = []
        directories: list[str] = []
        waiting = [("", frozenset[str]())]
        while waiting:
            prefix, above = waiting.pop()
            place = os.path.join(self.path, prefix)
            real = os.path.realpath(place)
            if real in above:  # a link to a directory above
                continue
            try:
                with os.scandir(place) as entries:
                    for entry in entries:
                        name = f"{prefix}{entry.name}"
                        if _is_directory(entry):
                            directories.append(name)
                            if not entry.name.startswith("."):
                                waiting.append((f"{name}/", above | {real}))
                        else:
                            found.append(self._entry(entry, name))
            except OSError as error:
                raise UserError(f"data.root: {place} cannot be read ({error.strerror}); make it readable") from None
        return found, directories

    @staticmethod
    def _entry(entry: os.DirEntry[str], name: str) -> Entry:
        try:
            status = entry.stat()
        except OSError as error:
            is_broken = isinstance(error, FileNotFoundError)
            return Entry(name, 0, 0, fault="is a broken link" if is_broken else f"cannot be read ({error.strerror})")
        fault = _fault_of_size(status.st_size) if stat.S_ISREG(status.st_mode) else "is a pipe or a device"
        return Entry(name, status.st_size, status.st_mtime_ns, fault=fault)

    def read_all(self, entries: Sequence[Entry]) -> Iterator[bytes | OSError]:
        for entry in entries:
            try:
                with open(os.path.join(self.path, entry.name), "rb") as file:
                    yield file.read()
            except OSError as error:
                yield error


class ZipArchive:
    """A .zip; members are read, never written to disk."""

    kind = "zip archive"

    def __init__(self, path: str) -> None:
        self.path = path

    def entries(self) -> tuple[list[Entry], list[str]]:
        members = _open_zip(self.path, _stamp(self.path)).infolist()
        files = [
            Entry(_inside(each.filename), each.file_size, each.CRC, each.filename, _fault_of_zipped(each))
            for each in members
            if not each.is_dir()
        ]
        return files, [_inside(member.filename) for member in members if member.is_dir()]

    def read_all(self, entries: Sequence[Entry]) -> Iterator[bytes | OSError]:
        archive = _open_zip(self.path, _stamp(self.path))
        for entry in entries:
            try:
                yield archive.read(entry.reference)
            except ARCHIVE_ERRORS as error:
                yield OSError(None, one_line(error)[:120])


def _fault_of_zipped(member: zipfile.ZipInfo) -> str:
    if member.flag_bits & 1:
        return "is encrypted"
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    return "is a link, which is not followed in an archive" if is_link else _fault_of_size(member.file_size)


@functools.lru_cache(maxsize=1)
def _open_zip(path: str, stamp: tuple[int, int]) -> zipfile.ZipFile:
    """One for each process, until the file is another: its directory of members is read once."""
    try:
        return zipfile.ZipFile(path)
    except ARCHIVE_ERRORS as error:
        raise UserError(f"data.root: {path} cannot be read as a .zip ({one_line(error)[:120]})") from None


class TarArchive:
    """A .tar that is not compressed; members are read at their places."""

    kind = "tar archive"

    def __init__(self, path: str) -> None:
        self.path = path

    def entries(self) -> tuple[list[Entry], list[str]]:
        try:
            with tarfile.open(self.path, "r:") as archive:
                members = archive.getmembers()
        except ARCHIVE_ERRORS as error:
            raise UserError(
                f"data.root: {self.path} cannot be read as a .tar ({one_line(error)[:120]}); a compressed one cannot "
                "be read in parts: decompress it, for example with gunzip"
            ) from None
        changed = _stamp(self.path)[1]  # members have no checksums, and often the same time
        files = [
            Entry(_inside(each.name), each.size, changed, each.offset_data, _fault_in_tar(each))
            for each in members
            if not each.isdir()
        ]
        return files, [_inside(member.name) for member in members if member.isdir()]

    def read_all(self, entries: Sequence[Entry]) -> Iterator[bytes | OSError]:
        with open(self.path, "rb") as archive:
            for entry in entries:
                try:
                    archive.seek(entry.reference)
                    content = archive.read(entry.num_bytes)
                    yield content if len(content) == entry.num_bytes else OSError(None, "the archive is truncated")
                except OSError as error:
                    yield error


def _fault_in_tar(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return "is a link, which is not followed in an archive"
    if not member.isreg() or member.issparse():
        return "is a pipe, a device or a sparse file"
    return _fault_of_size(member.size)


def _inside(name: str) -> str:
    """The name of a member without `.` and empty parts; `OUTSIDE` and the name if it would lie elsewhere."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return "/".join([OUTSIDE, *parts] if name.startswith("/") or ".." in parts else parts)


def _stamp(path: str) -> tuple[int, int]:
    """Size and time of an archive, which change with it; raises `UserError` where it cannot be read."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"data.root: {path} cannot be read ({error.strerror})") from None
    return status.st_size, status.st_mtime_ns


def _fault_of_size(num_bytes: int) -> str:
    return f"has {num_bytes:,} bytes, more than any image that is read" if num_bytes > MAX_FILE_BYTES else ""


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


class RemoteFolder:
    """A folder at a URI."""

    kind = "folder"

    def __init__(self, uri: str) -> None:
        self.path = uri

    def entries(self) -> tuple[list[Entry], list[str]]:
        from vae_ray.storage.remote import RemoteDirectory

        try:
            files = RemoteDirectory(self.path, key="data.root").list()
        except OSError as error:
            raise UserError(f"data.root: {self.path} cannot be read ({one_line(error)[:120]})") from None
        entries = [
            Entry(name, status.num_bytes, status.modified_ns, fault=_fault_of_size(status.num_bytes))
            for name, status in files.items()
        ]
        return entries, []

    def read_all(self, entries: Sequence[Entry]) -> Iterator[bytes | OSError]:
        from concurrent.futures import ThreadPoolExecutor

        from vae_ray.storage.remote import RemoteDirectory

        directory = RemoteDirectory(self.path, key="data.root")

        def read(entry: Entry) -> bytes | OSError:
            where = join_location(self.path, entry.name)
            try:
                content = retry_io(lambda: directory.read(entry.name), where=where)
            except OSError as error:
                return error
            return OSError(None, "was deleted") if content is None else content

        with ThreadPoolExecutor(16) as pool:  # it waits for the network
            yield from pool.map(read, entries)
