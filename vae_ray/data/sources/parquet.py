"""A source of images in Parquet files, as Hugging Face, petastorm or pandas write them, at a path or a URI."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from vae_ray.data.decoding import ImageRules
from vae_ray.data.rows import Part, Rows, Skipped
from vae_ray.data.sources.arrow_images import Form, image_form, images_of
from vae_ray.data.sources.columns import (
    LABEL,
    MAX_FACTOR_NAMES,
    NO_LABEL,
    SPLIT_WORDS,
    Column,
    are_codes,
    free_name,
    numbers_as,
    split_of,
)
from vae_ray.data.sources.parquet_files import (
    BATCH_ROWS,
    ParquetFile,
    RowNumbers,
    errors_named,
    list_files,
    open_file,
    read_rows,
)
from vae_ray.errors import UserError
from vae_ray.storage.reading import parse_json

logger = logging.getLogger(__name__)

IMAGE_NAMES = ("image", "img", "images", "pixel_values", "jpg", "png")
LABEL_NAMES = ("label", "labels", "class", "fine_label")
SPLIT_NAME = "split"
NUM_THREADS = 16
"""That read the ends of files, which takes a round trip to an object store each."""

Scalar = Literal["text", "whole", "real"]


class _Table(NamedTuple):
    """A file, and how many rows its row groups have."""

    file: ParquetFile
    schema: Any
    group_rows: tuple[int, ...]


class _File(NamedTuple):
    file: ParquetFile
    split: str | None
    group_rows: tuple[int, ...]
    row_splits: tuple[NDArray[np.str_], ...] | None
    """The split of each row of each row group, where a column says it."""


class _Layout(NamedTuple):
    """What was found in the files."""

    files: list[_File]
    image: str
    form: Form
    columns: list[Column]
    names: dict[str, list[str]]


@dataclass
class _Seen:
    """What all values of a column have in common."""

    texts: set[str] = field(default_factory=set)
    are_codes: bool = True
    num_missing: int = 0


class ParquetSource:
    """Images in a column of Parquet files, with a label and the other columns of numbers or text as factors.

    Splits are those of the files' names or directories, or of a column `split`. Raises `UserError`, with the columns
    that there are, if the images or labels are missing, ambiguous or of a wrong type.
    """

    in_process = False

    def __init__(self, location: str, *, images: str | None, labels: str | None) -> None:
        self.location, self.images, self.labels = location, images, labels

    @cached_property
    def num_images(self) -> int:
        return sum(sum(file.group_rows) for file in self._layout.files)

    @cached_property
    def names(self) -> dict[str, list[str]]:
        return self._layout.names

    def describe(self) -> str:
        layout = self._layout
        num_files = len(layout.files)
        what = f"{self.num_images} images in {num_files} Parquet {'file' if num_files == 1 else 'files'}"
        counts: Counter[str] = Counter()
        for part in self.parts(self.num_images):
            counts[part.split or "no split"] += part.num
        if set(counts) != {"no split"}:
            what += f" ({', '.join(f'{split}: {num}' for split, num in counts.items())})"
        columns = ", ".join(column.name for column in layout.columns)
        return f"{what}, column {layout.image} ({layout.form})" + (f", with {columns}" if columns else "")

    def fingerprint(self) -> str:
        files = [(file.name, file.num_bytes, file.modified_ns) for file in list_files(self.location)]
        digest = hashlib.sha256(repr(files).encode()).hexdigest()
        return f"{self.location};{len(files)} files;{digest};images={self.images};labels={self.labels}"

    def native_shape(self) -> tuple[int, int, int] | None:
        images = self.read(next(self.parts(1)), ImageRules()).images
        return (images[0].shape[0], images[0].shape[1], images[0].shape[2]) if images else None

    def parts(self, num_rows: int) -> Iterator[Part]:
        """None reaches over the end of a row group."""
        for index, file in enumerate(self._layout.files):
            for group in range(len(file.group_rows)):
                for split, rows in _rows_by_split(file, group):
                    for first in range(0, len(rows), num_rows):
                        block = rows[first : first + num_rows]
                        yield Part(split, len(block), (index, group, block))

    def read(self, part: Part, rules: ImageRules) -> Rows:
        index, group, rows = part.payload
        layout = self._layout
        file = layout.files[index]
        fields = [layout.image, *(column.field for column in layout.columns)]
        batches = read_rows(file.file, group, rows, fields)
        first_row = sum(file.group_rows[:group])
        images: list[NDArray[np.uint8]] = []
        skipped: list[Skipped] = []
        blocks: dict[str, list[NDArray[Any]]] = {column.name: [] for column in layout.columns}
        start = 0
        for batch in batches:
            numbers = rows[start : start + batch.num_rows]
            start += batch.num_rows
            found = images_of(batch[layout.image], layout.form, rules, _namer(file.file.name, first_row, numbers))
            images += found.images
            skipped += found.skipped
            for column in layout.columns:
                values = _values(batch[column.field], column, layout.names.get(column.name, []))
                blocks[column.name].append(values[found.kept])
        return Rows(images, {name: np.concatenate(of) for name, of in blocks.items()}, skipped, Counter())

    @cached_property
    def _layout(self) -> _Layout:
        return _find_layout(self.location, self.images, self.labels)


def _namer(file: str, first_row: int, numbers: RowNumbers) -> Any:
    return lambda row: f"{file} row {first_row + int(numbers[row])}"


def _rows_by_split(file: _File, group: int) -> Iterator[tuple[str | None, RowNumbers]]:
    if not file.group_rows[group]:
        return
    if file.row_splits is None:
        yield file.split, range(file.group_rows[group])
        return
    splits = file.row_splits[group]
    for split in ("train", "val", "test"):
        rows = np.flatnonzero(splits == split)
        if len(rows):
            yield split, rows


def _find_layout(location: str, images: str | None, labels: str | None) -> _Layout:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        tables = list(pool.map(_read_end, list_files(location)))
    if not any(sum(table.group_rows) for table in tables):
        raise UserError(f"data.root: {location} holds no images, its Parquet files have no rows")
    splits = _splits_of_names(location, tables)
    tables = [table for table in tables if table.file.name in splits]
    first = tables[0]
    image, form = _find_images(first, images)
    label = _find_label(first, labels)
    is_split = _scalar(first.schema, SPLIT_NAME) == "text" and set(splits.values()) == {None}
    others = [name for name in first.schema.names if name != image and _scalar(first.schema, name) is not None]
    fields = [name for name in others if not (name == SPLIT_NAME and is_split and name != label)]
    _check_schemas(tables, image, [*fields, SPLIT_NAME] if is_split else fields)
    columns, names = _describe_columns(tables, fields, label)
    files = [
        _File(table.file, splits[table.file.name], table.group_rows, _row_splits(table) if is_split else None)
        for table in tables
    ]
    return _Layout(files, image, form, columns, names)


def _read_end(file: ParquetFile) -> _Table:
    with errors_named(file), open_file(file) as opened:
        metadata = opened.metadata
        # Not the statistics of columns: for some damaged files pyarrow 26 lets a C++ exception pass, which ends the
        # process, as soon as a column of a row group is asked for.
        groups = tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        return _Table(file, opened.schema_arrow, groups)


def _listing(table: _Table) -> str:
    """The columns that there are, for a message."""
    texts = [f"{column.name} {str(column.type)[:60]}" for column in table.schema]
    more = f" and {len(texts) - 12} more" if len(texts) > 12 else ""
    return f"it has the columns {', '.join(texts[:12])}{more}"


def _find_images(table: _Table, wanted: str | None) -> tuple[str, Form]:
    path = table.file.path
    forms = {column.name: image_form(column.type) for column in table.schema}
    if wanted is not None and wanted not in forms:
        raise UserError(f"data.images: got {wanted!r}, which {path} does not have; {_listing(table)}")
    candidates = [name for name, form in forms.items() if form not in (None, "flat")] if wanted is None else [wanted]
    if len(candidates) > 1:
        candidates = [name for name in candidates if name in IMAGE_NAMES] or candidates
    if len(candidates) > 1:
        raise UserError(
            f"data.root: {path} has several columns that may be the images ({', '.join(candidates)}); "
            f"{_listing(table)}; choose one by --data.images NAME"
        )
    flat = [name for name, form in forms.items() if form == "flat"]
    name = candidates[0] if candidates else next((name for name in flat if name in IMAGE_NAMES), None)
    form = None if name is None else forms[name]
    if form == "flat":
        raise UserError(
            f"data.images: column {name!r} of {path} holds flat lists, whose height and width are not known; save it "
            "as nested lists of shape (H, W) or (H, W, C), or as arrow.fixed_shape_tensor"
        )
    if name is None or form is None:
        key = f"data.images: column {wanted!r} of {path}" if wanted else f"data.root: {path}"
        raise UserError(
            f"{key} has no images, which are {{bytes, path}} structs, binary, fixed-shape tensors or nested lists of "
            f"numbers; {_listing(table)}"
        )
    return name, form


def _scalar(schema: Any, name: str) -> Scalar | None:
    """What a column holds in each row: text, or numbers that are whole or not; None if it is nothing of these."""
    if name not in schema.names:
        return None
    type_ = schema.field(name).type
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return "text"
    if pa.types.is_integer(type_) or pa.types.is_boolean(type_):
        return "whole"
    return "real" if pa.types.is_floating(type_) else None


def _find_label(table: _Table, wanted: str | None) -> str | None:
    if wanted is None:
        return next((name for name in LABEL_NAMES if _scalar(table.schema, name) is not None), None)
    if wanted not in table.schema.names:
        raise UserError(f"data.labels: got {wanted!r}, which {table.file.path} does not have; {_listing(table)}")
    if _scalar(table.schema, wanted) is None:
        type_ = table.schema.field(wanted).type
        raise UserError(
            f"data.labels: column {wanted!r} of {table.file.path} is {str(type_)[:60]}, should be one number or text a "
            "row"
        )
    return wanted


def _check_schemas(tables: list[_Table], image: str, fields: list[str]) -> None:
    """Raise `UserError` unless all files have the columns of the first."""
    first = tables[0]
    for table in tables:
        if len(set(table.schema.names)) < len(table.schema.names):
            raise UserError(f"data.root: {table.file.path} has two columns of one name; {_listing(table)}")
        for name in [image, *fields]:
            if name not in table.schema.names:
                raise UserError(f"data.root: {table.file.path} lacks column {name!r}, which {first.file.name} has")
            is_alike = _scalar(table.schema, name) == _scalar(first.schema, name) and (
                name != image or image_form(table.schema.field(name).type) == image_form(first.schema.field(name).type)
            )
            if not is_alike:
                types = [str(each.schema.field(name).type)[:60] for each in (table, first)]
                raise UserError(
                    f"data.root: {table.file.path} has column {name!r} as {types[0]}, {first.file.name} has it as "
                    f"{types[1]}; should be alike in all files"
                )


def _splits_of_names(location: str, tables: list[_Table]) -> dict[str, str | None]:
    """The splits of the files that are read: by their names, else by those of their directories, innermost first."""
    splits: dict[str, str | None] = {}
    for table in tables:
        path = PurePosixPath(table.file.name)
        words = [path.stem, *(parent.name for parent in path.parents)]
        splits[table.file.name] = next(filter(None, map(split_of, words)), None)
    unnamed = [name for name, split in splits.items() if split is None]
    if unnamed and "train" in splits.values():
        logger.warning(
            "%s: %d files are left out, such as %s: their names say no split, as those of others do",
            *(location, len(unnamed), unnamed[0]),
        )
        return {name: split for name, split in splits.items() if split is not None}
    return splits


def _row_splits(table: _Table) -> tuple[NDArray[np.str_], ...]:
    """The splits of the rows of each row group, from the column `split`."""
    found = []
    with errors_named(table.file), open_file(table.file) as opened:
        for group in range(len(table.group_rows)):
            column = opened.read_row_group(group, columns=[SPLIT_NAME]).column(SPLIT_NAME)
            words = np.array(column.cast(pa.string()).to_pylist(), dtype=object)
            splits = np.full(len(words), "", dtype="U5")
            for word in set(words):
                if str(word).lower() not in SPLIT_WORDS:
                    raise UserError(
                        f"data.root: {table.file.path} has {word!r} in column {SPLIT_NAME!r}, should be one of "
                        f"{', '.join(SPLIT_WORDS)}; remove these rows, or rename the column"
                    )
                splits[words == word] = SPLIT_WORDS[str(word).lower()]
            found.append(splits)
    return tuple(found)


def _describe_columns(
    tables: list[_Table], fields: list[str], label: str | None
) -> tuple[list[Column], dict[str, list[str]]]:
    """The columns, and the names of those that are text or whose names Hugging Face's metadata has."""
    kinds = {name: _scalar(tables[0].schema, name) for name in fields}
    class_names = _class_names(tables[0].schema)
    read = [
        name
        for name in fields
        if _must_be_read(tables[0].schema, name, is_label=name == label, is_class=name in class_names)
    ]
    seen = _look_through(tables, read, label)
    columns: dict[str, Column] = {}
    names: dict[str, list[str]] = {}
    for name in sorted(fields, key=lambda name: name != label):  # the label has its name before a factor takes it
        column = _column(name, kinds[name], seen.get(name), is_label=name == label, is_class=name in class_names)
        column = column._replace(name=free_name(column.name, columns))
        if column.kind == "text":
            texts = seen[name].texts
            if name != label and len(texts) > MAX_FACTOR_NAMES:
                logger.warning("column %s is left out: it has more than %d different texts", name, MAX_FACTOR_NAMES)
                continue
            names[column.name] = sorted(texts)
        elif column.kind == "code" and name in class_names:
            names[column.name] = class_names[name]
        columns[column.name] = column
    return list(columns.values()), names


