"""Columns of an Arrow table as images: encoded files, tensors and nested lists of numbers, which keep their types."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from vae_ray.data.decoding import ImageRules, Unusable, convert_images, decode_image
from vae_ray.data.sources.columns import Images, convert_rows, decode_each

Form = Literal["files with paths", "files", "pixels", "flat"]
"""How a column holds images. Those that are flat lists have no height and width."""


def image_form(type_: Any) -> Form | None:
    """How a column of an Arrow type holds images; None if it holds none."""
    if _is_binary(type_):
        return "files"
    if pa.types.is_struct(type_):
        index = type_.get_field_index("bytes")
        return "files with paths" if index >= 0 and _is_binary(type_.field(index).type) else None
    if isinstance(type_, pa.FixedShapeTensorType):
        num_axes, value_type = len(type_.shape), type_.value_type
    else:
        num_axes, value_type = _nesting(type_)
    if not num_axes or not _is_number(value_type):
        return None
    return {1: "flat", 2: "pixels", 3: "pixels"}.get(num_axes)  # type: ignore[return-value]


def images_of(column: Any, form: Form, rules: ImageRules, name_of: Callable[[int], str]) -> Images:
    """The images of an Arrow array that has such a form; `name_of` names its rows, where their own paths do not."""
    if form == "pixels":
        return _pixels(column, rules, name_of)
    paths: list[str | None] = [None] * len(column)
    if form == "files with paths":
        paths = _paths(column)
        column = pyarrow.compute.struct_field(column, "bytes")
    return decode_each(
        (partial(_decode, content, path, rules) for content, path in zip(column.to_pylist(), paths, strict=True)),
        lambda row: paths[row] or name_of(row),
    )


def _paths(column: Any) -> list[str | None]:
    index = column.type.get_field_index("path")
    if index < 0 or not pa.types.is_string(column.type.field(index).type):
        return [None] * len(column)
    contents = pyarrow.compute.struct_field(column, "path").cast(pa.binary()).to_pylist()
    return [None if content is None else content.decode("utf-8", "backslashreplace") for content in contents]


def _decode(content: bytes | None, path: str | None, rules: ImageRules) -> NDArray[np.uint8]:
    if content is None:
        raise Unusable("has no bytes, only a path: embed the files" if path else "is null")
    return decode_image(content, rules)


def _pixels(column: Any, rules: ImageRules, name_of: Callable[[int], str]) -> Images:
    try:
        values = _stacked(column)
    except Unusable:  # of one row, or images of several sizes
        return decode_each((partial(_pixels_of_row, column, row, rules) for row in range(len(column))), name_of)
    return convert_rows(values, rules, name_of)


def _pixels_of_row(column: Any, row: int, rules: ImageRules) -> NDArray[np.uint8]:
    return convert_images(_stacked(column.slice(row, 1)), rules)[0]


def _stacked(column: Any) -> NDArray[Any]:
    """Numbers `(N, H, W)` or of four axes; raises `Unusable` if some are missing or lists differ in length."""
    if column.null_count:
        raise Unusable("is null")
    if isinstance(column.type, pa.FixedShapeTensorType):
        return _tensors(column)
    shape = [len(column)]
    while _is_list(column.type):
        lengths = pyarrow.compute.unique(pyarrow.compute.list_value_length(column)).to_pylist()
        if len(lengths) > 1:
            raise Unusable("has lists of several lengths")
        shape += lengths or [0]
        column = column.flatten()
        if column.null_count:
            raise Unusable("has missing values")
    return _numbers(column).reshape(shape)


def _tensors(column: Any) -> NDArray[Any]:
    """Tensors `(N, H, W)`, `(N, H, W, C)` or `(N, C, H, W)`.

    Where a permutation rotates three axes, they stay as they are stored: pyarrow 26 writes the inverse of the rotation
    that the format defines, and its `to_numpy_ndarray` reads neither, while channels first and last are told apart
    anyway.
    """
    values = _numbers(column.storage.flatten()).reshape(len(column), *column.type.shape)
    permutation = column.type.permutation or list(range(values.ndim - 1))
    is_own_inverse = all(permutation[axis] == index for index, axis in enumerate(permutation))
    return values.transpose(0, *(1 + axis for axis in permutation)) if is_own_inverse else values


def _numbers(column: Any) -> NDArray[Any]:
    if column.null_count:
        raise Unusable("has missing values")
    numbers: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return numbers


def _nesting(type_: Any) -> tuple[int, Any]:
    """How deep a type nests lists, and what they hold."""
    num_axes = 0
    while _is_list(type_):
        num_axes, type_ = num_axes + 1, type_.value_type
    return num_axes, type_


def _is_list(type_: Any) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _is_binary(type_: Any) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def _is_number(type_: Any) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_))
