"""Parquet files give the images, columns and splits that were written, in whichever form, or say why not."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from tests.data_layer.labelled_pictures import ALL, CAMERAS, COLOUR, Pictures, assert_holds, png, read_all, synthetic
from tests.storage.servers import ObjectStore
from vae_ray.data.decoding import ImageRules
from vae_ray.data.sources import parquet as parquet_source
from vae_ray.data.sources import parquet_files
from vae_ray.data.sources.parquet import ParquetSource
from vae_ray.errors import UserError

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def structs(pictures: Pictures) -> Any:
    return pa.array([{"bytes": content, "path": f"{row}.x"} for row, content in enumerate(pictures.files)], STRUCT)


def structs_without_paths(pictures: Pictures) -> Any:
    return pa.array([{"bytes": content} for content in pictures.files], pa.struct([("bytes", pa.large_binary())]))


def tensors(pictures: Pictures) -> Any:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(np.moveaxis(pictures.pixels, 1, 3)))


def rotated_tensors(pictures: Pictures) -> Any:
    """(C, H, W), of which the file holds (H, W, C), as the format defines it."""
    _, channels, height, width = pictures.pixels.shape
    type_ = pa.fixed_shape_tensor(pa.uint8(), (height, width, channels), permutation=[2, 0, 1])
    return pa.ExtensionArray.from_storage(type_, tensors(pictures).storage)


def transposed_tensors(pictures: Pictures) -> Any:
    """(H, W, C), of which the file holds (W, H, C)."""
    _, channels, height, width = pictures.pixels.shape
    type_ = pa.fixed_shape_tensor(pa.uint8(), (width, height, channels), permutation=[1, 0, 2])
    values = pa.array(np.ascontiguousarray(np.moveaxis(pictures.pixels, 1, 3).swapaxes(1, 2)).ravel())
    storage = pa.FixedSizeListArray.from_arrays(values, channels * height * width)
    return pa.ExtensionArray.from_storage(type_, storage)


def tensors_that_pyarrow_rotates(pictures: Pictures) -> Any:
    """From an array whose axes are not in the order of its memory."""
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.moveaxis(pictures.pixels, 1, 3))


def nested_lists(pictures: Pictures) -> Any:
    rows = np.moveaxis(pictures.pixels, 1, 3).tolist()
    return pa.array(rows, pa.list_(pa.list_(pa.list_(pa.uint8()))))


def nested_fixed_lists(pictures: Pictures) -> Any:
    _, channels, height, width = pictures.pixels.shape
    type_ = pa.list_(pa.list_(pa.list_(pa.uint8(), width), height), channels)
    return pa.array(pictures.pixels.tolist(), type_)


FORMS: dict[str, Callable[[Pictures], Any]] = {
    "struct": structs,
    "struct without paths": structs_without_paths,
    "binary": lambda pictures: pa.array(pictures.files, pa.binary()),
    "large binary": lambda pictures: pa.array(pictures.files, pa.large_binary()),
    "fixed-shape tensor": tensors,
    "rotated tensor": rotated_tensors,
    "transposed tensor": transposed_tensors,
    "tensor that pyarrow rotates": tensors_that_pyarrow_rotates,
    "nested lists": nested_lists,
    "nested fixed lists": nested_fixed_lists,
}


def source(location: Path | str, images: str | None = None, labels: str | None = None) -> ParquetSource:
    return ParquetSource(str(location), images=images, labels=labels)


def error_of(root: Path, images: str | None = None, labels: str | None = None) -> str:
    """The one line that refuses the files."""
    with pytest.raises(UserError) as caught:
        read_all(source(root, images, labels))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(root), "ROOT")


def write(file: Path, columns: dict[str, Any], *, metadata: Any = None, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pq.write_table(table, file, **options)
    return file


def columns_of(pictures: Pictures) -> dict[str, Any]:
    return {"label": pictures.label, "camera": pa.array(pictures.camera), "angle": pictures.angle}


def grey_files(num: int, *, seed: int = 3) -> list[bytes]:
    pixels = np.random.default_rng(seed).integers(0, 256, (num, 1, 6, 4), dtype=np.uint8)
    return [png(image) for image in pixels]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("num_rows", [1, 7, 1000])
def test_all_forms_give_the_same_rows_for_any_size_of_parts(
    form: str, which: str, num_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_files, "BATCH_ROWS", 10)
    pictures = ALL[which]()
    file = write(tmp_path / "a.parquet", {"img": FORMS[form](pictures), **columns_of(pictures)}, row_group_size=25)
    assert_holds(source(file), pictures, num_rows=num_rows)


def test_parts_do_not_reach_over_row_groups(tmp_path: Path) -> None:
    pictures = synthetic()
    file = write(tmp_path / "a.parquet", {"img": structs(pictures)}, row_group_size=25)
    assert [part.num for part in source(file).parts(10)] == [10, 10, 5, 10, 10, 5, 10]
    assert len(pickle.dumps(next(source(file).parts(1000)))) < 300


def test_many_files_are_one_data_set_in_the_order_of_their_names(tmp_path: Path) -> None:
    pictures = synthetic()
    table = pa.table({"img": structs(pictures), **columns_of(pictures)})
    for name, first in [("b/0", 40), ("a/1", 20), ("a/0", 0)]:
        write(tmp_path / f"{name}.parquet", {name: table[name][first : first + 20] for name in table.column_names})
    for name in ("_temporary/0.parquet", ".hidden.parquet", "_metadata", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"left out")
    assert_holds(source(tmp_path), pictures, num_rows=7)


def test_each_batch_of_a_row_group_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one process that reads the parts in order, though each brings its own copy of the source."""
    monkeypatch.setattr(parquet_files, "BATCH_ROWS", 10)
    file = write(tmp_path / "a.parquet", {"img": structs(synthetic())}, row_group_size=60)
    advance, num_batches = parquet_files._RowGroup._advance, []
    monkeypatch.setattr(
        parquet_files._RowGroup, "_advance", lambda self, first: [num_batches.append(first), advance(self, first)]
    )
    read_all(source(file), num_rows=7)
    assert num_batches == [0, 10, 20, 30, 40, 50]


