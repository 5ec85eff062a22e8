"""Warnings of a process whose standard error is not shown, written to the run's directory for the driver to show."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vae_ray.errors import CorruptFile
from vae_ray.storage.records import append_records

PACKAGE = logging.getLogger("vae_ray")


@contextlib.contextmanager
def warning_log(file: Path) -> Iterator[None]:
    """Write this package's warnings in the body to `file` too, one record each.

    A warning that the storage does not take is written with the next one, or at the end.
    """
    handler = _RecordHandler(file)
    PACKAGE.addHandler(handler)
    try:
        yield
    finally:
        PACKAGE.removeHandler(handler)
        handler.flush()


class _RecordHandler(logging.Handler):
    def __init__(self, file: Path) -> None:
        super().__init__(logging.WARNING)
        self._file = file
        self._pending: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._pending.append({"at": record.created, "warning": record.getMessage()})
        self.flush()

    def flush(self) -> None:
        with contextlib.suppress(OSError, CorruptFile):  # a warning of it would come back here
            if self._pending:
                append_records(self._file, self._pending)
                self._pending = []
