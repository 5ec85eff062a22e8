"""Writing files so that a kill or a power cut leaves the old content or the new, never a part."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Arguments of Linux's renameat2."""


def write_synced(file: Path, content: bytes) -> None:
    """Write and sync a file: when this returns, a power cut does not lose it."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def atomic_write(file: Path, content: bytes) -> None:
    """Like `write_synced`, but a reader sees either the old or the new content, never a part."""
    partial = file.with_name(f".partial-{file.name}")
    write_synced(partial, content)
    os.replace(partial, file)


def sync_directory(path: Path) -> None:
    """Make renames inside a directory, or the content of a file, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_directory(new: Path, directory: Path) -> None:
    """Rename `new`, which is synced, to its neighbour `directory`, which may exist; the old content is deleted.

    Where the file system cannot exchange two names (NFS), `directory` is missing for a moment.
    """
    if os.path.lexists(directory) and _exchange(new, directory):
        sync_directory(directory.parent)
        shutil.rmtree(new, ignore_errors=True)
        return
    atomic_remove_directory(directory)
    os.replace(new, directory)
    sync_directory(directory.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two files or directories; False where that is not supported."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def atomic_remove_directory(directory: Path) -> None:
    """Delete a directory, if it exists, so that a kill never leaves a part of it under its name."""
    aside = unused_name(directory.with_name(f".partial-removed-{directory.name}"))
    try:
        os.replace(directory, aside)
    except FileNotFoundError:
        return
    shutil.rmtree(aside, ignore_errors=True)


def unused_name(path: Path) -> Path:
    """`path`, or `path` with the smallest number appended that makes it unused."""
    number, candidate = 1, path
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
