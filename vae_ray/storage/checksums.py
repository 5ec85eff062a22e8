"""Checksums of what we wrote, in a hidden file beside each text file that is read back.

The files themselves stay plain JSON lines and YAML that anyone can read. A checksum is added before its content is
written and outlives it: a kill in between leaves one too many, never one too few. A file without this neighbour was
written by someone else, and is taken as it stands.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from vae_ray.errors import CorruptFile, UserError
from vae_ray.storage.atomic import atomic_write
from vae_ray.storage.reading import parse_json, read_bytes, shown
from vae_ray.storage.retry import append_whole

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 28
"""Of a file that grows line by line."""
MOST_LINE_BYTES = 1 << 20


def seals_of(file: Path) -> Path:
    """The hidden neighbour that holds the checksums of `file`."""
    return file.with_name(f".{file.name}.sums")


def checksum(content: bytes) -> str:
    """64 bits of SHA-256: against accidents, not against people, who could change both files."""
    return hashlib.sha256(content).hexdigest()[:16]


def remember(file: Path, contents: Iterable[bytes]) -> None:
    """Note the checksums of what is about to be written to `file`."""
    # a kill can cut the last line of earlier ones short; an empty line is none
    append_whole(seals_of(file), "".join(["\n", *(checksum(content) + "\n" for content in contents)]).encode())


def remembered(file: Path) -> frozenset[str] | None:
    """The checksums of `file`; None if there are none. Raises `OSError` as reading does, and `CorruptFile`."""
    try:
        return frozenset(read_bytes(seals_of(file), most_bytes=MOST_BYTES).decode("ascii", "replace").split())
    except FileNotFoundError:
        return None


def replace_sealed(file: Path, content: bytes) -> None:
    """Replace a small file whole, so that a reader finds the old or the new content, each with its checksum."""
    remember(file, [content])
    atomic_write(file, content)
    atomic_write(seals_of(file), (checksum(content) + "\n").encode())


def read_sealed(file: Path) -> bytes:
    """The content of a small file; raises `CorruptFile` if it is not what was written, and `OSError`."""
    content, known = read_bytes(file), remembered(file)
    if known is not None and checksum(content) not in known:
        raise CorruptFile(f"{file}: damaged, its content is not what was written")
    return content


def append_sealed(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Add JSON lines so that they survive a kill and a power cut; one that a kill cut short before stays alone.

    All of them or, where the storage does not take them, none; then `OSError`.
    """
    contents = [json.dumps(line).encode() for line in lines]
    with file.open("a+b") as stream:
        torn = _torn_end(stream)
    taken = [] if seals_of(file).exists() else file.read_bytes().split(b"\n")  # it came without: as it stands
    remember(file, [*taken, *torn, *contents])
    append_whole(file, b"".join(b"\n" for _ in torn) + b"".join(content + b"\n" for content in contents))


def _torn_end(stream: BinaryIO) -> list[bytes]:
    """What stands after the last line's end, if anything does."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - MOST_LINE_BYTES))
    end = stream.read().rpartition(b"\n")[2]
    return [end] if end else []


def sealed_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file that grows line by line; raises `CorruptFile` if it is no file.

    A line cut short by a kill is not one. Any other that is not what was written is left out with a warning.
    """
    try:
        content, known = read_bytes(file, most_bytes=MOST_BYTES), remembered(file)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    lines, found = content.split(b"\n"), []
    for number, line in enumerate(lines, start=1):
        is_known = known is None or checksum(line) in known
        is_torn = number == len(lines) and line.startswith(b"{") and (known is None or checksum(line[:-1]) not in known)
        try:
            entry, reason = parse_json(line), "not what was written"
        except ValueError as error:
            entry, reason = None, shown(str(error))
        if is_known and isinstance(entry, dict):
            found.append(entry)
        elif line and not (entry is None and (is_torn or (known is not None and is_known))):
            logger.warning("%s: line %d is damaged (%s) and left out", file, number, reason)
    return found


def replace_lines(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Replace a file of JSON lines whole."""
    contents = [json.dumps(line).encode() for line in lines]
    remember(file, contents)
    atomic_write(file, b"".join(content + b"\n" for content in contents))
    atomic_write(seals_of(file), "".join(checksum(content) + "\n" for content in contents).encode())
