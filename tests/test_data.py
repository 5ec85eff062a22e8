"""Truth and system: the digits, the raw files of MNIST's layout, and the Arrow store that all processes share."""

import gzip
import hashlib
import json
import logging
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vae_ray import Experiment, UserError
from vae_ray.config.sections import DigitsData, MnistData
from vae_ray.data.arrow_store import Split, open_split
from vae_ray.data.sources import SOURCES, Digits, Images
from vae_ray.data.splits import Splits


class Unreadable(Digits):
    """The digits, as long as nobody decodes them."""

    def decode(self, split: str) -> Images:
        raise AssertionError(f"decoded {split} again")


@pytest.fixture
def config(tmp_path: Path) -> DigitsData:
    return DigitsData(cache_dir=tmp_path / "cache")


def arrow_file(config: DigitsData, split: str = "test") -> Path:
    assert config.cache_dir is not None
    (file,) = config.cache_dir.glob(f"digits-{split}-*.arrow")
    return file


def equal(a: Split, b: Split) -> bool:
    return torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels)


# --- digits ---------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn_each_in_one_split(config: DigitsData) -> None:
    from sklearn.datasets import load_digits

    known = load_digits()
    train, test = open_split(config, "train"), open_split(config, "test")
    assert (len(train), len(test)) == (1438, 359)
    is_test = np.arange(1797) % 5 == 4
    pixels = np.empty((1797, 1, 8, 8), np.uint8)
    labels = np.empty(1797, np.int64)
    for split, chosen in ((train, ~is_test), (test, is_test)):
        pixels[chosen], labels[chosen] = split.pixels.numpy(), split.labels.numpy()
    # levels 0..16 become 0..255, to the nearest byte
    assert np.abs(pixels[:, 0] * (16 / 255) - known.images).max() <= 0.5 * 16 / 255
    assert np.array_equal(labels, known.target)


