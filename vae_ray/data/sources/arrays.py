"""A source of images in arrays: .npy, .npz and HDF5 files, or a directory of .npy files."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vae_ray.data.decoding import ImageRules, Unusable, convert_images
from vae_ray.data.rows import Columns, Part, Rows
from vae_ray.data.sources.array_files import StoredArray, errors_named, open_arrays, stamp
from vae_ray.data.sources.columns import (
    LABEL,
    MAX_FACTOR_NAMES,
    NO_LABEL,
    SPLIT_WORDS,
    Column,
    are_codes,
    convert_rows,
    free_name,
    numbers_as,
)
from vae_ray.errors import UserError

logger = logging.getLogger(__name__)

IMAGE_NAMES = ("images", "image", "imgs", "x", "X", "data")
LABEL_NAMES = ("labels", "label", "targets", "y", "Y")
"""By themselves, or with a word for the split before or after them: train_images, x_test, val/labels."""
MAX_LABEL_COLUMNS = 100
SHAPES = "should be (N, H, W), (N, H, W, C) or (N, C, H, W)"

SplitArrays = dict[str | None, str]
"""The names of arrays by split; by None alone where there are no splits."""


class _Split(NamedTuple):
    split: str | None
    images: str
    num: int
    fields: dict[str, str]
    """The arrays of the columns, by the columns' fields; a field that this split lacks is absent."""


class _Layout(NamedTuple):
    """What was found in the files."""

    stamp: str
    splits: list[_Split]
    columns: list[Column]
    names: dict[str, list[str]]


class ArraySource:
    """Images and labels that are arrays, as `train_images`, `x` or what `images` and `labels` name.

    Other arrays of one value a row are kept as factors where there are no splits. Raises `UserError`, with the arrays
    that there are, if the images or labels are missing, ambiguous or of a wrong shape.
    """

    in_process = False

    def __init__(self, root: Path, *, images: str | None, labels: str | None) -> None:
        self.root, self.images, self.labels = root, images, labels

    @cached_property
    def num_images(self) -> int:
        return sum(split.num for split in self._layout.splits)

    @cached_property
    def names(self) -> dict[str, list[str]]:
        return self._layout.names

    def describe(self) -> str:
        layout = self._layout
        first = self._arrays()[layout.splits[0].images]
        what = f"{self.num_images} images of {first.dtype.name} {first.shape[1:]} in {self.root.name}"
        if layout.splits[0].split is not None:
            what += f" ({', '.join(f'{split.split}: {split.num}' for split in layout.splits)})"
        columns = ", ".join(column.name for column in layout.columns)
        return f"{what}, with {columns}" if columns else what

    def fingerprint(self) -> str:
        return f"{stamp(self.root)};images={self.images};labels={self.labels}"

    def native_shape(self) -> tuple[int, int, int] | None:
        first = next(self.parts(1))
        images = self.read(first, ImageRules()).images
        return (images[0].shape[0], images[0].shape[1], images[0].shape[2]) if images else None

    def parts(self, num_rows: int) -> Iterator[Part]:
        for index, split in enumerate(self._layout.splits):
            for first in range(0, split.num, num_rows):
                yield Part(split.split, min(num_rows, split.num - first), (index, first))

    def read(self, part: Part, rules: ImageRules) -> Rows:
        index, first = part.payload
        split = self._layout.splits[index]
        prefix = "row" if split.split is None else f"{split.images} row"
        values = self._rows(split.images, first, part.num)
        found = convert_rows(values, rules, lambda row: f"{prefix} {first + row}")
        columns: Columns = {
            column.name: self._values(column, split, first, part.num)[found.kept] for column in self._layout.columns
        }
        return Rows(found.images, columns, found.skipped, Counter())

    @cached_property
    def _layout(self) -> _Layout:
        return _find_layout(self.root, self.images, self.labels)

    def _arrays(self) -> dict[str, StoredArray]:
        if stamp(self.root) != self._layout.stamp:
            raise UserError(f"data.root: {self.root} was changed while it was read; start again")
        return open_arrays(self.root, self._layout.stamp)

    def _rows(self, name: str, first: int, num: int) -> NDArray[Any]:
        array = self._arrays()[name]
        with errors_named(self.root):
            return array.rows(first, first + num)

    def _values(self, column: Column, split: _Split, first: int, num: int) -> NDArray[Any]:
        if column.field not in split.fields:
            missing = NO_LABEL if column.kind in ("code", "text") else np.nan
            return np.full(num, missing, np.float64 if column.kind == "float" else np.int64)
        values = _column_of(self._rows(split.fields[column.field], first, num), column.second_index)
        if column.kind == "text":
            return np.searchsorted(np.array(self.names[column.name]), _as_text(values)).astype(np.int64)
        return numbers_as(column.kind, values)


