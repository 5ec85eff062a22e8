"""A local directory and its counterpart in an object store.

An object store has no append, no rename and no lock. So a run whose storage is a URI is written in a directory of
this machine, by the same code as any other, and mirrored: new and changed files are copied up, the manifest of a
checkpoint last, so that one without a manifest is incomplete there too; what was deleted here is deleted there.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pyarrow.fs

from vae_ray.errors import TrainingFailed
from vae_ray.storage.locations import cache_root, open_filesystem

logger = logging.getLogger(__name__)

HEAVY = (".safetensors", ".pt")
EVENTS = "tensorboard"
UNSENT = "unsent-"

COMMIT_FILE = "manifest.json"
"""Copied after, and deleted before, everything else of its directory."""
TRANSFERS = 8
LAST_TRY_SECONDS = 120.0
"""How long the last copy of a run goes on trying to reach its storage."""
LONGEST_WAIT_SECONDS = 15.0
WATCH_SECONDS = 0.5


class FileStat(NamedTuple):
    """What tells that a file has changed."""

    num_bytes: int
    modified_ns: int


def copy_path(uri: str, role: str) -> Path:
    """A directory of this process for its copy of what lies at `uri`; those of dead processes are cleared away."""
    directory = cache_root() / "copies" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    host = socket.gethostname()
    for other in directory.glob(f"*-{host}-*"):  # the cache may be shared by machines: judge only our own
        pid = other.name.split("-")[-2]
        if pid.isdigit() and not other.name.startswith(UNSENT) and not process_lives(int(pid)):
            shutil.rmtree(other, ignore_errors=True)
    return directory / f"{role}-{host}-{os.getpid()}-{secrets.token_hex(4)}"


def process_lives(pid: int) -> bool:
    """Whether a process of that id exists on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def working_copy(mirror: Mirror) -> Iterator[None]:
    """Begin with a copy of what lies at the mirror's URI (without what only models need), and delete it at the end."""
    mirror.directory.mkdir(parents=True)
    try:
        mirror.pull(is_small_file)
        yield
    finally:
        shutil.rmtree(mirror.directory, ignore_errors=True)


def is_small_file(name: str) -> bool:
    """Whether a file is needed to know what a run has come to: not weights and optimizer states, not events."""
    return not name.endswith(HEAVY) and EVENTS not in name.split("/")


