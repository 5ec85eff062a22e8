"""TensorBoard events, written by the thread that trains and only on `flush`.

tensorboardX's own writer works in a thread, which dies of a full disk and then lets its caller wait for ever.
"""

from __future__ import annotations

import socket
import struct
import time
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import hparams

from vae_ray.storage.retry import append_whole


class EventFile:
    """One file of events in `directory`; events of `purge_step` and later in older files are no longer shown."""

    def __init__(self, directory: Path, *, purge_step: int | None = None) -> None:
        # microseconds: TensorBoard reads files in the order of their names
        self._file = directory / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._waiting: list[bytes] = []
        self._pictures: list[bytes] = []
        self._add(Event(file_version="brain.Event:2", step=purge_step or 0))
        if purge_step is not None:
            self._add(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self._add(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])))

    def add_png(self, tag: str, content: bytes, *, width: int, height: int, channels: int, step: int) -> None:
        """A picture that is compressed already."""
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=content)
        event = Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, image=image)]))
        self._pictures.append(_record(event))

    def add_hparams(self, values: dict[str, Any], metrics: dict[str, float]) -> None:
        """A row of the HPARAMS page."""
        for summary in hparams(values, metrics):
            self._add(Event(summary=summary))
        for tag, value in metrics.items():
            self.add_scalar(tag, value, 0)

    def flush(self) -> None:
        """Write what has been added; raises `OSError`. Scalars that could not be written wait for the next time."""
        waiting, pictures = self._waiting, self._pictures
        self._pictures = []  # too large to wait
        self._file.parent.mkdir(exist_ok=True)
        append_whole(self._file, b"".join([*waiting, *pictures]))
        self._waiting = []

    def _add(self, event: Any) -> None:
        self._waiting.append(_record(event))


def _record(event: Any) -> bytes:
    """The event as a record of TensorFlow's format: length, its checksum, content, its checksum."""
    event.wall_time = time.time()
    content: bytes = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    return b"".join(
        [length, struct.pack("<I", masked_crc32c(length)), content, struct.pack("<I", masked_crc32c(content))]
    )