def _find_layout(root: Path, images: str | None, labels: str | None) -> _Layout:
    current = stamp(root)
    arrays = open_arrays(root, current)
    chosen = _find_images(root, arrays, images)
    for name in chosen.values():
        _check_images(root, name, arrays[name])
    if not any(arrays[name].shape[0] for name in chosen.values()):
        raise UserError(f"data.root: {root} holds no images, array {next(iter(chosen.values()))!r} has no rows")
    fields: dict[str, SplitArrays] = {}
    label_field, label_arrays = _find_labels(root, arrays, labels, chosen)
    if label_field is not None:
        fields[label_field] = label_arrays
        _check_rows(root, arrays, chosen, label_arrays)
    if None in chosen:
        fields.update(_find_factors(arrays, taken={chosen[None], *label_arrays.values()}, num=_num(arrays, chosen)))
    splits = [
        _Split(split, name, arrays[name].shape[0], {field: of[split] for field, of in fields.items() if split in of})
        for split, name in chosen.items()
        if arrays[name].shape[0]
    ]
    columns, names = _describe_columns(root, arrays, fields, label_field)
    return _Layout(current, splits, columns, names)


def _num(arrays: dict[str, StoredArray], chosen: SplitArrays) -> int:
    return arrays[chosen[None]].shape[0]


def _listing(arrays: dict[str, StoredArray]) -> str:
    """The arrays that there are, for a message."""
    texts = [f"{name} {array}" for name, array in arrays.items()]
    more = f" and {len(texts) - 12} more" if len(texts) > 12 else ""
    return f"it has {', '.join(texts[:12])}{more}" if texts else "it has no arrays"


def _split_name(name: str) -> tuple[str, str] | None:
    """The name without its word for a split, and the split: ("images", "val") of valid_images or images/validation."""
    for pattern, word, rest in ((r"([A-Za-z]+)[_./-](.+)", 1, 2), (r"(.+)[_./-]([A-Za-z]+)", 2, 1)):
        match = re.fullmatch(pattern, name)
        if match is not None and match[word].lower() in SPLIT_WORDS:
            return match[rest], SPLIT_WORDS[match[word].lower()]
    return None


def _candidates(arrays: dict[str, StoredArray], names: tuple[str, ...]) -> dict[str, dict[str | None, list[str]]]:
    """Arrays of one of the `names`, with or without a split: name -> split -> arrays."""
    found: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    for array in arrays:
        base, split = _split_name(array) or (array, None)
        if array in names:
            found[array][None].append(array)
        elif base in names:
            found[f"{base} of a split"][split].append(array)
    return found


def _find_images(root: Path, arrays: dict[str, StoredArray], wanted: str | None) -> SplitArrays:
    if wanted in arrays:
        return {None: wanted}
    candidates = _candidates(arrays, IMAGE_NAMES if wanted is None else (wanted,))
    if wanted is not None and not candidates:
        raise UserError(f"data.images: got {wanted!r}, which {root} does not have; {_listing(arrays)}")
    shaped = [name for name, array in arrays.items() if len(array.shape) in (3, 4) and array.holds_numbers]
    if len(candidates) > 1:
        candidates = {
            base: splits
            for base, splits in candidates.items()
            if all(name in shaped for names in splits.values() for name in names)
        }
    if not candidates and len(shaped) == 1:
        return {None: shaped[0]}
    if not candidates:
        raise UserError(
            f"data.root: {root} has no array that is named as images are ({', '.join(IMAGE_NAMES)}, train_images, "
            f"x_train, ...); {_listing(arrays)}; name one by --data.images NAME"
        )
    return _only(root, arrays, candidates, key="images")


def _find_labels(
    root: Path, arrays: dict[str, StoredArray], wanted: str | None, images: SplitArrays
) -> tuple[str | None, SplitArrays]:
    """The name of the labels, without a split, and their arrays."""
    if None in images and wanted in arrays:
        return wanted, {None: wanted}
    base, _ = _split_name(wanted or "") or (wanted, None)  # train_labels stands for those of all splits
    candidates = _candidates(arrays, LABEL_NAMES if base is None else (base,))
    candidates = {base: splits for base, splits in candidates.items() if set(splits) & set(images)}
    if not candidates:
        if wanted is not None:
            raise UserError(
                f"data.labels: got {wanted!r}, which {root} does not have for {', '.join(images.values())}; "
                f"{_listing(arrays)}"
            )
        return None, {}
    chosen = _only(root, arrays, candidates, key="labels")
    return next(iter(candidates)).removesuffix(" of a split"), {
        split: name for split, name in chosen.items() if split in images
    }


