"""The files of a prepared data set: a description, and shards of images in Arrow IPC.

    DIR/
        dataset.json         shape, splits, names of labels, source, and size and checksum of every other file
        train-00000.arrow    a shard: one record batch of pixels, digests, labels and factors, at most 64 MiB
        train.rows           the same without pixels, of all training images
        sums.npz             for each split the sum of its images
        skipped.jsonl        files that could not be used, and why

`dataset.json` is written last: a directory without it is not a data set. Imports no torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import crc32c
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from vae_ray.data.rows import Columns
from vae_ray.errors import one_line
from vae_ray.storage.records import verify, with_checksum

FORMAT_VERSION = 3
DATASET_FILE = "dataset.json"
SUMS_FILE = "sums.npz"
SKIPPED_FILE = "skipped.jsonl"
RESERVED = ("pixels", "digest")
FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
MAX_DATASET_BYTES = 1 << 28
SPLITS = ("train", "val", "test")


class Table(NamedTuple):
    """Rows of a data set."""

    pixels: NDArray[np.uint8]
    """`(N, C, H, W)`."""
    digests: NDArray[np.int64]
    """`(N,)`: a hash of each image's pixels."""
    columns: Columns

    def select(self, rows: NDArray[Any]) -> Table:
        """Rows by index or mask."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Table(self.pixels[rows], self.digests[rows], columns)

    def with_channels(self, num: int) -> Table:
        """Grey images repeated to `num` channels; others as they are."""
        pixels = self.pixels.repeat(num, axis=1) if self.pixels.shape[1] == 1 != num else self.pixels
        return self._replace(pixels=pixels)


def concatenated(tables: Sequence[Table]) -> Table:
    """All rows, in order."""
    if len(tables) == 1:
        return tables[0]
    columns = {name: np.concatenate([table.columns[name] for table in tables]) for name in tables[0].columns}
    pixels = np.concatenate([table.pixels for table in tables])
    return Table(pixels, np.concatenate([table.digests for table in tables]), columns)


class File(NamedTuple):
    """A file of a data set, as its description has it."""

    name: str
    num_rows: int
    num_bytes: int
    crc32c: str

    @classmethod
    def of(cls, name: str, content: Any, *, num_rows: int = 0) -> File:
        """That of a file's content (bytes or a buffer)."""
        return cls(name, num_rows, memoryview(content).nbytes, f"{crc32c.crc32c(content):08x}")

    def is_intact(self, content: Any) -> bool:
        """Whether `content` is what was written."""
        return File.of(self.name, content, num_rows=self.num_rows) == self


