"""Arrays in .npy, .npz and HDF5 files give the images, columns and splits that were written, or say why not."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.data_layer.labelled_pictures import ALL, COLOUR, Pictures, assert_holds, read_all, synthetic
from vae_ray.data.sources.arrays import ArraySource
from vae_ray.errors import UserError


def write_npz(root: Path, arrays: dict[str, Any]) -> Path:
    np.savez(root / "stored.npz", **arrays)
    return root / "stored.npz"


def write_compressed(root: Path, arrays: dict[str, Any]) -> Path:
    np.savez_compressed(root / "compressed.npz", **arrays)
    return root / "compressed.npz"


def write_fortran(root: Path, arrays: dict[str, Any]) -> Path:
    return write_npz(root, {name: np.asfortranarray(values) for name, values in arrays.items()})


def write_compressed_fortran(root: Path, arrays: dict[str, Any]) -> Path:
    return write_compressed(root, {name: np.asfortranarray(values) for name, values in arrays.items()})


def write_directory(root: Path, arrays: dict[str, Any]) -> Path:
    (root / "arrays").mkdir()
    for name, values in arrays.items():
        np.save(root / "arrays" / f"{name}.npy", values)
    return root / "arrays"


def write_hdf5(root: Path, arrays: dict[str, Any], **options: Any) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(root / "arrays.h5", "w") as file:
        for name, values in arrays.items():
            is_text = values.dtype.kind == "U"
            file.create_dataset(name, data=values.astype(object) if is_text else values, **options)
    return root / "arrays.h5"


def write_hdf5_in_chunks(root: Path, arrays: dict[str, Any]) -> Path:
    return write_hdf5(root, arrays, chunks=True, compression="gzip")


FORMS: dict[str, Callable[[Path, dict[str, Any]], Path]] = {
    "npz": write_npz,
    "compressed npz": write_compressed,
    "npz in Fortran's order": write_fortran,
    "compressed npz in Fortran's order": write_compressed_fortran,
    "directory of npy": write_directory,
    "hdf5": write_hdf5,
    "hdf5 in chunks": write_hdf5_in_chunks,
}
each_form = pytest.mark.parametrize("form", FORMS)


def source(root: Path, images: str | None = None, labels: str | None = None) -> ArraySource:
    return ArraySource(root, images=images, labels=labels)


def error_of(root: Path, images: str | None = None, labels: str | None = None) -> str:
    """The one line that refuses the arrays."""
    with pytest.raises(UserError) as caught:
        read_all(source(root, images, labels))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(root), "ROOT")


def grey(num: int, *, seed: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (num, 6, 4), dtype=np.uint8)


def columns_of(pictures: Pictures) -> dict[str, NDArray[Any]]:
    return {"labels": pictures.label, "camera": np.array(pictures.camera), "angle": pictures.angle}


@each_form
@pytest.mark.parametrize("which", ALL)
@pytest.mark.parametrize("num_rows", [1, 7, 1000])
def test_all_forms_give_the_same_rows_for_any_size_of_parts(
    form: str, which: str, num_rows: int, tmp_path: Path
) -> None:
    pictures = ALL[which]()
    root = FORMS[form](tmp_path, {"images": pictures.pixels, **columns_of(pictures)})
    assert_holds(source(root), pictures, num_rows=num_rows)


@pytest.mark.parametrize("num_rows", [7, 1000])
def test_channels_may_come_last(num_rows: int, tmp_path: Path) -> None:
    pictures = synthetic()
    root = write_npz(tmp_path, {"imgs": np.moveaxis(pictures.pixels, 1, 3), **columns_of(pictures)})
    assert_holds(source(root), pictures, num_rows=num_rows)


def test_an_npy_file_is_images_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "crops.npy", grey(9))
    read = read_all(source(tmp_path / "crops.npy"), num_rows=4)[None]
    np.testing.assert_array_equal(np.stack(read.images)[:, 0], np.stack([grey(9)] * 3, 1)[:, 0])
    assert read.columns == {}


def test_an_npy_file_is_mapped_not_loaded(tmp_path: Path) -> None:
    file = np.lib.format.open_memmap(tmp_path / "large.npy", mode="w+", dtype=np.uint8, shape=(40_000, 1, 1000, 1000))
    file[39_999] = 17  # 40 GB, of which the disk holds the last megabyte
    del file
    large = source(tmp_path / "large.npy")
    *_, last = large.parts(2)
    assert np.unique(large.read(last, COLOUR).images[1]).tolist() == [17]


@each_form
def test_keras_mnist_is_read_as_it_is(form: str, tmp_path: Path) -> None:
    arrays = {"x_test": grey(5), "y_test": np.arange(5), "x_train": grey(11, seed=4), "y_train": np.arange(11) % 10}
    mnist = source(FORMS[form](tmp_path, arrays))
    read = read_all(mnist, num_rows=3)
    assert list(read) == ["train", "test"]
    for split in read:
        np.testing.assert_array_equal(np.stack(read[split].images)[:, 0], arrays[f"x_{split}"])
        np.testing.assert_array_equal(read[split].columns["label"], arrays[f"y_{split}"])
    assert mnist.num_images == 16
    assert mnist.native_shape() == (1, 6, 4)


@each_form
def test_medmnist_is_read_as_it_is(form: str, tmp_path: Path) -> None:
    sizes = {"train": 7, "val": 3, "test": 2}
    arrays = {f"{split}_images": grey(num, seed=num) for split, num in sizes.items()}
    labels = {f"{split}_labels": (np.arange(num) % 5).astype(np.uint8)[:, None] for split, num in sizes.items()}
    read = read_all(source(FORMS[form](tmp_path, {**arrays, **labels})), num_rows=3)
    assert {split: len(rows.images) for split, rows in read.items()} == sizes
    for split, rows in read.items():
        np.testing.assert_array_equal(rows.columns["label"], labels[f"{split}_labels"][:, 0])


def test_several_labels_an_image_are_factors(tmp_path: Path) -> None:
    labels = np.random.default_rng(5).integers(0, 2, (7, 3))
    read = read_all(source(write_npz(tmp_path, {"train_images": grey(7), "train_labels": labels})))["train"]
    assert list(read.columns) == ["labels_0", "labels_1", "labels_2"]
    np.testing.assert_array_equal(np.stack(list(read.columns.values()), axis=1), labels)


@pytest.mark.parametrize("word", ["val", "valid", "validation", "dev"])
def test_all_words_for_validation_mean_it(word: str, tmp_path: Path) -> None:
    root = write_npz(tmp_path, {"train_images": grey(4), f"{word}_images": grey(3)})
    assert {split: len(read.images) for split, read in read_all(source(root)).items()} == {"train": 4, "val": 3}


def test_groups_of_an_hdf5_file_may_be_splits(tmp_path: Path) -> None:
    root = write_hdf5(tmp_path, {"test/images": grey(2), "train/images": grey(4), "train/labels": np.arange(4)})
    read = read_all(source(root))
    assert {split: rows.columns["label"].tolist() for split, rows in read.items()} == {
        "train": [0, 1, 2, 3],
        "test": [-1, -1],
    }


def test_names_choose_images_and_labels(tmp_path: Path) -> None:
    arrays = {"images": grey(5), "crops": grey(5, seed=8), "labels": np.arange(5), "kind": np.arange(5)[::-1]}
    read = read_all(source(write_npz(tmp_path, arrays), "crops", "kind"))[None]
    np.testing.assert_array_equal(np.stack(read.images)[:, 0], arrays["crops"])
    assert read.columns["label"].tolist() == [4, 3, 2, 1, 0]
    assert read.columns["labels"].tolist() == [0, 1, 2, 3, 4]


def test_names_without_the_split_choose_those_of_all_splits(tmp_path: Path) -> None:
    arrays = {"train_a": grey(3), "test_a": grey(2), "train_b": grey(3), "train_kind": np.arange(3)}
    read = read_all(source(write_npz(tmp_path, {**arrays, "test_kind": np.arange(2)}), "a", "kind"))
    assert {split: rows.columns["label"].tolist() for split, rows in read.items()} == {
        "train": [0, 1, 2],
        "test": [0, 1],
    }


def test_the_label_and_a_factor_of_that_name_are_both_kept(tmp_path: Path) -> None:
    root = write_npz(tmp_path, {"x": grey(3), "kind": np.array([2, 0, 1]), "label": np.array([5, 6, 7])})
    columns = read_all(source(root, labels="kind"))[None].columns
    assert {name: values.tolist() for name, values in columns.items()} == {"label": [2, 0, 1], "label_2": [5, 6, 7]}


def test_labels_of_text_are_codes_of_sorted_names_over_all_splits(tmp_path: Path) -> None:
    texts = {"y_train": np.array(["cat", "über", "ant"]), "y_test": np.array(["bee", "cat"])}
    text = source(write_npz(tmp_path, {"x_train": grey(3), "x_test": grey(2), **texts}))
    read = read_all(text, num_rows=2)
    assert text.names == {"label": ["ant", "bee", "cat", "über"]}
    assert {split: rows.columns["label"].tolist() for split, rows in read.items()} == {
        "train": [2, 3, 0],
        "test": [1, 2],
    }


def test_labels_of_bytes_are_text_whatever_their_encoding(tmp_path: Path) -> None:
    text = source(write_npz(tmp_path, {"x": grey(3), "y": np.array([b"b", "ü".encode(), b"\xff"])}))
    assert read_all(text)[None].columns["label"].tolist() == [1, 2, 0]
    assert text.names == {"label": ["\\xff", "b", "ü"]}


def test_text_with_characters_that_do_not_exist_is_refused(tmp_path: Path) -> None:
    for character in (0x110000, 0xD800):  # Python could not pickle the first, nor print the second
        texts = np.array([[97, character], [98, 99]], dtype=np.uint32).view("<U2")[:, 0]
        message = error_of(write_npz(tmp_path, {"x": grey(2), "y": texts}))
        assert message == (
            "data.root: ROOT cannot be read (text with characters that do not exist); it may be damaged or truncated"
        )


@pytest.mark.parametrize(
    ("labels", "name", "expected"),
    [
        (np.array([2.0, np.nan, 0.0]), "label", [2, -1, 0]),
        (np.array([2.5, np.nan, 0.0]), "y", [2.5, np.nan, 0.0]),
        (np.array([np.inf, 1.0, 0.0]), "y", [np.inf, 1.0, 0.0]),
        (np.array([True, False, True]), "label", [1, 0, 1]),
        (np.array([2**64 - 1, 0, 1], dtype=np.uint64), "y", [2.0**64, 0.0, 1.0]),
        (np.array([3, 1, 2], dtype=">i2"), "label", [3, 1, 2]),
    ],
    ids=["missing", "measured", "infinite", "bool", "too large", "big-endian"],
)
def test_labels_are_int64_codes_or_a_float64_factor_of_their_own_name(
    labels: NDArray[Any], name: str, expected: list[float], tmp_path: Path
) -> None:
    root = write_npz(tmp_path, {"images": grey(3), "y": labels})
    for num_rows in (1, 1000):
        (column,) = read_all(source(root), num_rows=num_rows)[None].columns.items()
        assert column[0] == name
        np.testing.assert_array_equal(column[1], np.array(expected))
        assert column[1].dtype == (np.int64 if name == "label" else np.float64)


def test_rows_that_cannot_be_used_are_skipped_by_number_with_their_labels(tmp_path: Path) -> None:
    images = np.random.default_rng(6).random((20, 6, 4)).astype(np.float32)
    images[17, 2, 3] = np.nan
    root = write_npz(tmp_path, {"images": images, "labels": np.arange(20)})
    for num_rows in (1, 7, 1000):
        read = read_all(source(root), num_rows=num_rows)[None]
        assert read.skipped == [("row 17", "has values that are NaN or infinite")]
        assert read.columns["label"].tolist() == [row for row in range(20) if row != 17]
        np.testing.assert_array_equal(np.stack(read.images)[:, 0], np.rint(np.delete(images, 17, 0) * 255))


def test_skipped_rows_of_a_split_are_named_by_its_array(tmp_path: Path) -> None:
    images = np.full((3, 6, 4), np.nan)
    read = read_all(source(write_npz(tmp_path, {"x_train": np.zeros((2, 6, 4)), "x_test": images})))["test"]
    assert [name for name, _ in read.skipped] == [f"x_test row {row}" for row in range(3)]


def test_an_empty_split_gives_no_parts(tmp_path: Path) -> None:
    assert list(read_all(source(write_npz(tmp_path, {"x_train": grey(2), "x_test": grey(0)})))) == ["train"]


def test_the_fingerprint_changes_with_the_file_and_the_names(tmp_path: Path) -> None:
    root = write_npz(tmp_path, {"images": grey(3)})
    before = source(root).fingerprint()
    assert source(root).fingerprint() == before
    assert source(root, images="images").fingerprint() != before
    assert source(root, labels="images").fingerprint() != before
    os.utime(root, ns=(5, 6))
    assert source(root).fingerprint() != before


def test_arrays_that_change_while_they_are_read_are_refused(tmp_path: Path) -> None:
    root = write_npz(tmp_path, {"images": grey(3)})
    changing = source(root)
    (part,) = changing.parts(5)
    write_npz(tmp_path, {"images": grey(2)})
    with pytest.raises(UserError, match="was changed while it was read; start again"):
        changing.read(part, COLOUR)


def test_threads_can_share_a_compressed_array(tmp_path: Path) -> None:
    images = grey(400)
    shared = source(write_compressed(tmp_path, {"images": images}))
    parts = list(shared.parts(3))
    with ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(lambda part: shared.read(part, COLOUR).images, reversed(parts)))
    np.testing.assert_array_equal(np.stack([image[0] for block in reversed(rows) for image in block]), images)


def test_a_pickled_source_holds_no_arrays(tmp_path: Path) -> None:
    large = source(write_npz(tmp_path, {"images": grey(2000), "labels": np.arange(2000)}))
    read_all(large)
    assert len(pickle.dumps(large)) < 3000


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    root = write_npz(tmp_path, {"images": grey(3)})
    code = (
        "import sys, pathlib; from vae_ray.data.sources.arrays import ArraySource; "
        "from vae_ray.data.decoding import ImageRules; "
        f"source = ArraySource(pathlib.Path({str(root)!r}), images=None, labels=None); "
        "source.read(next(source.parts(5)), ImageRules()); "
        "print([name for name in ('torch', 'h5py', 'pandas') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_describes_what_lies_there(tmp_path: Path) -> None:
    root = write_npz(tmp_path, {"x_train": grey(4), "x_test": grey(2), "y_train": np.arange(4)})
    assert source(root).describe() == "6 images of uint8 (6, 4) in stored.npz (train: 4, test: 2), with label"


NUMBERS = np.arange(5)
SHAPES = "should be (N, H, W), (N, H, W, C) or (N, C, H, W)"


@pytest.mark.parametrize(
    ("arrays", "names", "message"),
    [
        (
            {"a": NUMBERS, "b": grey(5), "c": grey(5)},
            {},
            "data.root: ROOT has no array that is named as images are (images, image, imgs, x, X, data, train_images, "
            "x_train, ...); it has a int64 (5,), b uint8 (5, 6, 4), c uint8 (5, 6, 4); name one by --data.images NAME",
        ),
        (
            {"x": grey(5), "data": grey(5)},
            {},
            "data.root: ROOT has several arrays that may be the images (x, data); it has x uint8 (5, 6, 4), "
            "data uint8 (5, 6, 4); choose one by --data.images NAME",
        ),
        (
            {"val_x": grey(5), "valid_x": grey(5)},
            {},
            "data.root: ROOT has several arrays that may be the images (val_x, valid_x); it has val_x uint8 (5, 6, 4), "
            "valid_x uint8 (5, 6, 4); choose one by --data.images NAME",
        ),
        (
            {"images": grey(5), "y": NUMBERS, "targets": NUMBERS},
            {},
            "data.root: ROOT has several arrays that may be the labels (y, targets); it has images uint8 (5, 6, 4), "
            "y int64 (5,), targets int64 (5,); choose one by --data.labels NAME",
        ),
        (
            {"images": grey(5)},
            {"images": "crops"},
            "data.images: got 'crops', which ROOT does not have; it has images uint8 (5, 6, 4)",
        ),
        (
            {"x_train": grey(5)},
            {"labels": "kind"},
            "data.labels: got 'kind', which ROOT does not have for x_train; it has x_train uint8 (5, 6, 4)",
        ),
        (
            {"images": grey(5), "labels": NUMBERS[:4]},
            {},
            "data.labels: array 'labels' of ROOT has 4 rows for the 5 images of 'images'",
        ),
        (
            {"images": grey(5), "labels": np.zeros((5, 2, 2))},
            {},
            "data.labels: array 'labels' of ROOT is float64 (5, 2, 2), should be numbers or text of shape (N,), "
            "(N, 1) or (N, K)",
        ),
        (
            {"images": grey(5).reshape(5, 24)},
            {},
            f"data.images: array 'images' of ROOT is uint8 (5, 24), {SHAPES} of numbers",
        ),
        (
            {"images": np.zeros((5, 3, 4), complex)},
            {},
            f"data.images: array 'images' of ROOT is complex128 (5, 3, 4), {SHAPES} of numbers",
        ),
        (
            {"images": grey(5)[:, :0]},
            {},
            f"data.images: array 'images' of ROOT is uint8 (5, 0, 4), which has no pixels; {SHAPES}",
        ),
        (
            {"images": np.zeros((5, 9, 9, 7))},
            {},
            "data.images: array 'images' of ROOT has shape (1, 9, 9, 7), should be (N, H, W), (N, H, W, C) or "
            "(N, C, H, W) with 1 to 4 channels",
        ),
        ({"images": grey(0)}, {}, "data.root: ROOT holds no images, array 'images' has no rows"),
        (
            {"images": np.array([{}, []], dtype=object)},
            {},
            "data.images: array 'images' of ROOT holds Python objects, which could run code when read; save it as an "
            "array of numbers",
        ),
        (
            {"images": grey(2), "labels": np.array([{}, []], dtype=object)},
            {},
            "data.labels: array 'labels' of ROOT holds Python objects, which could run code when read; save it as "
            "numbers, or as text of a fixed length (dtype U)",
        ),
    ],
)
@pytest.mark.parametrize("write", [write_npz, write_compressed])
def test_arrays_that_cannot_be_used_are_one_line(
    arrays: dict[str, Any], names: dict[str, str], message: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    assert error_of(write(tmp_path, arrays), **names) == message


def test_an_object_array_beside_the_images_is_left_alone(tmp_path: Path) -> None:
    root = write_npz(tmp_path, {"imgs": grey(3), "metadata": np.array({"a": 1}, dtype=object)})
    assert len(read_all(source(root))[None].images) == 3


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (sys.exit, (3,))


@pytest.mark.parametrize("write", [write_npz, write_compressed, write_directory])
def test_nothing_is_unpickled(write: Callable[..., Path], tmp_path: Path) -> None:
    root = write(tmp_path, {"images": np.array([RunsCode(), RunsCode()], dtype=object)})
    assert "holds Python objects" in error_of(root)


def test_what_is_no_file_of_arrays_is_one_line(tmp_path: Path) -> None:
    assert error_of(tmp_path / "absent.npz") == "data.root: ROOT cannot be read (No such file or directory)"
    assert error_of(tmp_path) == ("data.root: ROOT has no .npy files; should be a directory of .npy files, or one file")
    (tmp_path / "text.csv").write_text("1,2")
    assert error_of(tmp_path / "text.csv") == (
        "data.root: ROOT is not a file of arrays; should end in one of .npy, .npz, .h5, .hdf5, .hdf"
    )
    os.mkfifo(tmp_path / "pipe.npz")
    assert error_of(tmp_path / "pipe.npz") == (
        "data.root: ROOT is a directory, a pipe or a device, should be a regular file"
    )
    (tmp_path / "null.npy").symlink_to("/dev/null")
    assert error_of(tmp_path / "null.npy") == (
        "data.root: ROOT is a directory, a pipe or a device, should be a regular file"
    )


def test_a_directory_of_npy_with_a_pipe_is_refused(tmp_path: Path) -> None:
    root = write_directory(tmp_path, {"images": grey(2)})
    os.mkfifo(root / "labels.npy")
    assert error_of(root) == ("data.root: ROOT/labels.npy is a directory, a pipe or a device, should be a regular file")


def test_without_h5py_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.h5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert error_of(tmp_path / "a.h5") == (
        "data.root: ROOT is an HDF5 file, which needs the package h5py; pip install 'vae_ray[hdf5]'"
    )


def damaged(content: bytes, *, trial: int, generator: np.random.Generator) -> bytes:
    """Cut off, or with twenty wrong bytes, anywhere or among the first 200, in turn."""
    if trial % 3 == 0:
        return content[: generator.integers(len(content))]
    wrong = bytearray(content)
    for position in generator.integers(0, len(content) if trial % 3 == 1 else 200, 20):
        wrong[position] = generator.integers(256)
    return bytes(wrong)


@each_form
def test_damaged_and_truncated_files_are_one_line_that_names_them(form: str, tmp_path: Path) -> None:
    """Never another error; damage among the values themselves can be read."""
    pictures = synthetic()
    root = FORMS[form](tmp_path, {"images": pictures.pixels, "labels": pictures.label})
    file = root / "images.npy" if root.is_dir() else root
    intact, generator = file.read_bytes(), np.random.default_rng(11)
    refused: dict[int, str] = {}
    for trial in range(60):
        file.write_bytes(damaged(intact, trial=trial, generator=generator))
        os.utime(file, ns=(trial, trial))  # two trials can fall into one tick of the clock
        try:
            read_all(source(root), num_rows=7)
        except UserError as error:
            refused[trial] = str(error)
    assert set(range(0, 60, 3)) <= refused.keys(), "a truncated file was read"
    assert all(str(root) in message and "\n" not in message for message in refused.values())


def test_a_compressed_member_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
    root = write_compressed(tmp_path, {"images": grey(300)})
    content = bytearray(root.read_bytes())
    with zipfile.ZipFile(root) as archive:
        expected = archive.infolist()[0].CRC.to_bytes(4, "little")
    content = content.replace(expected, bytes(4))
    root.write_bytes(content)
    assert "Bad CRC-32" in error_of(root)