def test_parts_may_be_read_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_files, "BATCH_ROWS", 10)
    pictures = synthetic()
    shuffled = source(write(tmp_path / "a.parquet", {"img": tensors(pictures)}, row_group_size=30))
    parts = list(shuffled.parts(7))
    images: dict[int, Any] = {}
    for index in np.random.default_rng(2).permutation(len(parts)).tolist():
        images[index] = shuffled.read(parts[index], COLOUR).images
    np.testing.assert_array_equal(
        np.stack([image for index in sorted(images) for image in images[index]]), pictures.pixels
    )


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"],
        ["data/train-0", "data/train-1", "data/val-0", "data/test-0"],
        ["train/0", "train/1", "valid/0", "test/0"],
        ["Training/a/0", "Training/b/0", "dev/0", "testing/0"],
        ["mnist-train-a", "mnist-train-b", "mnist_val2017", "mnist.test"],
    ],
)
def test_names_of_files_and_directories_say_the_splits(names: list[str], tmp_path: Path) -> None:
    for number, name in enumerate(names):
        write(tmp_path / f"{name}.parquet", {"image": grey_files(number + 2), "label": [number] * (number + 2)})
    read = read_all(source(tmp_path))
    assert {split: rows.columns["label"].tolist() for split, rows in read.items()} == {
        "train": [0] * 2 + [1] * 3,
        "val": [2] * 4,
        "test": [3] * 5,
    }


def test_files_beside_a_named_training_split_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train-0", "test-0", "extra-0"):
        write(tmp_path / f"{name}.parquet", {"image": grey_files(2)})
    assert set(read_all(source(tmp_path))) == {"train", "test"}
    assert "1 files are left out, such as extra-0.parquet: their names say no split" in caplog.text


@pytest.mark.parametrize("num_rows", [1, 2, 1000])
def test_a_column_says_the_splits_of_mixed_rows(num_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_files, "BATCH_ROWS", 3)
    splits = ["train", "test", "train", "valid", "train", "test", "Train", "train", "test", "train", "train"]
    columns = {"image": grey_files(11), "label": np.arange(11), "split": splits}
    mixed = source(write(tmp_path / "a.parquet", columns, row_group_size=8))
    read = read_all(mixed, num_rows=num_rows)
    assert {split: rows.columns["label"].tolist() for split, rows in read.items()} == {
        "train": [0, 2, 4, 6, 7, 9, 10],
        "val": [3],
        "test": [1, 5, 8],
    }
    assert mixed.num_images == 11
    assert list(read["train"].columns) == ["label"]


