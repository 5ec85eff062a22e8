"""Truth and system: the raw files of MNIST's layout are read as they stand, or refused by name."""

import gzip
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.data_layer.stored import labels_of, open_split, pixels_of
from vae_ray import Experiment, UserError
from vae_ray.config.sections.data import PublishedData
from vae_ray.data.splits import Splits

NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def idx(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A directory of small raw files: 7 training and 3 test images of 6x5 pixels."""
    directory = tmp_path / "data" / "MNIST" / "raw"
    directory.mkdir(parents=True)
    random = np.random.default_rng(2)
    for prefix, n in (("train", 7), ("t10k", 3)):
        images = random.integers(0, 256, (n, 6, 5), dtype=np.uint8)
        (directory / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (directory / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(random.integers(0, 10, n, dtype=np.uint8)))
    return directory


def mnist_config(raw: Path) -> PublishedData:
    root = raw.parents[1]
    return PublishedData(root=root, download=False, cache_dir=root.parent / "cache")


def test_raw_files_are_read_as_they_stand(raw: Path) -> None:
    train, test = open_split(mnist_config(raw), "train"), open_split(mnist_config(raw), "test")
    assert pixels_of(train).tobytes() == (raw / NAMES[0]).read_bytes()[16:]
    assert labels_of(train).tolist() == list((raw / NAMES[1]).read_bytes()[8:])
    assert pixels_of(test).shape == (3, 1, 6, 5)
    assert pixels_of(test).tobytes() == (raw / NAMES[2]).read_bytes()[16:]
    assert labels_of(test).tolist() == list((raw / NAMES[3]).read_bytes()[8:])


def test_changed_raw_files_are_decoded_anew(raw: Path) -> None:
    first = open_split(mnist_config(raw), "train")
    (raw / NAMES[0]).write_bytes(idx(np.full((7, 6, 5), 9, dtype=np.uint8)))
    again = open_split(mnist_config(raw), "train")
    assert set(pixels_of(again).flatten().tolist()) == {9}
    assert len(set(pixels_of(first).flatten().tolist())) > 9


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_raw_file_is_named_with_two_ways_out(raw: Path, name: str) -> None:
    (raw / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing and data.download is false") as refusal:
        open_split(mnist_config(raw), "train")
    assert "--data.root DIR" in str(refusal.value)
    assert "preset digits" in str(refusal.value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda whole: whole[:-1],
            r"truncated or damaged, expected 226 bytes for uint8 of shape \(7, 6, 5\), found 225",
        ),
        (lambda whole: whole + b"\0", "expected 226 bytes .* found 227"),
        (lambda whole: whole[:10], "expected a header of 16 bytes, found 10"),
        (lambda whole: whole[:3], "expected it to begin with 00000803, found 000008"),
        (lambda whole: b"", "expected it to begin with 00000803, found nothing"),
        (lambda whole: b"\x89PNG" + whole[4:], "expected it to begin with 00000803, found 89504e47"),
        (lambda whole: bytes([0, 0, 8, 1]) + whole[4:], r"expected 15 bytes for uint8 of shape \(7,\), found 226"),
        (lambda whole: whole[:4] + b"\xff" * 4 + whole[8:], r"shape \(4294967295, 6, 5\), found 226"),
    ],
)
def test_a_damaged_raw_file_is_refused_with_expected_and_found(
    raw: Path, damage: Callable[[bytes], bytes], said: str
) -> None:
    file = raw / NAMES[0]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=said) as refusal:
        open_split(mnist_config(raw), "train")
    assert str(refusal.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("code", "dtype", "shape"),
    [
        (0x09, "int8", (7, 6, 5)),
        (0x0B, "int16", (7, 6, 5)),
        (0x0C, "int32", (7, 6, 5)),
        (0x0D, "float32", (7, 6, 5)),
        (0x0E, "float64", (7, 6, 5)),
        (0x08, "uint8", (7, 6, 5, 3)),
        (0x08, "uint8", (7, 30)),
    ],
)
def test_a_whole_raw_file_of_other_numbers_is_no_damaged_one(
    raw: Path, code: int, dtype: str, shape: tuple[int, ...]
) -> None:
    values = np.zeros(shape, np.dtype(dtype).newbyteorder(">"))
    whole = bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values.tobytes()
    (raw / NAMES[0]).write_bytes(whole)
    with pytest.raises(UserError, match=rf"holds {dtype} of shape {re.escape(str(shape))}, should be unsigned bytes"):
        open_split(mnist_config(raw), "train")
    (raw / NAMES[0]).write_bytes(whole[:-1])
    with pytest.raises(UserError, match="truncated or damaged"):
        open_split(mnist_config(raw), "train")


def test_a_compressed_raw_file_is_named_as_such(raw: Path) -> None:
    (raw / NAMES[0]).write_bytes(gzip.compress((raw / NAMES[0]).read_bytes()))
    with pytest.raises(UserError, match=f"{NAMES[0]}: is compressed; unpack it with gunzip"):
        open_split(mnist_config(raw), "train")


def test_labels_that_do_not_match_the_images_are_refused(raw: Path) -> None:
    (raw / NAMES[1]).write_bytes(idx(np.zeros(6, dtype=np.uint8)))
    with pytest.raises(UserError, match=f"{NAMES[1]}: expected 7 labels, one per image, found 6"):
        open_split(mnist_config(raw), "train")


def test_a_fingerprint_is_that_of_the_images_wherever_they_lie(raw: Path, tmp_path: Path) -> None:
    here = Splits.open(Experiment(data=mnist_config(raw))).fingerprints
    shutil.copytree(raw, tmp_path / "elsewhere" / "MNIST" / "raw")
    copy = tmp_path / "elsewhere" / "MNIST" / "raw"
    (copy / NAMES[1]).write_bytes(idx(np.zeros(7, dtype=np.uint8)))  # labels train nothing
    elsewhere = PublishedData(root=tmp_path / "elsewhere", download=False, cache_dir=tmp_path / "other cache")
    assert Splits.open(Experiment(data=elsewhere)).fingerprints == here
    content = bytearray((copy / NAMES[2]).read_bytes())
    content[-1] ^= 1
    (copy / NAMES[2]).write_bytes(content)
    found = Splits.open(Experiment(data=elsewhere)).fingerprints
    assert found["train"] == here["train"]
    assert found["test"] != here["test"]


@pytest.mark.mnist
def test_mnist_is_the_known_data_set(mnist_root: Path, tmp_path: Path) -> None:
    config = PublishedData(root=mnist_root, download=False, cache_dir=tmp_path)
    train, test = open_split(config, "train"), open_split(config, "test")
    assert (len(train), len(test), train.image_shape) == (60_000, 10_000, (1, 28, 28))
    assert labels_of(train)[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert labels_of(test)[:5].tolist() == [7, 2, 1, 0, 4]
    # the mean of all training pixels, known as 0.1307 of white
    assert pixels_of(train).mean(dtype=np.float64) / 255 == pytest.approx(0.1307, abs=5e-5)
    assert Splits.open(Experiment(data=config)).mean_training_image().mean() == pytest.approx(0.1307, abs=5e-5)
