"""Labels and factors of arrays and tables as columns of a data set, and blocks of raw pixels as images.

Used by the sources whose rows lie in arrays. `label` is always int64: codes 0, 1, ..., or -1 for a row without one. A
label that is measured rather than counted, as 0.5 is, becomes a factor: float64, under its own name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vae_ray.data.decoding import ImageRules, Unusable, convert_images
from vae_ray.data.rows import Skipped

LABEL = "label"
NO_LABEL = -1
LARGEST_EXACT = 2**53
"""Above it not every whole number is a float64."""
MAX_FACTOR_NAMES = 10_000
"""A column of more different texts is a name or a description of each row, not a factor; a label has no limit."""

SPLIT_WORDS = {
    **dict.fromkeys(["train", "training"], "train"),
    **dict.fromkeys(["val", "valid", "validation", "dev"], "val"),
    **dict.fromkeys(["test", "testing"], "test"),
}
"""The splits, by the words that stand for them in names of files, arrays and values."""
_SPLIT_WORD = re.compile(rf"(?<![a-z])(?:{'|'.join(SPLIT_WORDS)})(?![a-z])")


class Column(NamedTuple):
    """A column of the data set, and what it is made from."""

    name: str
    field: str
    """The array or Parquet column that holds the values."""
    kind: Literal["code", "int", "float", "text"]
    """code: whole numbers, -1 for a missing one. text: codes of the source's names. int, float: the numbers."""
    second_index: int | None = None
    """Of the second axis of the field, where it has one."""


class Images(NamedTuple):
    """The images of a block of rows."""

    images: list[NDArray[np.uint8]]
    kept: list[int]
    """The rows of the block that they are."""
    skipped: list[Skipped]


def split_of(name: str) -> str | None:
    """The split that a name says, as in `train-00000-of-00002`; None if it says none, or several."""
    splits = {SPLIT_WORDS[word] for word in _SPLIT_WORD.findall(name.lower())}
    return splits.pop() if len(splits) == 1 else None


def are_codes(values: NDArray[Any]) -> bool:
    """Whether numbers are whole and fit into int64; NaN stands for a missing one."""
    if values.dtype.kind in "bi":
        return True
    if values.dtype.kind == "u":
        return values.size == 0 or int(values.max()) <= np.iinfo(np.int64).max
    present = values[~np.isnan(values)]
    return bool((np.isfinite(present) & (np.abs(present) <= LARGEST_EXACT) & (np.rint(present) == present)).all())


def numbers_as(kind: str, values: NDArray[Any]) -> NDArray[Any]:
    """Numbers as those of a column: int64, with -1 for NaN where they are codes, or float64."""
    if kind == "float":
        return values.astype(np.float64)
    if values.dtype.kind == "f":
        values = np.where(np.isnan(values), NO_LABEL, values)
    return values.astype(np.int64)


def free_name(name: str, taken: Container[str]) -> str:
    """The name, or NAME_2, NAME_3, ... if a column has it already."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def convert_rows(values: NDArray[Any], rules: ImageRules, name_of: Callable[[int], str]) -> Images:
    """The images of `values`, `(N, H, W)`, `(N, H, W, C)` or `(N, C, H, W)`, as one block where all can be used."""
    try:
        return Images(list(convert_images(values, rules)), list(range(len(values))), [])
    except Unusable:
        return decode_each((partial(_convert_row, values, row, rules) for row in range(len(values))), name_of)


def _convert_row(values: NDArray[Any], row: int, rules: ImageRules) -> NDArray[np.uint8]:
    return convert_images(values[row : row + 1], rules)[0]


def decode_each(decoders: Iterable[Callable[[], NDArray[np.uint8]]], name_of: Callable[[int], str]) -> Images:
    """The images that one function a row returns, or the reasons for which they raise `Unusable`."""
    found = Images([], [], [])
    for row, decode in enumerate(decoders):
        try:
            found.images.append(decode())
            found.kept.append(row)
        except Unusable as error:
            found.skipped.append(Skipped(name_of(row), str(error)))
    return found