def test_names_of_classes_are_those_of_hugging_face(tmp_path: Path) -> None:
    features = {
        "image": {"_type": "Image"},
        "fine_label": {"names": ["ant", "bee", "cat"], "_type": "ClassLabel"},
        "coarse_label": {"names": ["insect", "mammal"], "_type": "ClassLabel"},
    }
    columns = {"image": grey_files(4), "fine_label": [2, 0, None, 1], "coarse_label": [1, 0, None, 0]}
    file = write(tmp_path / "a.parquet", columns, metadata={"info": {"features": features}})
    named = source(file)
    assert named.names == {"label": ["ant", "bee", "cat"], "coarse_label": ["insect", "mammal"]}
    read = read_all(named, num_rows=3)[None].columns
    assert {name: values.tolist() for name, values in read.items()} == {
        "label": [2, 0, -1, 1],
        "coarse_label": [1, 0, -1, 0],
    }


def test_damaged_metadata_of_hugging_face_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "a.parquet", {"image": grey_files(2), "label": [1, 0]}, metadata=["info"])
    assert source(file).names == {}
    assert "the names of classes in the Parquet schema cannot be read" in caplog.text


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_labels_of_text_are_codes_of_sorted_names_over_all_files(as_dictionary: bool, tmp_path: Path) -> None:
    for name, labels in [("a", ["cat", None, "ant"]), ("b", ["über", "bee", "cat"])]:
        texts = pa.array(labels)
        write(
            tmp_path / f"{name}.parquet",
            {"image": grey_files(3), "class": texts.dictionary_encode() if as_dictionary else texts},
        )
    text = source(tmp_path)
    assert text.names == {"label": ["ant", "bee", "cat", "über"]}
    assert read_all(text, num_rows=2)[None].columns["label"].tolist() == [2, -1, 0, 3, 1, 2]


@pytest.mark.parametrize(
    ("values", "name", "expected"),
    [
        (pa.array([2, None, 0], pa.int32()), "label", [2, -1, 0]),
        (pa.array([2.0, None, 0.0]), "label", [2, -1, 0]),
        (pa.array([2.5, None, 0.0]), "kind", [2.5, np.nan, 0.0]),
        (pa.array([2.0, np.nan, 0.0], pa.float32()), "label", [2, -1, 0]),
        (pa.array([True, None, False]), "label", [1, -1, 0]),
        (pa.array([2**64 - 1, 0, 1], pa.uint64()), "kind", [2.0**64, 0.0, 1.0]),
        (pa.array([7, 0, 1], pa.uint64()), "label", [7, 0, 1]),
    ],
    ids=["missing", "missing float", "measured", "nan", "bool", "too large", "uint64"],
)
@pytest.mark.parametrize("statistics", [True, False])
def test_labels_are_int64_codes_or_a_float64_factor_of_their_own_name(
    values: Any, name: str, expected: list[float], statistics: bool, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.parquet", {"image": grey_files(3), "kind": values}, write_statistics=statistics)
    for num_rows in (1, 1000):
        ((column, read),) = read_all(source(file, labels="kind"), num_rows=num_rows)[None].columns.items()
        assert column == name
        np.testing.assert_array_equal(read, np.array(expected))
        assert read.dtype == (np.int64 if name == "label" else np.float64)


@pytest.mark.parametrize("statistics", [True, False])
def test_factors_keep_their_kind_and_missing_numbers_are_nan(statistics: bool, tmp_path: Path) -> None:
    columns = {
        "image": grey_files(3),
        "age": pa.array([30, None, 17], pa.int16()),
        "year": pa.array([1999, 2001, -5], pa.int64()),
        "mass": pa.array([1.0, 2.0, None], pa.float16()),
        "tags": [["a"], [], ["b", "c"]],
    }
    for num_rows in (1, 1000):
        file = write(tmp_path / "a.parquet", columns, write_statistics=statistics)
        read = read_all(source(file), num_rows=num_rows)[None].columns
        expected = {"age": [30, np.nan, 17], "year": [1999, 2001, -5], "mass": [1, 2, np.nan]}
        assert read.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(read[name], values)
        assert read["year"].dtype == np.int64


def test_the_label_and_a_factor_of_that_name_are_both_kept(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"image": grey_files(2), "label": [5, 6], "kind": [1, 0]})
    columns = read_all(source(file, labels="kind"))[None].columns
    assert {name: values.tolist() for name, values in columns.items()} == {"label": [1, 0], "label_2": [5, 6]}


