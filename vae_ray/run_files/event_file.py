"""TensorBoard events, written by the thread that trains and only on `flush`.

tensorboardX's own writer works in a thread, which dies of a full disk and then lets its caller wait indefinitely.
"""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL.Image import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import hparams

from vae_ray.storage.retry import append_whole

NAME = re.compile(r"events\.out\.tfevents\.(\d{1,10})\.(\d{6})\..*")


class EventFile:
    """A new file of events in `directory`, read after the files of the names `earlier`.

    It hides the events of `purge_step` and later in these.
    """

    def __init__(self, directory: Path, *, earlier: Iterable[str], purge_step: int | None = None) -> None:
        self._file = directory / _name_after(earlier)
        self._unwritten: list[bytes] = []
        self._pictures: list[bytes] = []
        self._add(Event(file_version="brain.Event:2", step=purge_step or 0))
        if purge_step is not None:
            self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Add one point of a curve."""
        self._add(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])))

    def add_png(self, tag: str, picture: Image, content: bytes, step: int) -> None:
        """Add a picture whose PNG file is `content`."""
        image = Summary.Image(
            height=picture.height,
            width=picture.width,
            colorspace=len(picture.getbands()),
            encoded_image_string=content,
        )
        self._pictures.append(_record(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))))

    def add_hparams(self, values: dict[str, Any], metrics: dict[str, float]) -> None:
        """Add a row of the HPARAMS page."""
        for summary in hparams(values, metrics):
            self._add(Event(summary=summary))
        for tag, value in metrics.items():
            self.add_scalar(tag, value, 0)

    def flush(self) -> None:
        """Write what has been added; raises `OSError`. Scalars that could not be written are kept for the next time."""
        pictures, self._pictures = self._pictures, []  # too large to keep
        self._file.parent.mkdir(exist_ok=True)
        append_whole(self._file, b"".join([*self._unwritten, *pictures]))
        self._unwritten = []

    def _add(self, event: Any) -> None:
        self._unwritten.append(_record(event))


def _name_after(earlier: Iterable[str]) -> str:
    """The name of a new file: TensorBoard reads files in the order of the times in their names.

    Where the clock has been set back, it is a microsecond later than the last of the names `earlier`.
    """
    times = [int(match[1]) * 1_000_000 + int(match[2]) for name in earlier if (match := NAME.fullmatch(name))]
    seconds, microseconds = divmod(max([time.time_ns() // 1000, *(last + 1 for last in times)]), 1_000_000)
    return f"events.out.tfevents.{seconds}.{microseconds:06d}.{socket.gethostname()}"


def _record(event: Any) -> bytes:
    """The event as a record of TensorFlow's format: length, its checksum, content, its checksum."""
    event.wall_time = time.time()
    content: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (length, content))
