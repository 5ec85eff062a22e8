"""Arrays in memory, as `vae_ray.prepare(images=..., labels=...)` takes them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_ray.data.decoding import ImageRules, Unusable, convert_images
from vae_ray.data.rows import Columns, Part, Rows
from vae_ray.data.shards import SPLITS
from vae_ray.errors import UserError, one_line
from vae_ray.storage.reading import short_repr


class MemorySource:
    """Images `(N, H, W)`, `(N, H, W, C)` or `(N, C, H, W)` of any numbers, and labels; or dicts of them by split.

    Labels are whole numbers, texts, or a dict of columns by name.
    """

    in_process = True

    def __init__(self, images: Any, labels: Any = None) -> None:
        by_split = images if isinstance(images, Mapping) else {None: images}
        labels_of = labels if isinstance(images, Mapping) and isinstance(labels, Mapping) else {None: labels}
        if isinstance(images, Mapping) and not {"train", "test"} <= images.keys() <= set(SPLITS):
            raise UserError(
                f"images: got a dict with the keys {short_repr(list(images))}, should be an array, or a dict with "
                "'train' and 'test' and perhaps 'val'"
            )
        if labels is not None and labels_of.keys() != by_split.keys():
            raise UserError(
                f"labels: got {_kind_of(labels)} for images of the splits {short_repr(list(by_split))}, should be "
                "a dict of labels by the same splits"
            )
        self.names: dict[str, list[str]] = {}
        self._images = {split: _array("images", values) for split, values in by_split.items()}
        columns = {split: _columns(labels_of.get(split), len(values)) for split, values in self._images.items()}
        if len({frozenset(each) for each in columns.values()}) > 1:
            named = "; ".join(f"{split}: {short_repr(sorted(each))}" for split, each in columns.items())
            raise UserError(f"labels: got other columns in each split ({named}), should be the same in all")
        self._name_texts(columns)
        self._columns = columns
        self.num_images: int | None = sum(map(len, self._images.values()))

    def _name_texts(self, columns: dict[str | None, Columns]) -> None:
        """Make codes of texts, the same in all splits."""
        for name in next(iter(columns.values())):
            values = [each[name] for each in columns.values() if name in each]
            if any(array.dtype.kind in "US" for array in values):
                known = np.unique(np.concatenate([array.astype(str) for array in values]))
                self.names[name] = known.tolist()
                for each in columns.values():
                    each[name] = np.searchsorted(known, each[name].astype(str)).astype(np.int64)

    def describe(self) -> str:
        return f"arrays of {self.num_images:,} images"

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for split, images in self._images.items():
            digest.update(repr((split, images.dtype, images.shape)).encode())
            digest.update(np.ascontiguousarray(images).data)
            for name, values in sorted(self._columns[split].items()):
                digest.update(repr((name, values.dtype)).encode())
                digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def native_shape(self) -> tuple[int, int, int] | None:
        return None

    def parts(self, num_rows: int) -> Iterator[Part]:
        for split in sorted(self._images, key=lambda split: SPLITS.index(split) if split else 0):
            for start in range(0, len(self._images[split]), num_rows):
                yield Part(split, min(num_rows, len(self._images[split]) - start), start)

    def read(self, part: Part, rules: ImageRules) -> Rows:
        rows = slice(part.payload, part.payload + part.num)
        try:
            images = convert_images(self._images[part.split][rows], rules)
        except Unusable as error:
            raise UserError(f"images: {error}") from None
        return Rows(list(images), {name: each[rows] for name, each in self._columns[part.split].items()}, [], Counter())


def _columns(labels: Any, num: int) -> Columns:
    named = labels if isinstance(labels, Mapping) else {} if labels is None else {"label": labels}
    columns = {}
    for name, values in named.items():
        array = _array(f"labels {name}" if name != "label" else "labels", values)
        if array.shape != (num,):
            raise UserError(f"labels: got shape {array.shape} for {num} images, should be ({num},), one an image")
        kind = array.dtype.kind
        columns[str(name)] = array if kind in "US" else array.astype(np.float64 if kind == "f" else np.int64)
    return columns


def _kind_of(labels: Any) -> str:
    return f"a dict with the keys {short_repr(list(labels))}" if isinstance(labels, Mapping) else type(labels).__name__


def _array(key: str, values: Any) -> NDArray[Any]:
    if isinstance(values, np.ma.MaskedArray):
        raise UserError(f"{key}: got a masked array, should be an array of numbers; try .filled(0)")
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors that need a gradient
        reason = one_line(error)[:120]
        raise UserError(f"{key}: got a {type(values).__name__} that is no array of numbers ({reason})") from None
    if array.dtype.kind not in ("buifUS" if key.startswith("labels") else "buif") or not array.ndim:
        raise UserError(f"{key}: got {array.dtype} of shape {array.shape}, should be an array of numbers")
    return array
