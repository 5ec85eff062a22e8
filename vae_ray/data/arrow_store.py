"""The decoded images of a data set: one Arrow IPC file per split, memory-mapped and shared by all processes.

Between a source and the batches. The first process on a node decodes, under a lock; the file is written under another
name and renamed when it is complete. In a file beside it are its SHA-256, checked whenever it is opened, and a
fingerprint of the images.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vae_ray.config.sections import DataConfig, MnistData, UserData
from vae_ray.data.sources import Images, Source, build_source
from vae_ray.errors import CorruptFile, UserError, one_line
from vae_ray.storage.locations import cache_root, is_uri, local_path
from vae_ray.storage.reading import parse_json, read_bytes
from vae_ray.storage.records import verify, with_checksum

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
LOCK_TIMEOUT_SECONDS = 1800.0


class Split(NamedTuple):
    """Images of one split, in memory that all processes of the node share; read only."""

    pixels: Tensor
    """uint8 `(N, C, H, W)`."""
    labels: Tensor
    """int64 `(N,)`."""
    fingerprint: str
    """SHA-256 of the images: of their shape and bytes, wherever they were read from; without the labels."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return self.pixels.shape[0]


def cache_directory(config: DataConfig | UserData) -> Path:
    """Where decoded images lie: `data.cache_dir`, else `$VAE_RAY_CACHE`, else `~/.cache/vae_ray`."""
    return local_path(config.cache_dir, key="data.cache_dir") if config.cache_dir else cache_root()


def open_split(config: DataConfig | UserData, split: str) -> Split:
    """The images of "train" or "test", decoded first if this node has not done so yet.

    Raises `UserError` if raw files are missing and cannot be downloaded, are damaged, or if the cache
    cannot be written. A corrupt cache file is named in a warning and decoded again.
    """
    cache = cache_directory(config)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        name = file_name(config)
        with filelock.FileLock(cache / f"{name}.lock", timeout=LOCK_TIMEOUT_SECONDS):
            source = build_source(config, raw_directory(config, cache))
            fingerprint = f"v{FORMAT_VERSION};{source.fingerprint()}"
            digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
            file = cache / f"{name}-{split}-{digest}.arrow"
            known = _fingerprint_if_intact(file)
            opened = _map(file, known) if known is not None else None
            if opened is None:
                opened = _map(file, _write(file, _decode(source, split)))
    except filelock.Timeout as error:
        raise UserError(f"{error.lock_file}: another process held it for {LOCK_TIMEOUT_SECONDS:.0f} s") from None
    except OSError as error:
        raise UserError(f"data.cache_dir {cache}: cannot be used ({error}); try --data.cache-dir DIR") from None
    if opened is None:
        raise UserError(f"{file}: cannot be read back as it was just written; try --data.cache-dir DIR")
    return opened


def file_name(config: DataConfig | UserData) -> str:
    """The source's name as a part of a file's name."""
    return re.sub(r"[^\w.-]", "-", config.source)  # type: ignore[union-attr]


def raw_directory(config: DataConfig | UserData, cache: Path) -> Path:
    """Where this node has the raw files: `data.root`, its copy where that is a URI, or `datasets/` in the cache."""
    root = config.root if isinstance(config, MnistData) else None
    if root is None:
        return cache / "datasets"
    if is_uri(root):
        return cache / "datasets" / hashlib.sha256(root.encode()).hexdigest()[:16]
    return local_path(root, key="data.root")


def _decode(source: Source, split: str) -> Images:
    try:
        return source.decode(split)
    except OSError as error:
        raise UserError(f"raw data: cannot be read ({error}); try --data.root DIR") from None


def _sidecar(file: Path) -> Path:
    return file.with_suffix(".json")


def _fingerprint_if_intact(file: Path) -> str | None:
    """The fingerprint of the images in a file that is what was written; None if it is not, with a warning."""
    if not file.exists():
        return None
    if not file.is_file():
        raise UserError(f"{file}: is a directory, a pipe or a device where the decoded images belong; remove it")
    try:
        sidecar = verify(parse_json(read_bytes(_sidecar(file))))
        expected, fingerprint = sidecar["sha256"], str(sidecar["images"])
    except (OSError, ValueError, KeyError, TypeError, CorruptFile):
        expected = fingerprint = "a readable " + _sidecar(file).name
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != expected:
        logger.warning("%s: damaged (sha256 expected %s, found %s); decoding it again", file, expected, digest)
        return None
    return fingerprint


def _write(file: Path, images: Images) -> str:
    """Write decoded images and, beside them, the checksums; returns the fingerprint of the images."""
    for leftover in file.parent.glob(f"{file.stem}.partial-*"):  # of killed processes; this one holds the lock
        leftover.unlink()
    shape = images.pixels.shape[1:]
    rows = pa.FixedSizeListArray.from_arrays(pa.array(images.pixels.reshape(-1)), int(np.prod(shape)))
    pixels = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), shape), rows)
    table = pa.table({"pixels": pixels, "label": pa.array(images.labels)})
    partial = file.with_suffix(f".partial-{os.getpid()}")
    try:
        # one record batch, so that the column is one contiguous tensor in the mapped file
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=max(1, len(table)))
        with partial.open("rb+") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        sidecar = _sidecar(file)
        hashed = hashlib.sha256(repr(images.pixels.shape).encode())
        hashed.update(np.ascontiguousarray(images.pixels).data)
        fingerprint = hashed.hexdigest()
        content = json.dumps(with_checksum({"sha256": digest, "images": fingerprint}))
        sidecar.with_suffix(".json.partial").write_text(content)
        os.replace(sidecar.with_suffix(".json.partial"), sidecar)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return fingerprint


def _map(file: Path, fingerprint: str) -> Split | None:
    """The images in a file whose checksum is right; None, with a warning, if the file does not have our schema."""
    try:
        # The mapping lives as long as the arrays that point into it.
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        table.validate(full=True)
        # Written as one batch, so the only chunk is the whole column, still in the mapped file; no copy is made. (Nor
        # do `values` and DLPack import pyarrow.compute and pandas, as flatten() and to_numpy() do.)
        column, labels = table["pixels"].chunk(0), np.from_dlpack(table["label"].chunk(0))
        pixels = np.from_dlpack(column.storage.values).reshape(-1, *column.type.shape)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or labels.dtype != np.int64 or len(labels) != len(pixels):
            raise ValueError(f"pixels {pixels.dtype} {pixels.shape}, labels {labels.dtype} {labels.shape}")
    except (pa.ArrowException, KeyError, IndexError, ValueError, AttributeError) as error:
        logger.warning("%s: damaged (%s); decoding it again", file, one_line(error)[:200])
        return None
    with warnings.catch_warnings():
        # torch warns that mapped memory is read-only; batches are copies, nothing writes into it
        warnings.simplefilter("ignore", UserWarning)
        return Split(torch.from_numpy(pixels), torch.from_numpy(labels), fingerprint)