class Mirror:
    """Copies between `directory` here and `uri` there. Names are relative, with `/`; hidden ones are not copied."""

    def __init__(self, directory: Path, uri: str, *, key: str = "run.storage") -> None:
        self.directory, self.uri = directory, uri
        self._filesystem, self._path = open_filesystem(uri, key=key)
        self._here: dict[str, FileStat] = {}
        """Of each file that is equal on both sides, the stamp here."""
        self._fetched: set[str] = set()
        self._lock = threading.Lock()
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._seen = threading.Event()
        self._watching: threading.Thread | None = None

    @property
    def filesystem(self) -> pyarrow.fs.FileSystem:
        """pyarrow's, for those who write there themselves."""
        return self._filesystem

    def path_of(self, name: str = "") -> str:
        """The path of `name` in the file system."""
        return f"{self._path}/{name}" if name else self._path

    def listing(self) -> dict[str, FileStat]:
        """All files there."""
        selector = pyarrow.fs.FileSelector(self._path, recursive=True, allow_not_found=True)
        prefix = len(self._path) + 1
        return {
            info.path[prefix:]: FileStat(info.size, info.mtime_ns or 0)
            for info in self._filesystem.get_file_info(selector)
            if info.type == pyarrow.fs.FileType.File and not _is_hidden(info.path[prefix:])
        }

    def pull(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Copy here all files that are `wanted`, exist there and have changed; raises `OSError`."""
        with self._lock:
            there = self.listing()
            changed = [name for name, stamp in there.items() if wanted(name) and not self._has(name, stamp)]
            self._in_parallel(lambda name: self._fetch_file(name, there[name]), changed)
            for name in self._fetched - there.keys():
                (self.directory / name).unlink(missing_ok=True)
                self._fetched.discard(name)
                self._here.pop(name, None)

    def _has(self, name: str, stamp: FileStat) -> bool:
        file = self.directory / name
        return file.exists() and _stamp(file) == stamp

    def _fetch_file(self, name: str, stamp: FileStat) -> None:
        file = self.directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".partial-{file.name}")
        with self._filesystem.open_input_stream(self.path_of(name)) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        os.utime(partial, ns=(stamp.modified_ns, stamp.modified_ns))  # by which `_has` knows it again
        # Checksums beside the file (artifacts/seals.py) are of what this process wrote; they are not kept there.
        file.with_name(f".{file.name}.sums").unlink(missing_ok=True)
        os.replace(partial, file)
        self._fetched.add(name)
        self._here[name] = _stamp(file)

    def push(self, names: Iterable[str] | None = None) -> None:
        """Copy there all files (or just `names`) that are new or changed here, and delete what was deleted.

        Raises `OSError`; what could not be copied is still to be copied.
        """
        with self._lock:
            here = {name: _stamp(self.directory / name) for name in names} if names else self._files_here()
            changed = [name for name, stamp in here.items() if self._here.get(name) != stamp]
            first = [name for name in changed if not name.endswith(COMMIT_FILE)]
            self._in_parallel(lambda name: self._push_file(name, here[name]), first)
            self._in_parallel(lambda name: self._push_file(name, here[name]), [n for n in changed if n not in first])
            if names is None:
                gone = sorted(self._here.keys() - here.keys(), key=lambda name: not name.endswith(COMMIT_FILE))
                for name in gone:
                    self.delete(name)
                    if name.endswith(COMMIT_FILE):  # with what was never fetched of its directory
                        self._delete_directory(name.rpartition("/")[0])

    def _push_file(self, name: str, stamp: FileStat) -> None:
        try:
            source = (self.directory / name).open("rb")
        except FileNotFoundError:  # deleted meanwhile: a checkpoint that is no longer kept
            return
        with source, self._output(name) as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        self._here[name] = stamp

    def _output(self, name: str) -> pyarrow.NativeFile:
        path = self.path_of(name)
        try:
            return self._filesystem.open_output_stream(path)
        except FileNotFoundError:  # unlike an object store, this one has directories
            self._filesystem.create_dir(path.rpartition("/")[0])
            return self._filesystem.open_output_stream(path)

    def delete(self, name: str) -> None:
        """Delete one file there; no error if there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(self.path_of(name))
        self._here.pop(name, None)
        self._fetched.discard(name)

    def delete_incomplete(self, parent: str) -> None:
        """Delete the directories in `parent` there that a killed writer began but did not complete."""
        names = [name for name in self.listing() if name.startswith(f"{parent}/")]
        directories = {name.rpartition("/")[0] for name in names}
        for directory in directories - {name.rpartition("/")[0] for name in names if name.endswith(f"/{COMMIT_FILE}")}:
            self._delete_directory(directory)

    def _delete_directory(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_dir(self.path_of(name))

    def write(self, name: str, content: bytes) -> None:
        """Write one file there, without a copy here."""
        with self._output(name) as stream:
            stream.write(content)

    def read(self, name: str) -> bytes | None:
        """One file from there; None if there is none."""
        try:
            with self._filesystem.open_input_stream(self.path_of(name)) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def seen_remotely(self, name: str) -> bool:
        """Whether there is a file of that name there, as a thread of the mirror's own saw it last; never waits."""
        if self._watching is None:
            self._watching = threading.Thread(target=self._watch, args=(name,), name="mirror watch", daemon=True)
            self._watching.start()
        return self._seen.is_set()

    def _watch(self, name: str) -> None:
        while not self._closing.wait(WATCH_SECONDS) and not self._seen.is_set():
            with contextlib.suppress(OSError):  # it is asked again
                if self.read(name) is not None:
                    self._seen.set()

    def _files_here(self) -> dict[str, FileStat]:
        found: dict[str, FileStat] = {}
        for folder, folders, files in os.walk(self.directory):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for file in files:
                path = Path(folder, file)
                name = path.relative_to(self.directory).as_posix()
                try:
                    found |= {} if _is_hidden(name) else {name: _stamp(path)}
                except FileNotFoundError:  # deleted meanwhile
                    continue
        return found

    def _in_parallel(self, copy: Callable[[str], None], names: list[str]) -> None:
        if names:
            with ThreadPoolExecutor(min(TRANSFERS, len(names))) as pool:
                list(pool.map(copy, names))

    def push_soon(self) -> None:
        """Have everything copied by a thread of the mirror's own: training does not wait for the network."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._push_when_woken, name="mirror", daemon=True)
            self._thread.start()
        self._wake.set()

    def _push_when_woken(self) -> None:
        wait_seconds = 1.0
        while not self._closing.is_set():
            self._wake.wait()
            self._wake.clear()
            if self._closing.is_set():
                return
            try:
                self.push()
                wait_seconds = 1.0
            except OSError as error:
                logger.warning(
                    "%s: cannot be written now (%s); training goes on, trying again in %.0f s",
                    self.uri,
                    " ".join(str(error).split())[:200],
                    wait_seconds,
                )
                self._closing.wait(wait_seconds)
                wait_seconds = min(2 * wait_seconds, LONGEST_WAIT_SECONDS)
                self._wake.set()

    def close(self) -> None:
        """Copy what is still to be copied, trying for two minutes; raises `TrainingFailed` where that is in vain."""
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        deadline, wait_seconds = time.monotonic() + LAST_TRY_SECONDS, 1.0
        while True:
            try:
                return self.push()
            except OSError as error:
                reason = " ".join(str(error).split())[:200]
                if time.monotonic() > deadline:
                    kept = self.directory.rename(self.directory.with_name(f"{UNSENT}{self.directory.name}"))
                    raise TrainingFailed(
                        f"{self.uri}: could not be written for {LAST_TRY_SECONDS:.0f} s ({reason}); the run's files "
                        f"are complete in {kept} of {socket.gethostname()}"
                    ) from None
                logger.warning("%s: cannot be written now (%s); trying again", self.uri, reason)
                time.sleep(wait_seconds)
                wait_seconds = min(2 * wait_seconds, LONGEST_WAIT_SECONDS)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _stamp(file: Path) -> FileStat:
    status = file.stat()
    return FileStat(status.st_size, status.st_mtime_ns)