def _column(name: str, kind: Scalar | None, seen: _Seen | None, *, is_label: bool, is_class: bool) -> Column:
    are_whole = seen.are_codes if seen is not None else kind == "whole"
    if kind == "text":
        return Column(LABEL if is_label else name, name, "text")
    if is_label and are_whole:
        return Column(LABEL, name, "code")
    if kind == "whole" and are_whole:
        if is_class:
            return Column(name, name, "code")
        return Column(name, name, "float" if seen is not None and seen.num_missing else "int")
    return Column(name, name, "float")


def _must_be_read(schema: Any, name: str, *, is_label: bool, is_class: bool) -> bool:
    """Whether what a column becomes depends on its values."""
    kind, type_ = _scalar(schema, name), schema.field(name).type
    if kind == "whole" and type_ != pa.uint64():
        return not (is_label or is_class)  # in others, -1 can be a value, so a missing one makes them floats
    return kind != "real" or is_label


def _look_through(tables: list[_Table], fields: list[str], label: str | None) -> dict[str, _Seen]:
    """What all values of columns have in common; reads no other columns."""
    seen = {name: _Seen() for name in fields}
    if not fields:
        return seen
    for table in tables:
        with errors_named(table.file), open_file(table.file) as opened:
            for batch in opened.iter_batches(BATCH_ROWS * BATCH_ROWS, columns=fields):
                for name in fields:
                    if len(seen[name].texts) > MAX_FACTOR_NAMES and name != label:
                        continue  # it is left out, so its texts need not be kept
                    _look_at(batch[name], seen[name], is_text=_scalar(table.schema, name) == "text")
    return seen