def test_a_text_of_each_row_is_no_factor(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_source, "MAX_FACTOR_NAMES", 3)
    names = ["a", "b", "c", "d"]
    described = source(write(tmp_path / "a.parquet", {"image": grey_files(4), "label": names, "caption": names}))
    assert described.names == {"label": names}
    assert list(read_all(described)[None].columns) == ["label"]
    assert "column caption is left out: it has more than 3 different texts" in caplog.text


def test_rows_that_cannot_be_used_are_skipped_by_path_or_row_with_their_labels(tmp_path: Path) -> None:
    files = grey_files(6)
    rows = [
        {"bytes": files[0], "path": "zero.png"},
        {"bytes": None, "path": "one.png"},
        None,
        {"bytes": files[3][:40], "path": None},
        {"bytes": b"", "path": "four.png"},
        {"bytes": files[5], "path": None},
    ]
    file = write(tmp_path / "a.parquet", {"image": pa.array(rows, STRUCT), "label": np.arange(6)}, row_group_size=4)
    for num_rows in (1, 1000):
        read = read_all(source(file), num_rows=num_rows)[None]
        assert read.columns["label"].tolist() == [0, 5]
        assert [name for name, _ in read.skipped] == ["one.png", "a.parquet row 2", "a.parquet row 3", "four.png"]
        reasons = [reason for _, reason in read.skipped]
        assert reasons[:2] == ["has no bytes, only a path: embed the files", "is null"]
        assert reasons[3] == "is empty"


def test_paths_that_are_no_text_name_rows_all_the_same(tmp_path: Path) -> None:
    paths = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([b"a\xff", b"b"]).buffers()[1], pa.py_buffer(b"a\xffb")]
    )
    rows = pa.StructArray.from_arrays([pa.array([b"", b""]), paths], ["bytes", "path"])
    read = read_all(source(write(tmp_path / "a.parquet", {"image": rows})))[None]
    assert read.skipped == [("a\\xff", "is empty"), ("b", "is empty")]


def test_lists_of_several_sizes_are_images_and_what_is_none_is_skipped(tmp_path: Path) -> None:
    sizes = [(2, 3), (4, 5), (2, 3)]
    images = [np.random.default_rng(height).integers(0, 256, (height, width)).tolist() for height, width in sizes]
    rows = [images[0], [[1, 2], [3]], None, images[1], [[1, None]], [], images[2]]
    file = write(tmp_path / "a.parquet", {"pixels": pa.array(rows, pa.list_(pa.list_(pa.uint8())))})
    for num_rows in (1, 2, 1000):
        read = read_all(source(file), num_rows=num_rows, rules=ImageRules())[None]
        assert [image.tolist() for image in read.images] == [[image] for image in images]
        assert [name for name, _ in read.skipped] == [f"a.parquet row {row}" for row in (1, 2, 4, 5)]
        assert [reason for _, reason in read.skipped][:3] == [
            "has lists of several lengths",
            "is null",
            "has missing values",
        ]


def test_tensors_of_floats_are_skipped_where_they_are_null_or_nan(tmp_path: Path) -> None:
    values = np.random.default_rng(4).random((5, 6, 4)).astype(np.float32)
    values[3, 1, 2] = np.nan
    storage = pa.array([None if row == 1 else values[row].ravel() for row in range(5)], pa.list_(pa.float32(), 24))
    column = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), (6, 4)), storage)
    read = read_all(source(write(tmp_path / "a.parquet", {"x": column})), num_rows=3, rules=ImageRules())[None]
    np.testing.assert_array_equal(np.stack(read.images)[:, 0], np.rint(values[[0, 2, 4]] * 255))
    assert read.skipped == [("a.parquet row 1", "is null"), ("a.parquet row 3", "has values that are NaN or infinite")]


def test_the_fingerprint_changes_with_any_file_and_the_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", {"image": grey_files(2)})
    before = source(tmp_path).fingerprint()
    assert source(tmp_path).fingerprint() == before
    assert source(tmp_path, images="image").fingerprint() != before
    os.utime(tmp_path / "b.parquet", ns=(5, 6))
    after = source(tmp_path).fingerprint()
    assert after != before
    write(tmp_path / "c.parquet", {"image": grey_files(2)})
    assert source(tmp_path).fingerprint() not in (before, after)


