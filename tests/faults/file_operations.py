"""Processes that end with a real SIGKILL at their n-th file operation, forked from one that has torch imported.

Every operation that changes something below a directory is counted: files opened for writing, the bytes that reach
them, fsync, rename, exchange of two names, mkdir, unlink, rmdir. The n-th is not done at all, or (`torn`) a write is
done by half and everything else whole, before the process dies.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vae_ray.storage import atomic

# What costs a second when it is first done in a process: here it is done once, in the fork server.
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], fused=True)
torch.set_num_threads(1)

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "tests.faults.file_operations",
        "vae_ray.runs.train",
        "tensorboardX",
        "sklearn.datasets",
        "PIL.ImageFont",
        "pyarrow.ipc",
    ]
)
TIMEOUT_SECONDS = 120


class Ended(NamedTuple):
    """How a process ended, and what it had done below the watched directory."""

    exit_code: int
    operations: list[tuple[str, str]]
    """Name and path of each operation, the last one perhaps undone."""


def run(
    work: Callable[..., Any], *args: Any, below: Path, trace: Path, kill_at: int | None = None, torn: bool = False
) -> Ended:
    """Call `work(*args)` in a process of its own that dies at operation number `kill_at` (from 0) below `below`."""
    trace.unlink(missing_ok=True)
    process = SERVER.Process(target=_watched, args=(work, args, str(below), str(trace), kill_at, torn))
    process.start()
    process.join(TIMEOUT_SECONDS)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"did not end in {TIMEOUT_SECONDS} s")
    operations = [(name, path) for name, path in json.loads(trace.read_text())] if trace.exists() else []
    return Ended(process.exitcode, operations)


def _watched(
    work: Callable[..., Any], args: tuple[Any, ...], below: str, trace: str, kill_at: int | None, torn: bool
) -> None:
    watch = _Watch(below, trace, kill_at, torn)
    watch.install()
    try:
        work(*args)
    finally:
        watch.save()


class _Watch:
    def __init__(self, below: str, trace: str, kill_at: int | None, torn: bool) -> None:
        self.below, self.trace, self.kill_at, self.torn = os.path.realpath(below), trace, kill_at, torn
        self.operations: list[tuple[str, str]] = []
        self.open, self.fsync, self.close = os.open, os.fsync, os.close

    def save(self) -> None:
        descriptor = self.open(self.trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, json.dumps(self.operations).encode())
        self.close(descriptor)

    def did(self, name: str, path: str, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        path = os.path.abspath(path)
        if not path.startswith(self.below + os.sep):
            return act()
        self.operations.append((name, path))
        if len(self.operations) - 1 == self.kill_at:
            if self.torn:
                with contextlib.suppress(OSError):
                    (half or act)()
            self.save()
            os.kill(os.getpid(), signal.SIGKILL)
        return act()

    def install(self) -> None:
        """Put the watch around whatever changes files; threads that write are counted too."""
        for name in ("mkdir", "unlink", "remove", "rmdir", "replace", "rename"):
            setattr(os, name, self._around(name, getattr(os, name)))
        exchange = atomic._exchange
        atomic._exchange = lambda new, directory: self.did(
            "exchange", str(directory), functools.partial(exchange, new, directory)
        )
        os.fsync = self._fsync  # type: ignore[assignment]
        builtins.open = io.open = self._open  # type: ignore[assignment]
        try:
            import pyarrow

            pyarrow.OSFile = lambda path, mode: pyarrow.PythonFile(self._open(path, mode), mode=mode[0])
        except ImportError:
            pass

    def _around(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def watched(path: Any, *args: Any, **kwargs: Any) -> Any:
            folder = kwargs.get("dir_fd")
            at = os.fspath(path) if folder is None else f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}"
            act = functools.partial(original, path, *args, **kwargs)
            return self.did(name, str(args[0]) if name in ("replace", "rename") else str(at), act)

        return watched

    def _fsync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        self.did("fsync", os.readlink(f"/proc/self/fd/{number}"), lambda: self.fsync(number))

    def _open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        changes = any(letter in mode for letter in "wax+")
        if isinstance(file, int) or not changes or not os.path.abspath(os.fspath(file)).startswith(self.below):
            return ORIGINAL_OPEN(file, mode, *args, **kwargs)
        path, plain = os.fspath(file), mode.replace("b", "").replace("t", "")
        raw = self.did("open", path, lambda: _Raw(self, path, plain))
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding=kwargs.get("encoding", "utf-8"), newline=kwargs.get("newline"))


ORIGINAL_OPEN = open


class _Raw(io.FileIO):
    """A file whose writes are operations."""

    def __init__(self, watch: _Watch, path: str, mode: str) -> None:
        super().__init__(path, mode)
        self._watch, self._path = watch, path

    def write(self, content: Any) -> int:
        content = bytes(content)
        write = super().write
        written = self._watch.did(
            "write", self._path, lambda: write(content), lambda: write(content[: len(content) // 2])
        )
        return int(written)
