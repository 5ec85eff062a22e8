"""A directory of a run or a sweep, wherever it is: on this machine, or at a URI with a copy here."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from vae_ray.errors import UserError, one_line
from vae_ray.storage.background import UNSENT
from vae_ray.storage.locations import cache_root, is_uri, join_location
from vae_ray.storage.mirror import Mirror
from vae_ray.storage.remote import RemoteDirectory

LARGE_FILES = (".safetensors", ".pt")
EVENTS = "tensorboard"


class SyncedDirectory:
    """The directory `path`; with a `mirror`, this process's copy of what is at a URI."""

    def __init__(self, path: Path, mirror: Mirror | None = None) -> None:
        self.path, self.mirror = path, mirror

    @classmethod
    def at(cls, location: str | Path, *, role: str) -> Self:
        """That of a directory or URI, from `absolute`; `role` ("driver", "writer", ...) names the copy of a URI.

        Raises `UserError` for a URI that no file system serves.
        """
        if not is_uri(location):
            return cls(Path(location))
        path = copy_path(str(location), role)
        return cls(path, Mirror(path, RemoteDirectory(str(location))))

    @property
    def location(self) -> str:
        """The directory or URI by which everyone else finds it."""
        return str(self.path) if self.mirror is None else self.mirror.remote.uri

    def public_path(self, path: Path) -> Path | str:
        """Where everyone else finds the file or directory `path` inside."""
        return path if self.mirror is None else join_location(self.location, *path.relative_to(self.path).parts)

    @contextlib.contextmanager
    def working_copy(self) -> Iterator[None]:
        """Of a URI: copy its small files here for the body, and delete the copy afterwards."""
        if self.mirror is None:
            yield
            return
        self.path.mkdir(parents=True)
        try:
            self.pull()
            yield
        finally:
            shutil.rmtree(self.path, ignore_errors=True)

    def pull(self, directory: Path | None = None) -> None:
        """Bring the copy of a URI up to date: its small files, or all files in `directory`; raises `UserError`."""
        if self.mirror is not None:
            prefix = "" if directory is None else f"{directory.relative_to(self.path).as_posix()}/"
            try:
                self.mirror.pull(lambda name: name.startswith(prefix) if prefix else _is_small(name))
            except OSError as error:
                raise UserError(f"{self.location}: cannot be read ({one_line(error)[:200]})") from None

    def names_in(self, directory: Path) -> set[str]:
        """The names of the files in `directory`, with those at a URI that were not copied here."""
        there = self.mirror.names_there if self.mirror is not None else ()
        prefix = directory.relative_to(self.path).as_posix()
        apart = (name.rpartition("/") for name in there)
        return {file.name for file in directory.glob("*")} | {name for folder, _, name in apart if folder == prefix}

    def push(self, *files: Path) -> None:
        """Copy these files, or everything that has changed, to the URI; raises `OSError`."""
        if self.mirror is not None:
            self.mirror.push([file.relative_to(self.path).as_posix() for file in files] or None)


def copy_path(uri: str, role: str) -> Path:
    """A new directory name for this process's copy of `uri`; deletes the copies of processes that have ended."""
    directory = cache_root() / "copies" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    host = socket.gethostname()
    for other in directory.glob(f"*-{host}-*"):  # machines may share the cache
        pid = other.name.split("-")[-2]
        if pid.isdigit() and not other.name.startswith(UNSENT) and not process_exists(int(pid)):
            shutil.rmtree(other, ignore_errors=True)
    return directory / f"{role}-{host}-{os.getpid()}-{secrets.token_hex(4)}"


def process_exists(pid: int) -> bool:
    """Whether this machine has a process of that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _is_small(name: str) -> bool:
    """Not weights and optimizer states, which only models need, nor events."""
    return not name.endswith(LARGE_FILES) and EVENTS not in name.split("/")
