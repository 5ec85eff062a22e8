"""Rows of one split in a file of their own: what a part becomes, and how parts are joined to shards. No torch."""

from __future__ import annotations

import io
import itertools
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vae_ray.data.rows import Columns
from vae_ray.data.shards import File, Table, concatenated, mixed, read_shard, shard_bytes
from vae_ray.errors import CorruptFile
from vae_ray.storage.directory import Directory


class Piece(NamedTuple):
    """Rows of one split in a file of their own, and what is known of them without it."""

    file: File
    num_channels: int
    digests: NDArray[np.int64]
    columns: Columns


def write_piece(name: str, table: Table, directory: Directory) -> Piece:
    """Write rows as a shard and, beside it, as `NAME.npz`, all but their pixels, and the sum of these."""
    file = write_file(name, shard_bytes(table).to_pybytes(), directory, num_rows=len(table.digests))
    # a part of large images has few rows: a sum of 64 bits would take more than they do
    total = table.pixels.sum(0, dtype=np.min_scalar_type(255 * len(table.digests)))
    buffer = io.BytesIO()
    columns = {f"column {name}": values for name, values in table.columns.items()}
    np.savez(buffer, digests=table.digests, sum=total, num_channels=len(total), **columns)  # type: ignore[arg-type]
    directory.write(f"{name}.npz", buffer.getvalue())
    return Piece(file, len(total), table.digests, table.columns)


def read_piece(file: File, directory: Directory) -> Piece:
    """What was written beside a file; raises what NumPy raises for one that is damaged."""
    with np.load(io.BytesIO(directory.read(f"{file.name}.npz") or b""), allow_pickle=False) as arrays:
        columns = {name.removeprefix("column "): arrays[name] for name in arrays if name.startswith("column ")}
        return Piece(file, int(arrays["num_channels"]), arrays["digests"], columns)


def sum_of(pieces: list[Piece], shape: tuple[int, int, int], directory: Directory) -> NDArray[np.int64]:
    """The sum of all images `(C, H, W)`; never holds the sums of more than one piece."""
    total = np.zeros(shape, np.int64)
    for piece in pieces:
        content = directory.read(f"{piece.file.name}.npz") or b""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            total += arrays["sum"]
    return total


def _read_table(piece: Piece, directory: Directory) -> Table:
    content = directory.read(piece.file.name) or b""
    if not piece.file.is_intact(content):
        raise CorruptFile(f"{piece.file.name}: is not what was written; delete it and prepare again")
    return read_shard(content)


def write_file(name: str, content: bytes, directory: Directory, *, num_rows: int = 0) -> File:
    """Write a file of the data set."""
    directory.write(name, content)
    return File.of(name, content, num_rows=num_rows)


def is_whole(file: File, directory: Directory) -> bool:
    """Whether a piece of an earlier call has survived, also a power cut."""
    if not file.is_intact(directory.read(file.name) or b""):
        return False
    try:
        return len(read_piece(file, directory).digests) == file.num_rows
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error):
        return False


def fill_empty_split(pieces: dict[str, list[Piece]], directory: Directory, *, key: str) -> None:
    """Give a test or training split that few images have left empty the image that is nearest to it."""
    for empty, other, choose in (("test", "train", np.argmin), ("train", "test", np.argmax)):
        if pieces[empty] or not pieces[other]:
            continue
        nearest = [choose(mixed(piece.digests)) for piece in pieces[other]]
        values = [mixed(piece.digests)[row] for piece, row in zip(pieces[other], nearest, strict=True)]
        number = int(choose(np.array(values)))
        piece = pieces[other].pop(number)
        table, is_moved = _read_table(piece, directory), np.arange(len(piece.digests)) == nearest[number]
        pieces[empty].append(write_piece(f"{empty}-{key[:8]}-moved.arrow", table.select(is_moved), directory))
        if len(piece.digests) > 1:
            rest = write_piece(f"{other}-{key[:8]}-rest.arrow", table.select(~is_moved), directory)
            pieces[other].insert(number, rest)


def join_to_shards(
    split: str, pieces: list[Piece], directory: Directory, *, num_channels: int, most_rows: int
) -> Iterator[File]:
    """Join pieces to shards of at most `most_rows`; a piece that is large enough stays as it is."""
    waiting: list[Piece] = []
    numbers = itertools.count()

    def joined() -> File:
        table = concatenated([_read_table(piece, directory).with_channels(num_channels) for piece in waiting])
        name = f"{split}-{next(numbers):05d}.arrow"
        waiting.clear()
        return write_file(name, shard_bytes(table).to_pybytes(), directory, num_rows=len(table.digests))

    for piece in pieces:
        if waiting and sum(len(each.digests) for each in waiting) + len(piece.digests) > most_rows:
            yield joined()
        if not waiting and piece.num_channels == num_channels and 2 * piece.file.num_rows > most_rows:
            yield piece.file
        else:
            waiting.append(piece)
    if waiting:
        yield joined()