def test_first_digit_is_the_known_zero(config: DigitsData) -> None:
    train = open_split(config, "train")
    # scikit-learn's first row: levels 0 0 5 13 9 1 0 0 of 16
    assert train.pixels[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert train.labels[:6].tolist() == [0, 1, 2, 3, 5, 6]
    assert open_split(config, "test").labels[:3].tolist() == [4, 9, 4]
    assert train.image_shape == (1, 8, 8)


def test_validation_is_taken_from_train_and_never_from_test(config: DigitsData) -> None:
    splits = Splits.open(Experiment(data=config.model_copy(update={"num_validation": 100})))
    pixels, validation = splits.select("val")
    assert len(validation) == 100
    assert torch.equal(pixels, splits.train.pixels)
    assert not set(validation.tolist()) & set(splits.select("train")[1].tolist())
    assert torch.equal(splits.select("test")[0], splits.test.pixels)
    assert splits.select("test")[1].tolist() == list(range(359))


# --- the Arrow store ------------------------------------------------------------------------------------


def test_what_is_opened_equals_what_was_decoded(config: DigitsData) -> None:
    decoded = Digits().decode("test")
    for _ in range(2):  # decoded now, then from the file
        opened = open_split(config, "test")
        assert np.array_equal(opened.pixels.numpy(), decoded.pixels)
        assert np.array_equal(opened.labels.numpy(), decoded.labels)


def test_second_open_maps_the_file_and_decodes_nothing(config: DigitsData, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_split(config, "test")
    monkeypatch.setitem(SOURCES, "digits", lambda config, root: Unreadable())
    second = open_split(config, "test")
    assert equal(first, second)
    if sys.platform == "linux":
        mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if ".arrow" in line]
        ranges = [[int(end, 16) for end in line.split("-")] for line in mapped]
        assert any(low <= second.pixels.data_ptr() < high for low, high in ranges)
    with pytest.raises(AssertionError, match="decoded train again"):
        open_split(config, "train")


@pytest.mark.parametrize("position", [0.0, 0.1, 0.5, 0.9, 0.999999])
def test_a_flipped_byte_is_named_in_a_warning_and_the_file_made_anew(
    config: DigitsData, position: float, caplog: pytest.LogCaptureFixture
) -> None:
    decoded = Digits().decode("test")
    open_split(config, "test")
    file = arrow_file(config)
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[int(position * len(whole))] ^= 0x10
    file.unlink()  # a new inode: earlier mappings of this process stay as they are
    file.write_bytes(flipped)
    with caplog.at_level(logging.WARNING):
        again = open_split(config, "test")
    assert str(file) in caplog.text
    assert "damaged" in caplog.text
    assert np.array_equal(again.pixels.numpy(), decoded.pixels)
    assert np.array_equal(again.labels.numpy(), decoded.labels)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("damage", ["missing", "empty", "not json", "another digest", "a list"])
def test_without_a_good_sidecar_the_file_is_made_anew(
    config: DigitsData, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_split(config, "test")
    sidecar = arrow_file(config).with_suffix(".json")
    good = sidecar.read_text()
    contents = {"empty": "", "not json": "{", "another digest": json.dumps({"sha256": "0" * 64}), "a list": "[]"}
    sidecar.unlink()
    if damage in contents:
        sidecar.write_text(contents[damage])
    assert equal(open_split(config, "test"), first)
    assert sidecar.read_text() == good
    monkeypatch.setitem(SOURCES, "digits", lambda config, root: Unreadable())
    assert equal(open_split(config, "test"), first)


def test_what_a_killed_writer_left_is_not_taken_for_the_file(config: DigitsData) -> None:
    first = open_split(config, "test")
    file = arrow_file(config)
    partial = file.with_suffix(".partial-1")
    partial.write_bytes(file.read_bytes()[:100])
    file.unlink()
    assert equal(open_split(config, "test"), first)


def test_sidecar_is_the_sha256_of_the_file(config: DigitsData) -> None:
    open_split(config, "test")
    file = arrow_file(config)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert json.loads(file.with_suffix(".json").read_text())["sha256"] == digest


def test_a_fingerprint_is_that_of_the_images_wherever_they_lie(raw: Path, tmp_path: Path) -> None:
    here = Splits.open(Experiment(data=mnist_config(raw))).fingerprints
    shutil.copytree(raw, tmp_path / "elsewhere" / "MNIST" / "raw")
    copy = tmp_path / "elsewhere" / "MNIST" / "raw"
    (copy / NAMES[1]).write_bytes(idx(np.zeros(7, dtype=np.uint8)))  # labels train nothing
    elsewhere = MnistData(root=tmp_path / "elsewhere", download=False, cache_dir=tmp_path / "other cache")
    assert Splits.open(Experiment(data=elsewhere)).fingerprints == here
    content = bytearray((copy / NAMES[2]).read_bytes())
    content[-1] ^= 1
    (copy / NAMES[2]).write_bytes(content)
    found = Splits.open(Experiment(data=elsewhere)).fingerprints
    assert found["train"] == here["train"]
    assert found["test"] != here["test"]


def test_a_cache_that_cannot_be_written_is_refused_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match=r"data\.cache_dir .*file.*try --data.cache-dir DIR"):
        open_split(DigitsData(cache_dir=tmp_path / "file"), "test")


EIGHT_PROCESSES = """
import os, sys, time
import torch
from vae_ray.config.sections import DigitsData, MnistData
from vae_ray.data.arrow_store import open_split
from vae_ray.data.sources import SOURCES, Digits

cache, log = sys.argv[1:]
pixels = Digits().decode("test").pixels
start = time.time() + 0.3

class Counted(Digits):
    def decode(self, split):
        with open(log, "a") as stream:
            stream.write(f"{os.getpid()}\\n")
        time.sleep(0.2)  # time for the others to come
        return super().decode(split)

SOURCES["digits"] = lambda config, root: Counted()
children = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        time.sleep(max(0.0, start - time.time()))
        opened = open_split(DigitsData(cache_dir=cache), "test")
        os._exit(0 if (opened.pixels.numpy() == pixels).all() else 1)
    children.append(child)
sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_eight_processes_on_a_cold_cache_decode_once_and_all_see_the_images(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EIGHT_PROCESSES, str(tmp_path / "cache"), str(tmp_path / "log")]
    assert subprocess.run(command, timeout=60).returncode == 0
    assert len((tmp_path / "log").read_text().split()) == 1
    assert not list((tmp_path / "cache").glob("*partial*"))


# --- raw files in MNIST's layout ------------------------------------------------------------------------

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


def mnist_config(raw: Path) -> MnistData:
    root = raw.parents[1]
    return MnistData(root=root, download=False, cache_dir=root.parent / "cache")


def test_raw_files_are_read_as_they_stand(raw: Path) -> None:
    train, test = open_split(mnist_config(raw), "train"), open_split(mnist_config(raw), "test")
    assert train.pixels.numpy().tobytes() == (raw / NAMES[0]).read_bytes()[16:]
    assert train.labels.tolist() == list((raw / NAMES[1]).read_bytes()[8:])
    assert test.pixels.shape == (3, 1, 6, 5)
    assert test.pixels.numpy().tobytes() == (raw / NAMES[2]).read_bytes()[16:]
    assert test.labels.tolist() == list((raw / NAMES[3]).read_bytes()[8:])


def test_changed_raw_files_are_decoded_anew(raw: Path) -> None:
    first = open_split(mnist_config(raw), "train")
    (raw / NAMES[0]).write_bytes(idx(np.full((7, 6, 5), 9, dtype=np.uint8)))
    again = open_split(mnist_config(raw), "train")
    assert set(again.pixels.flatten().tolist()) == {9}
    assert len(set(first.pixels.flatten().tolist())) > 9


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


@pytest.mark.mnist
def test_mnist_is_the_known_data_set(mnist_root: Path, tmp_path: Path) -> None:
    config = MnistData(root=mnist_root, download=False, cache_dir=tmp_path)
    train, test = open_split(config, "train"), open_split(config, "test")
    assert (len(train), len(test), train.image_shape) == (60_000, 10_000, (1, 28, 28))
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    # the mean of all training pixels, known as 0.1307 of white
    assert float(train.pixels.sum(dtype=torch.int64)) / train.pixels.numel() / 255 == pytest.approx(0.1307, abs=5e-5)
