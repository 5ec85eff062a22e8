"""Records: files of JSON lines that grow as a run or a sweep proceeds, each line with a checksum inside.

The last key of a line is `crc`: the CRC-32, in eight hex digits, of the line's canonical JSON (sorted keys, no spaces)
without that key. Small whole files (`summary.json`, `sweep.yaml`) carry theirs in the same way. It detects
accidents, not intent: the checksum of a changed line can be computed.

vae_ray 0.1.0 wrote no `crc`: content without one is taken as it is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vae_ray.errors import UserError
from vae_ray.storage.atomic import atomic_write
from vae_ray.storage.reading import parse_json, read_bytes, short_repr
from vae_ray.storage.retry import append_whole

logger = logging.getLogger(__name__)

CHECKSUM_KEY = "crc"
CHECKSUM = re.compile("[0-9a-f]{8}")
MAX_FILE_BYTES = 1 << 28


def checksum(content: Mapping[str, Any]) -> str:
    """The CRC-32 of the canonical JSON of `content`."""
    return f"{zlib.crc32(json.dumps(content, sort_keys=True, separators=(',', ':')).encode()):08x}"


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a line or file with its checksum as the last key."""
    return {**content, CHECKSUM_KEY: checksum(content)}


def verify(content: object) -> dict[str, Any]:
    """The content of a line or file without its checksum; raises `ValueError` if it is not what was written."""
    if not isinstance(content, dict):
        raise ValueError("not an object")
    plain = {key: value for key, value in content.items() if key != CHECKSUM_KEY}
    if CHECKSUM_KEY in content:
        is_damaged = content[CHECKSUM_KEY] != checksum(plain)
    else:  # written by 0.1.0, or the key is damaged and its value is still there
        is_damaged = any(isinstance(value, str) and CHECKSUM.fullmatch(value) for value in plain.values())
    if is_damaged:
        raise ValueError("not what was written")
    return plain


def append_records(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append and sync all `records` or, if the storage refuses, none; raises `OSError`.

    A last line that a kill cut short is removed first.
    """
    with contextlib.suppress(FileNotFoundError):
        content = read_bytes(file, max_bytes=MAX_FILE_BYTES)
        if not content.endswith(b"\n"):
            os.truncate(file, content.rfind(b"\n") + 1)
    append_whole(file, _lines(records))


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of a file, oldest first, without their checksums; none if there is no file.

    A last line that a kill cut short is left out. Any other damaged line is left out with a warning. Raises `UserError`
    if the file cannot be read, and `CorruptFile` if it is a directory, a pipe or too large.
    """
    try:
        *lines, rest = read_bytes(file, max_bytes=MAX_FILE_BYTES).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if rest and (not rest.startswith(b"{") or _is_record(rest[:-1])):  # not cut short: its line end is damaged
        lines.append(rest)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(verify(parse_json(line)))
        except ValueError as error:
            logger.warning("%s: line %d is damaged (%s) and left out", file, number, short_repr(str(error)))
    return records


def replace_records(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace all records of a file at once, if they differ; a kill leaves the old ones or the new ones."""
    content = _lines(records)
    if not file.exists() or file.read_bytes() != content:
        atomic_write(file, content)


def _lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(with_checksum(record)).encode() + b"\n" for record in records)


def _is_record(line: bytes) -> bool:
    try:
        return bool(verify(parse_json(line)))
    except ValueError:
        return False
