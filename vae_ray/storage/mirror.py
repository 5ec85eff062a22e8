"""A local directory and its counterpart at a URI.

A run whose storage is a URI is written in a directory of this machine, by the same code as any other, and mirrored: new
and changed files are copied up, the manifest of a checkpoint last, so that one without a manifest is incomplete there
too; what was deleted here is deleted there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vae_ray.storage.remote import FileStat, RemoteDirectory

COMMIT_FILE = "manifest.json"
"""Copied after, and deleted before, everything else of its directory."""
NUM_TRANSFERS = 8


class Mirror:
    """Copies files between `directory` and `remote`. Hidden files are not copied. All methods raise `OSError`."""

    def __init__(self, directory: Path, remote: RemoteDirectory) -> None:
        self.directory, self.remote = directory, remote
        self._equal: dict[str, FileStat] = {}
        """The local state of each file that was equal on both sides."""
        self.names_there: frozenset[str] = frozenset()
        """All files at `remote` at the last pull, also those that were not wanted."""
        self._lock = threading.Lock()

    def pull(self, is_wanted: Callable[[str], bool]) -> None:
        """Copy here the wanted files that have changed there, and delete here what was deleted there."""
        with self._lock:
            there = {name: stat for name, stat in self.remote.list().items() if not _is_hidden(name)}
            self.names_there = frozenset(there)

            def is_current(name: str) -> bool:
                file = self.directory / name
                return file.exists() and FileStat.of(file) == there[name]

            def download(name: str) -> None:
                file = self.directory / name
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_name(f".partial-{file.name}")
                self.remote.download(name, partial)
                os.utime(partial, ns=(there[name].modified_ns,) * 2)  # the next pull compares it
                os.replace(partial, file)
                self._equal[name] = FileStat.of(file)

            _in_parallel(download, [name for name in there if is_wanted(name) and not is_current(name)])
            for name in self._equal.keys() - there.keys():
                (self.directory / name).unlink(missing_ok=True)
                del self._equal[name]

    def push(self, names: Iterable[str] | None = None) -> None:
        """Copy there the files that have changed here, or just those named, and delete there what was deleted here.

        A file that could not be copied is copied by the next push.
        """
        with self._lock:
            here = self._files_here() if names is None else {n: FileStat.of(self.directory / n) for n in names}

            def upload(name: str) -> None:
                try:
                    with (self.directory / name).open("rb") as content:
                        self.remote.write(name, content)
                    self._equal[name] = here[name]
                except FileNotFoundError:  # deleted meanwhile: a checkpoint that is no longer kept
                    if (self.directory / name).exists():
                        raise

            changed = [name for name, stat in here.items() if self._equal.get(name) != stat]
            _in_parallel(upload, [name for name in changed if not name.endswith(COMMIT_FILE)])
            _in_parallel(upload, [name for name in changed if name.endswith(COMMIT_FILE)])
            deleted = self._equal.keys() - here.keys() if names is None else ()
            for name in sorted(deleted, key=lambda name: not name.endswith(COMMIT_FILE)):
                self.remote.delete(name)
                if name.endswith(COMMIT_FILE):  # with the files of its directory that were never pulled
                    self.remote.delete_directory(name.rpartition("/")[0])
                del self._equal[name]

    def delete_incomplete(self, parent: str) -> None:
        """Delete the directories in `parent` there that a killed writer did not complete."""
        files = [name.rpartition("/") for name in self.remote.list() if name.startswith(f"{parent}/")]
        complete = {directory for directory, _, file in files if file == COMMIT_FILE}
        for directory in {directory for directory, _, _ in files} - complete:
            self.remote.delete_directory(directory)

    def _files_here(self) -> dict[str, FileStat]:
        stats = {}
        for folder, folders, files in os.walk(self.directory):
            folders[:] = [name for name in folders if not _is_hidden(name)]
            for file in (Path(folder, name) for name in files if not _is_hidden(name)):
                try:
                    stats[file.relative_to(self.directory).as_posix()] = FileStat.of(file)
                except FileNotFoundError:  # deleted meanwhile
                    continue
        return stats


def _in_parallel(copy: Callable[[str], None], names: list[str]) -> None:
    with ThreadPoolExecutor(NUM_TRANSFERS) as pool:
        list(pool.map(copy, names))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