@dataclass(frozen=True)
class Description:
    """The content of `dataset.json`."""

    key: str
    """Hash of all that decides the content: the raw data's fingerprint, and how they are decoded and split."""
    source: str
    """What was prepared, as a user reads it."""
    settings: dict[str, Any]
    """The keys of the experiment's section `data` that decided the pixels."""
    image_shape: tuple[int, int, int]
    shards: dict[str, list[File]]
    """By split."""
    fingerprints: dict[str, str]
    """By split: SHA-256 of the shape and the digests of its images, in order; wherever they were read from."""
    names: dict[str, list[str]]
    """Of the values 0, 1, ... of label columns."""
    others: list[File]
    """The files besides the shards."""
    num_skipped: int = 0
    warnings: list[str] = field(default_factory=list)
    """What a user should know of the images."""
    version: int = FORMAT_VERSION

    def _check(self) -> None:
        """Raise `ValueError` for what no preparation writes; sizes that are claimed must fit into the files."""
        if not all(re.fullmatch(FILE_NAME, file.name) for file in self.files):
            raise ValueError("lists a file in another directory")
        needed = {SUMS_FILE, *(f"{split}.rows" for split in self.shards)}
        if not needed <= {file.name for file in self.others}:
            raise ValueError(f"does not list {', '.join(sorted(needed))}")
        if not {"train", "test"} <= self.shards.keys() <= set(SPLITS) or self.shards.keys() != self.fingerprints.keys():
            raise ValueError("lacks training or test images, or has unknown splits")
        image_bytes = math.prod(self.image_shape)
        shards = [file for files in self.shards.values() for file in files]
        is_whole = all(0 < file.num_rows * image_bytes <= file.num_bytes for file in shards)
        if min(self.image_shape) < 1 or not is_whole or not all(self.shards.values()):
            raise ValueError("images of that shape do not fit into its files")

    @property
    def files(self) -> list[File]:
        """All files that the description lists."""
        return [*(file for files in self.shards.values() for file in files), *self.others]

    def num_images(self, split: str) -> int:
        """Images of a split; 0 where there is none of that name."""
        return sum(file.num_rows for file in self.shards.get(split, ()))

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file.num_bytes for file in self.files)

    def describe(self) -> str:
        """One line: what was prepared, and how many images of what size each split has."""
        channels, height, width = self.image_shape
        kind = {1: "grey", 3: "colour"}.get(channels, f"{channels} channels")
        numbers = ", ".join(f"{self.num_images(split):,} {split}" for split in self.shards)
        return f"{one_line(self.source)}: {height}x{width} {kind}; {numbers}"

    def to_json(self) -> bytes:
        """The file's bytes."""
        return json.dumps(with_checksum({**self.__dict__, "image_shape": list(self.image_shape)}), indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Description:
        """The description in a file's bytes; raises `ValueError` if it is damaged or of another version."""
        try:
            plain = verify(json.loads(content))
        except RecursionError:
            raise ValueError("nests too deeply") from None
        if plain.get("version") != FORMAT_VERSION:
            raise ValueError(f"version {plain.get('version')}, this vae_ray reads {FORMAT_VERSION}")
        try:
            description = TypeAdapter(Description).validate_python(plain)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        description._check()
        return description


def digests_of(images: Iterable[NDArray[np.uint8]]) -> NDArray[np.int64]:
    """A 64-bit BLAKE2b hash of each image `(C, H, W)`; the same for a grey image and its three equal channels."""
    values = []
    for image in images:
        is_grey = image.shape[0] == 3 and (image[0] == image[1]).all() and (image[0] == image[2]).all()
        content = np.ascontiguousarray(image[:1] if is_grey else image)
        digest = hashlib.blake2b(repr(content.shape).encode(), digest_size=8)
        digest.update(content.data)
        values.append(digest.digest())
    return np.frombuffer(b"".join(values), dtype="<i8").astype(np.int64)


def fingerprint_of(image_shape: tuple[int, int, int], digests: NDArray[np.int64]) -> str:
    """That of a split's images."""
    return hashlib.sha256(repr(image_shape).encode() + digests.astype("<i8").tobytes()).hexdigest()


def mixed(digests: NDArray[np.int64], key: int = 0) -> NDArray[np.uint64]:
    """Independent uniform 64-bit integers for each `key` (Steele et al. 2014, SplitMix64's finaliser)."""
    with np.errstate(over="ignore"):
        z = digests.astype(np.uint64) ^ np.uint64(key)
        z = (z + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def is_test(digests: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """Which images belong to the test split where the source has none: a function of each image alone."""
    return mixed(digests) < np.uint64(min(int(fraction * 2**64), 2**64 - 1))


def shard_bytes(table: Table) -> pa.Buffer:
    """The file of a shard: one record batch, so that its pixels are one contiguous tensor in the mapped file."""
    shape = table.pixels.shape[1:]
    values = pa.array(np.ascontiguousarray(table.pixels).reshape(-1))
    rows = pa.FixedSizeListArray.from_arrays(values, int(np.prod(shape)))
    pixels = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), shape), rows)
    return _ipc(pa.table({"pixels": pixels, **_row_columns(table.digests, table.columns)}))


def rows_bytes(digests: NDArray[np.int64], columns: Columns) -> pa.Buffer:
    """The file of a split's rows without their pixels."""
    return _ipc(pa.table(_row_columns(digests, columns)))


def _row_columns(digests: NDArray[np.int64], columns: Columns) -> dict[str, pa.Array]:
    return {"digest": pa.array(digests), **{name: pa.array(values) for name, values in columns.items()}}


def _ipc(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=max(1, len(table)))
    return sink.getvalue()


def read_shard(source: pa.Buffer | pa.NativeFile | bytes) -> Table:
    """The rows of a shard, or of a file without pixels (whose pixels are empty); views of `source`, no copies.

    Raises `ValueError` if the file does not have our schema.
    """
    try:
        table = pa.ipc.open_file(source).read_all()
        table.validate(full=True)
        # Written as one batch, so the only chunk is the whole column. `values` and DLPack do not import
        # pyarrow.compute and pandas, as flatten() and to_numpy() do.
        columns: Columns = {
            name: np.from_dlpack(table[name].chunk(0)) if len(table) else np.empty(0, np.int64)
            for name in table.column_names
            if name != "pixels"
        }
        digests = columns.pop("digest")
        pixels: NDArray[Any] = np.empty((len(table), 0, 0, 0), np.uint8)
        if "pixels" in table.column_names:
            column = table["pixels"].chunk(0)
            pixels = np.from_dlpack(column.storage.values).reshape(-1, *column.type.shape)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or digests.dtype != np.int64 or len(digests) != len(pixels):
            raise ValueError(f"pixels {pixels.dtype} {pixels.shape}, digests {digests.dtype} {digests.shape}")
    except (pa.ArrowException, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from None
    return Table(pixels, digests, columns)


def sums_bytes(sums: Mapping[str, NDArray[np.int64]]) -> bytes:
    """The file of the sums of images by split."""
    buffer = io.BytesIO()
    np.savez(buffer, **dict(sums))  # type: ignore[arg-type]
    return buffer.getvalue()