def test_describes_what_lies_there(tmp_path: Path) -> None:
    for name, num in [("train-0", 3), ("train-1", 4), ("test-0", 2)]:
        write(
            tmp_path / f"{name}.parquet",
            {"image": grey_files(num), "label": np.arange(num), "camera": CAMERAS[:1] * num},
        )
    assert source(tmp_path).describe() == (
        "9 images in 3 Parquet files (test: 2, train: 7), column image (files), with label, camera"
    )


def test_files_at_a_uri_are_read_as_those_in_a_directory(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = synthetic()
    write(tmp_path / "a.parquet", {"img": structs(pictures), **columns_of(pictures)}, row_group_size=25)
    for name in ("pictures/b/a.parquet", "pictures/_old/a.parquet"):
        pyarrow.fs.copy_files(
            str(tmp_path / "a.parquet"),
            f"models/{name}",
            source_filesystem=pyarrow.fs.LocalFileSystem(),
            destination_filesystem=pyarrow.fs.FileSystem.from_uri("s3://models")[0],
        )
    for location in ("s3://models/pictures", "s3://models/pictures/b/a.parquet"):
        assert_holds(source(location), pictures, num_rows=7)
        assert source(location).fingerprint() == source(location).fingerprint()
    with pytest.raises(UserError, match=r"data.root: s3://models/nothing cannot be read \(No such file or directory\)"):
        source("s3://models/nothing").fingerprint()


PIXELS = pa.array([[[1, 2], [3, 4]]] * 2, pa.list_(pa.list_(pa.uint8())))


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        (
            {"a": grey_files(2), "b": grey_files(2), "c": [1, 2]},
            {},
            "data.root: ROOT has several columns that may be the images (a, b); it has the columns a binary, b binary, "
            "c int64; choose one by --data.images NAME",
        ),
        (
            {"img": grey_files(2), "png": grey_files(2)},
            {},
            "data.root: ROOT has several columns that may be the images (img, png); it has the columns img binary, "
            "png binary; choose one by --data.images NAME",
        ),
        (
            {"a": [1, 2], "b": ["x", "y"]},
            {},
            "data.root: ROOT has no images, which are {bytes, path} structs, binary, fixed-shape tensors or nested "
            "lists of numbers; it has the columns a int64, b string",
        ),
        (
            {"image": PIXELS, "a": [1, 2]},
            {"images": "a"},
            "data.images: column 'a' of ROOT has no images, which are {bytes, path} structs, binary, fixed-shape "
            "tensors or nested lists of numbers; it has the columns image list<element: list<element: uint8>>, a int64",
        ),
        (
            {"image": grey_files(2)},
            {"images": "crop"},
            "data.images: got 'crop', which ROOT does not have; it has the columns image binary",
        ),
        (
            {"image": grey_files(2)},
            {"labels": "kind"},
            "data.labels: got 'kind', which ROOT does not have; it has the columns image binary",
        ),
        (
            {"image": grey_files(2), "kind": [["a"], ["b"]]},
            {"labels": "kind"},
            "data.labels: column 'kind' of ROOT is list<element: string>, should be one number or text a row",
        ),
        (
            {"pixel_values": [[1, 2, 3, 4], [5, 6, 7, 8]]},
            {},
            "data.images: column 'pixel_values' of ROOT holds flat lists, whose height and width are not known; save "
            "it as nested lists of shape (H, W) or (H, W, C), or as arrow.fixed_shape_tensor",
        ),
        ({"image": pa.array([], pa.binary())}, {}, "data.root: ROOT holds no images, its Parquet files have no rows"),
        (
            {"image": grey_files(2), "split": ["train", "extra"]},
            {},
            "data.root: ROOT has 'extra' in column 'split', should be one of train, training, val, valid, validation, "
            "dev, test, testing; remove these rows, or rename the column",
        ),
    ],
)
def test_columns_that_cannot_be_used_are_one_line(
    columns: dict[str, Any], names: dict[str, str], message: str, tmp_path: Path
) -> None:
    assert error_of(write(tmp_path / "a.parquet", columns), **names) == message


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"label": [1]}, "data.root: ROOT/b.parquet lacks column 'image', which a.parquet has"),
        ({"image": grey_files(1)}, "data.root: ROOT/b.parquet lacks column 'label', which a.parquet has"),
        (
            {"image": grey_files(1), "label": ["x"]},
            "data.root: ROOT/b.parquet has column 'label' as string, a.parquet has it as int64; should be alike in all "
            "files",
        ),
        (
            {"image": PIXELS[:1], "label": [1]},
            "data.root: ROOT/b.parquet has column 'image' as list<element: list<element: uint8>>, a.parquet has it as "
            "binary; should be alike in all files",
        ),
    ],
)
def test_files_that_differ_are_one_line(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": grey_files(2), "label": [1, 0]})
    write(tmp_path / "b.parquet", other)
    assert error_of(tmp_path) == message


def test_what_is_no_parquet_is_one_line(tmp_path: Path) -> None:
    assert error_of(tmp_path / "absent") == "data.root: ROOT cannot be read (No such file or directory)"
    assert error_of(tmp_path) == "data.root: ROOT has no .parquet files; should be one, or a directory of them"
    os.mkfifo(tmp_path / "pipe.parquet")
    assert error_of(tmp_path) == "data.root: ROOT/pipe.parquet is a pipe or a device, should be a regular file"
    (tmp_path / "text.parquet").write_text("image,label")
    assert error_of(tmp_path / "text.parquet").startswith("data.root: ROOT cannot be read as Parquet (Parquet ")


def damaged(content: bytes, *, trial: int, generator: np.random.Generator) -> bytes:
    """Cut off, or with twenty wrong bytes, anywhere or in the schema at the end, in turn."""
    if trial % 3 == 0:
        return content[: generator.integers(len(content))]
    wrong = bytearray(content)
    for position in generator.integers(0 if trial % 3 == 1 else len(content) * 3 // 4, len(content), 20):
        wrong[position] = generator.integers(256)
    return bytes(wrong)


def test_damaged_and_truncated_files_are_one_line_that_names_them(tmp_path: Path) -> None:
    """Never another error; what decodes nevertheless has as many rows as there were."""
    file = write(tmp_path / "a.parquet", {"image": grey_files(60), "label": np.arange(60) % 3}, row_group_size=25)
    intact, generator = file.read_bytes(), np.random.default_rng(11)
    refused: dict[int, str] = {}
    for trial in range(60):
        file.write_bytes(damaged(intact, trial=trial, generator=generator))
        os.utime(file, ns=(trial, trial))  # two trials can fall into one tick of the clock
        try:
            read_all(source(tmp_path), num_rows=7)
        except UserError as error:
            refused[trial] = str(error)
    assert set(range(0, 60, 3)) <= refused.keys(), "a truncated file was read"
    assert all(str(file) in message and "\n" not in message for message in refused.values())


def test_pages_with_a_wrong_checksum_are_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(8).integers(0, 256, (50, 9, 7), dtype=np.uint8)
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(pixels)
    file = write(
        tmp_path / "a.parquet", {"image": column}, write_page_checksum=True, compression="none", use_dictionary=False
    )
    content = bytearray(file.read_bytes())
    where = content.find(pixels[17].tobytes()[:7])  # as one byte a value would be; Parquet widens uint8 to int32
    if where < 0:
        where = content.find(pixels[17].astype("<i4").tobytes())
    assert where > 0
    content[where] ^= 255
    file.write_bytes(content)
    assert "it may be damaged or truncated" in error_of(file)


def test_a_storage_that_is_away_for_a_while_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = synthetic()
    file = write(tmp_path / "a.parquet", {"img": structs(pictures), **columns_of(pictures)}, row_group_size=25)
    monkeypatch.setattr("vae_ray.storage.retry.PAUSES_SECONDS", (0.0, 0.0))
    select, failures = parquet_files._RowGroup._select, [5, 9, 11]
    calls: list[int] = []

    def sometimes(self: Any, rows: Any) -> Any:
        calls.append(len(calls))
        if calls[-1] in failures:
            raise OSError(116, "Stale file handle")
        return select(self, rows)

    monkeypatch.setattr(parquet_files._RowGroup, "_select", sometimes)
    assert_holds(source(file), pictures, num_rows=7)
    assert calls[-1] > max(failures)
