"""Truth: what a user's function may return or yield, and the images and labels that become of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.data_layer.stored import pixels_of
from vae_ray import UserError
from vae_ray.config.sections.data import UserData
from vae_ray.data.cache import open_dataset
from vae_ray.data.dataset import Dataset

PIXELS = np.random.default_rng(4).integers(0, 256, (90, 2, 3, 5), dtype=np.uint8)
LABELS = np.arange(90) % 7
Opener = Callable[[Callable[..., Any]], Dataset]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opener:
    """The data set of a user's function."""

    def open_function(function: Callable[..., Any]) -> Dataset:
        module = ModuleType("users_module")
        module.images = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "users_module", module)
        return open_dataset(UserData(source="users_module:images", cache_dir=tmp_path))

    return open_function


def by_split(dataset: Dataset) -> dict[str, list[bytes]]:
    return {name: [image.tobytes() for image in pixels_of(split)] for name, split in dataset.splits.items()}


@pytest.mark.parametrize(
    "convert", [np.asarray, torch.from_numpy, np.asfortranarray], ids=["array", "tensor", "order F"]
)
def test_images_that_are_returned_keep_their_order_in_the_split_of_their_content(
    opened: Opener, convert: Callable[..., Any]
) -> None:
    found = by_split(opened(lambda: convert(PIXELS)))
    assert sorted(found["train"] + found["test"]) == sorted(image.tobytes() for image in PIXELS)
    for images in found.values():
        assert images == [image.tobytes() for image in PIXELS if image.tobytes() in images]


@pytest.mark.parametrize("rows", [1, 7, 90])
def test_blocks_of_any_size_are_the_same_images(opened: Opener, tmp_path: Path, rows: int) -> None:
    def in_blocks() -> Iterator[tuple[Any, Any]]:
        for start in range(0, 90, rows):
            yield PIXELS[start : start + rows], LABELS[start : start + rows]

    dataset = opened(in_blocks)
    numbers = {image.tobytes(): number for number, image in enumerate(PIXELS)}
    for name, images in by_split(dataset).items():
        rows_of_split = [numbers[image] for image in images]
        assert rows_of_split == sorted(rows_of_split)
        assert dataset.splits[name].columns["label"].tolist() == LABELS[rows_of_split].tolist()
    expected = opened(lambda: (PIXELS, LABELS))
    assert by_split(dataset) == by_split(expected)


def test_splits_and_columns_of_a_dict_are_kept_by_name(opened: Opener) -> None:
    weights = np.arange(90) / 8
    dataset = opened(
        lambda: {
            "test": PIXELS[80:],
            "val": (PIXELS[70:80], LABELS[70:80].tolist()),
            "train": iter(
                [
                    (PIXELS[:40], {"weight": weights[:40], "kind": LABELS[:40]}),
                    (PIXELS[40:70], {"weight": weights[40:70], "kind": LABELS[40:70]}),
                ]
            ),
        }
    )
    assert list(dataset.splits) == ["train", "val", "test"]
    assert np.array_equal(pixels_of(dataset.splits["train"]), PIXELS[:70])
    assert np.array_equal(pixels_of(dataset.splits["val"]), PIXELS[70:80])
    assert np.array_equal(pixels_of(dataset.splits["test"]), PIXELS[80:])
    columns = dataset.splits["train"].columns
    assert columns.keys() == {"weight", "kind"}
    assert columns["weight"].dtype == torch.float64
    assert columns["weight"].tolist() == weights[:70].tolist()
    assert columns["kind"].tolist() == LABELS[:70].tolist()
    assert dataset.splits["val"].columns["label"].tolist() == LABELS[70:80].tolist()
    assert dataset.splits["test"].columns == {}


def failing() -> Iterator[Any]:
    yield PIXELS
    raise RuntimeError("no more")


def large(*, labels: Any = None, channels: int = 2) -> tuple[Any, Any]:
    """A block of more images than a part has."""
    return np.zeros((1500, channels, 3, 5), np.uint8), labels


MISTAKES: dict[str, tuple[Callable[..., Any], str]] = {
    "a number": (lambda: 3, "returned a int, should return images, yield blocks of them, or return a dict"),
    "a text": (lambda: "images", "returned a str, should return images"),
    "no images": (lambda: PIXELS[:0], r"gave uint8 of shape \(0, 2, 3, 5\), should be uint8 of shape \(N, C, H, W\)"),
    "no blocks": (lambda: iter([]), "users_module:images has no images"),
    "a yielded None": (lambda: iter([PIXELS, None, PIXELS]), "got a NoneType that is no array of numbers"),
    "an unknown split": (lambda: {"train": PIXELS, "tset": PIXELS}, r"the keys \['train', 'tset'\], should have"),
    "floats": (lambda: PIXELS / 255, r"gave float64 of shape \(90, 2, 3, 5\), should be uint8"),
    "two shapes": (
        lambda: iter([PIXELS, PIXELS[:, :, :2]]),
        r"gave images of shape \(2, 3, 5\) and \(2, 2, 5\); should be of one shape",
    ),
    "two shapes in parts": (
        lambda: iter([large()[0], large(channels=3)[0]]),
        r"gave images of shape \(2, 3, 5\) and \(3, 3, 5\); should be of one shape",
    ),
    "channels by split": (
        lambda: {"train": PIXELS, "test": large(channels=3)[0]},
        "has images of 2 and 3 channels; should be of one number, or of 1 and 3",
    ),
    "sizes by split": (
        lambda: {"train": PIXELS, "test": PIXELS[:4, :, :, :4]},
        r"several sizes \(height x width\): 3x5 \(90\), 3x4 \(4\); should be of one size",
    ),
    "labels of some blocks": (lambda: iter([(PIXELS, LABELS), PIXELS]), "gave labels for some images only"),
    "labels of some parts": (
        lambda: iter([large(labels=np.zeros(1500, int)), large()]),
        "gave labels for some images only, should be for all or none",
    ),
    "too few labels": (lambda: (PIXELS, LABELS[:5]), r"gave labels of shape \(5,\) for 90 images, should be one whole"),
    "halves as labels": (lambda: (PIXELS, LABELS / 2), "should be one whole number an image, or None"),
    "a reserved column": (lambda: (PIXELS, {"digest": LABELS}), "has a column 'digest', which has another meaning"),
    "one image": (lambda: PIXELS[:1], "has one usable image; at least 2 are needed"),
    "an error in a block": (failing, r"users_module:images fails in .*test_user\.py, line \d+ \(RuntimeError: no more"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_function(opened: Opener, tmp_path: Path, mistake: str) -> None:
    function, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as refusal:
        opened(function)
    assert str(refusal.value).startswith("data.source: ")
    assert "users_module:images" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.rglob("dataset.json"))
