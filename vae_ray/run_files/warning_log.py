"""Warnings of a process whose standard error nobody reads, left in the run's directory for the driver to show."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from vae_ray.storage.retry import append_whole

PACKAGE = logging.getLogger("vae_ray")


@contextlib.contextmanager
def warning_log(file: Path) -> Iterator[None]:
    """In its body write what this package warns of to `file` too, one JSON object each.

    What the storage does not take now is written with the next warning, or at the end.
    """
    handler = _Keep(file)
    PACKAGE.addHandler(handler)
    try:
        yield
    finally:
        PACKAGE.removeHandler(handler)
        handler.flush()


class _Keep(logging.Handler):
    def __init__(self, file: Path) -> None:
        super().__init__(logging.WARNING)
        self._file, self._unwritten = file, list[bytes]()

    def emit(self, record: logging.LogRecord) -> None:
        line = {"at": record.created, "warning": record.getMessage()}
        self._unwritten.append(json.dumps(line).encode() + b"\n")
        self.flush()

    def flush(self) -> None:
        with contextlib.suppress(OSError):  # it would warn of its own warnings
            if self._unwritten:
                append_whole(self._file, b"".join(self._unwritten))
                self._unwritten = []