def _look_at(values: Any, seen: _Seen, *, is_text: bool) -> None:
    seen.num_missing += values.null_count
    if is_text:
        seen.texts.update(text for text in pyarrow.compute.unique(_plain(values)).to_pylist() if text is not None)
    else:
        seen.are_codes &= are_codes(_plain(values).drop_null().to_numpy(zero_copy_only=False))


def _plain(values: Any) -> Any:
    """Without a dictionary, and text as one type."""
    type_ = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    return values.cast(pa.string() if pa.types.is_large_string(type_) else type_)


def _values(values: Any, column: Column, names: list[str]) -> NDArray[Any]:
    """int64 or float64, -1 or NaN where there is none."""
    values = _plain(values)
    if column.kind == "text":
        values = pyarrow.compute.index_in(values, value_set=pa.array(names, pa.string()))
    if column.kind != "float" and not pa.types.is_floating(values.type):
        codes = pyarrow.compute.fill_null(values.cast(pa.int64()), NO_LABEL)
        return np.array(codes.to_numpy(zero_copy_only=False))
    return numbers_as(column.kind, values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names of classes by column, from Hugging Face's metadata in the schema."""
    content = (schema.metadata or {}).get(b"huggingface")
    if content is None:
        return {}
    try:
        features = parse_json(content)["info"]["features"]
        classes = {name: feature for name, feature in features.items() if "names" in feature}
        return {name: [str(text) for text in feature["names"]] for name, feature in classes.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the names of classes in the Parquet schema cannot be read (%s)", error)
        return {}