def _only(
    root: Path, arrays: dict[str, StoredArray], candidates: dict[str, dict[str | None, list[str]]], *, key: str
) -> SplitArrays:
    names = [name for splits in candidates.values() for of_split in splits.values() for name in of_split]
    if len(candidates) > 1 or any(len(of_split) > 1 for splits in candidates.values() for of_split in splits.values()):
        raise UserError(
            f"data.root: {root} has several arrays that may be the {key} ({', '.join(names)}); {_listing(arrays)}; "
            f"choose one by --data.{key} NAME"
        )
    splits = next(iter(candidates.values()))
    return {split: splits[split][0] for split in (None, "train", "val", "test") if split in splits}


def _check_images(root: Path, name: str, array: StoredArray) -> None:
    where = f"data.images: array {name!r} of {root}"
    if array.dtype.kind == "O":
        raise UserError(f"{where} holds Python objects, which could run code when read; save it as an array of numbers")
    if not array.holds_numbers or len(array.shape) not in (3, 4):
        raise UserError(f"{where} is {array}, {SHAPES} of numbers")
    if 0 in array.shape[1:]:
        raise UserError(f"{where} is {array}, which has no pixels; {SHAPES}")
    try:
        convert_images(np.zeros((1, *array.shape[1:]), array.dtype), ImageRules())
    except Unusable as error:
        raise UserError(f"{where} {error}") from None


def _check_rows(root: Path, arrays: dict[str, StoredArray], images: SplitArrays, labels: SplitArrays) -> None:
    for split, name in labels.items():
        array, num = arrays[name], arrays[images[split]].shape[0]
        where = f"data.labels: array {name!r} of {root}"
        if array.dtype.kind == "O":
            raise UserError(
                f"{where} holds Python objects, which could run code when read; save it as numbers, or as text of a "
                "fixed length (dtype U)"
            )
        is_label = len(array.shape) in (1, 2) and (array.holds_numbers or array.holds_text)
        if not is_label or array.shape[1:] > (MAX_LABEL_COLUMNS,) or 0 in array.shape[1:]:
            raise UserError(f"{where} is {array}, should be numbers or text of shape (N,), (N, 1) or (N, K)")
        if array.shape[0] != num:
            raise UserError(f"{where} has {array.shape[0]} rows for the {num} images of {images[split]!r}")


def _find_factors(arrays: dict[str, StoredArray], *, taken: set[str], num: int) -> dict[str, SplitArrays]:
    return {
        name: {None: name}
        for name, array in arrays.items()
        if name not in taken and array.shape == (num,) and (array.holds_numbers or array.holds_text)
    }


def _describe_columns(
    root: Path, arrays: dict[str, StoredArray], fields: dict[str, SplitArrays], label_field: str | None
) -> tuple[list[Column], dict[str, list[str]]]:
    """The columns and the names of those that are text; reads all of their values."""
    columns: dict[str, Column] = {}
    names: dict[str, list[str]] = {}
    for field, of_split in fields.items():
        with errors_named(root):
            blocks = [arrays[name].rows(0, arrays[name].shape[0]) for name in of_split.values()]
        for index in _indices(blocks[0]):
            values = [_column_of(block, index) for block in blocks]
            is_label = field == label_field and index in (None, 0) and blocks[0].shape[1:] in ((), (1,))
            column = _column(field, index, values, is_label=is_label, taken=columns)
            if column.kind == "text":
                with errors_named(root):
                    texts = np.unique(np.concatenate([_as_text(block) for block in values])).tolist()
                if not is_label and len(texts) > MAX_FACTOR_NAMES:
                    logger.warning("%s: %s is left out: it has %d different texts", root, field, len(texts))
                    continue
                names[column.name] = texts
            columns[column.name] = column
    return list(columns.values()), names


def _column(
    field: str, index: int | None, blocks: list[NDArray[Any]], *, is_label: bool, taken: dict[str, Column]
) -> Column:
    is_text = any(block.dtype.kind in "US" for block in blocks)
    if is_label and (is_text or all(are_codes(block) for block in blocks)):
        return Column(LABEL, field, "text" if is_text else "code", index)
    name = free_name(field if is_label or index is None else f"{field}_{index}", taken)
    is_whole = all(block.dtype.kind in "bui" and are_codes(block) for block in blocks)
    return Column(name, field, "text" if is_text else "int" if is_whole else "float", index)


def _indices(block: NDArray[Any]) -> list[int] | list[None]:
    return [None] if block.ndim == 1 else list(range(block.shape[1]))


def _column_of(block: NDArray[Any], index: int | None) -> NDArray[Any]:
    return block if index is None else block[:, index]


def _as_text(values: NDArray[Any]) -> NDArray[np.str_]:
    """Text of any kind, or numbers where another split has text; raises `ValueError` for what no text has."""
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8", "backslashreplace")
    texts = np.ascontiguousarray(values.astype(np.str_))
    characters = texts.view(np.uint32)  # numpy hands on what it finds; Python cannot even pickle it
    if ((characters > sys.maxunicode) | ((characters >= 0xD800) & (characters <= 0xDFFF))).any():
        raise ValueError("text with characters that do not exist")
    return texts
