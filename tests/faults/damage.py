"""What can happen to a file: cut, flipped, emptied, grown, gone, or something else in its place."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.conftest import FORM

Damage = tuple[str, Callable[[Path], None]]


def _changed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        content = change(file.read_bytes())
        file.unlink()  # a new inode: what this process has mapped stays as it is
        file.write_bytes(content)

    return damage


def _replaced(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


def _flipped(position: int, bit: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        position_inside = position % len(content)
        flipped = bytes([content[position_inside] ^ (1 << bit)])
        return content[:position_inside] + flipped + content[position_inside + 1 :]

    return change


def _link_to_copy(file: Path) -> None:
    elsewhere = file.with_name(f".elsewhere-{file.name}")
    elsewhere.write_bytes(b"x" * 100)
    file.symlink_to(elsewhere)


def damages(content: bytes, *, seed: int, num_cuts: int, num_flips: int) -> Iterator[Damage]:
    """Named damages of a file with that content: cuts and flips spread over it, and one of each other kind."""
    if FORM == "short":
        num_cuts, num_flips = num_cuts // 4, num_flips // 4
    chance, size = random.Random(seed), len(content)
    yield from (
        (f"cut at {length} of {size}", _changed(lambda content, length=length: content[:length]))  # type: ignore[misc]
        for length in sorted({1, size // 2, size - 1, *(chance.randrange(1, size) for _ in range(num_cuts))})
    )
    for position in sorted({0, size - 1, *(chance.randrange(size) for _ in range(num_flips))}):
        bit = chance.randrange(8)
        yield f"bit {bit} of byte {position} of {size} flipped", _changed(_flipped(position, bit))
    yield "empty", _changed(lambda content: b"")
    yield "garbage behind it", _changed(lambda content: content + b"\0garbage\xff")
    yield "zeros", _changed(lambda content: bytes(len(content)))
    yield "gone", Path.unlink
    yield "a directory", _replaced(Path.mkdir)
    yield "a pipe", _replaced(lambda file: os.mkfifo(file))
    yield "a device", _replaced(lambda file: file.symlink_to("/dev/zero"))
    yield "a link to something else", _replaced(_link_to_copy)


def fresh_copy(source: Path, target: Path) -> Path:
    """A copy of a directory, in place of an earlier one."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target, symlinks=True))
