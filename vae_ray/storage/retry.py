"""Writing to a storage that may be full, or away for a while."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vae_ray.errors import one_line

logger = logging.getLogger(__name__)

T = TypeVar("T")

FULL = {errno.ENOSPC, errno.EDQUOT}
AWAY = {
    *(errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET, errno.ECONNABORTED, errno.EAGAIN, errno.EBUSY),
}
"""Errors of a network file system whose server is away; ENOENT is a mount point without its file system."""
PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, *[8.0] * 7)
"""Between attempts; together somewhat more than a minute."""


def is_away(error: OSError) -> bool:
    """Whether the storage may come back."""
    return error.errno in AWAY


def retry_io(action: Callable[[], T], *, where: Path | str, is_transient: Callable[[OSError], bool] = is_away) -> T:
    """The result of `action`, retried with growing pauses after transient errors; raises the last `OSError`."""
    for number, pause in enumerate(PAUSES_SECONDS):
        try:
            return action()
        except OSError as error:
            if not is_transient(error):
                raise
            if number == 0:
                why, seconds = describe_os_error(error), sum(PAUSES_SECONDS)
                logger.warning("%s: the storage is away (%s); trying again for %d s", where, why, seconds)
        time.sleep(pause)
    return action()


def append_whole(file: Path, content: bytes) -> None:
    """Append and sync all of `content` or, where that is not possible, nothing; raises `OSError`.

    Creates the file but not its directory: that would write beside a file system that is away.
    """
    with file.open("ab", buffering=0) as stream:
        size, rest = stream.seek(0, os.SEEK_END), memoryview(content)
        try:
            while rest:  # a disk that is nearly full takes a part
                rest = rest[stream.write(rest) :]
            os.fsync(stream.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                stream.truncate(size)
            raise


def describe_os_error(error: OSError, *, where: Path | None = None, needed_bytes: int | None = None) -> str:
    """Why a file could not be written; with the bytes needed and free if the disk is full."""
    text = error.strerror or one_line(error)[:200]
    if error.errno in FULL and where is not None and needed_bytes is not None:
        with contextlib.suppress(OSError):
            text += f": {needed_bytes:,} bytes needed, {shutil.disk_usage(where).free:,} free"
    return text
