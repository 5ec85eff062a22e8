"""Writing files so that a kill or a power cut leaves the old content or the new, never a part."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


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


def sync_directory(directory: Path) -> None:
    """Make renames inside `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_remove_directory(directory: Path) -> None:
    """Delete a directory, if it is there, so that a kill never leaves a part of it under its name."""
    doomed = unused_name(directory.with_name(f".partial-removed-{directory.name}"))
    try:
        os.replace(directory, doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def unused_name(path: Path) -> Path:
    """`path`, or `path` with the first number behind it that is free."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
