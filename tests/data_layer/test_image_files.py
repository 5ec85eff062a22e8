"""Truth: a user's own images are read as they are, or refused with the name of their file."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from vae_ray import TrainResult, UserError
from vae_ray.cli.main import main
from vae_ray.config.sections.data import DigitsData, ImagesData
from vae_ray.data.decoding import decode_image
from vae_ray.data.image_files import read_images
from vae_ray.data.sources import rules_for, rules_of

GREY, COLOUR = (1, 6, 5), (3, 6, 5)
CHANCE = np.random.default_rng(5)
PIXELS = CHANCE.integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)


def images_of(path: Path, image_shape: tuple[int, int, int], num: int = 10) -> NDArray[np.uint8]:
    return (read_images(path, image_shape, num=num) * 255).round().to(torch.uint8).numpy()


def test_pictures_of_a_directory_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    for number, name in enumerate(["b.png", "a.bmp", "d.PNG", "c.tif"]):
        Image.fromarray(PIXELS[number]).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    expected = PIXELS[[1, 0, 3]].transpose(0, 3, 1, 2)
    assert np.array_equal(images_of(tmp_path, COLOUR, 3), expected)
    assert np.array_equal(images_of(tmp_path / "a.bmp", COLOUR), expected[:1])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1"])
def test_a_grey_picture_is_grey_in_whatever_form_it_is_stored(mode: str, tmp_path: Path) -> None:
    grey = np.where(PIXELS[0, :, :, 0] > 99, 255, 0).astype(np.uint8)
    Image.fromarray(grey).convert(mode).save(tmp_path / "x.png")
    assert np.array_equal(images_of(tmp_path, GREY), grey[None, None])


def test_sixteen_bits_and_transparency_are_read_as_in_training(tmp_path: Path) -> None:
    grey = PIXELS[0, :, :, 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    Image.fromarray(np.dstack([grey, grey, grey, np.full_like(grey, 0)])).save(tmp_path / "clear.png")
    expected = np.stack([grey[None], np.full((1, 6, 5), 255)])
    assert np.array_equal(images_of(tmp_path, GREY), expected)


def test_pictures_of_any_size_are_brought_to_the_model_s_where_its_run_did_so(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[0]).resize((50, 90), Image.Resampling.NEAREST).save(tmp_path / "x.png")
    data = ImagesData(root=str(tmp_path), image_size=[6, 5], fit="stretch", channels=1)
    rules = rules_for(data, GREY)
    found = read_images(tmp_path, GREY, num=1, rules=rules)
    assert np.array_equal((found * 255).round().numpy()[0], decode_image(tmp_path / "x.png", rules_of(data)))
    with pytest.raises(UserError, match=r"x\.png has 50x90 pixels, the model's have 5x6"):
        read_images(tmp_path, GREY, num=1, rules=rules_for(DigitsData(), GREY))


@pytest.mark.parametrize("form", ["npy", "npz of one", "npz with images"])
@pytest.mark.parametrize("axes", ["NCHW", "NHWC", "NHW"])
def test_arrays_are_read_in_each_unambiguous_order_of_axes(form: str, axes: str, tmp_path: Path) -> None:
    image_shape = GREY if axes == "NHW" else COLOUR
    expected = PIXELS.transpose(0, 3, 1, 2)[:, : image_shape[0]]
    array = {"NCHW": expected, "NHWC": PIXELS, "NHW": expected[:, 0]}[axes]
    file = tmp_path / f"x.{form[:3]}"
    if form == "npy":
        np.save(file, array)
    elif form == "npz of one":
        np.savez(file, anything=array)
    else:
        np.savez(file, images=array, labels=np.zeros(4))
    assert np.array_equal(images_of(file, image_shape), expected)


def save(pixels: Any, mode: str | None = None) -> Callable[[Path], object]:
    return lambda path: Image.fromarray(pixels, mode).save(path / "x.png")


REFUSED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "another size": (save(PIXELS[0, :5]), "", "x.png has 5x5 pixels, the model's have 5x6; resize it"),
    "colour": (save(PIXELS[0]), "", "x.png is in colour, the model's images are grey"),
    "no picture": (lambda path: (path / "x.png").write_text("hello"), "", "x.png is no image that can be read"),
    "empty directory": (lambda path: None, "", "has no pictures; should be a directory of pictures"),
    "pickle": (lambda path: np.save(path / "x.npy", np.array([{}])), "x.npy", "x.npy cannot be read"),
    "no zip": (lambda path: (path / "x.npz").write_bytes(b"PK"), "x.npz", "x.npz cannot be read"),
    "two arrays": (lambda path: np.savez(path / "x.npz", a=PIXELS, b=PIXELS), "x.npz", "x.npz has the arrays a, b"),
    "no arrays": (lambda path: np.savez(path / "x.npz"), "x.npz", "x.npz has no arrays; should have one"),
    "no axes": (lambda path: np.save(path / "x.npy", np.float32(1)), "x.npy", "got shape (), should be (N, 1, 6, 5)"),
    "pipe": (lambda path: os.mkfifo(path / "x.npy"), "x.npy", "x.npy cannot be read (is a pipe or a device, should be"),
    "pipe without an ending": (lambda path: os.mkfifo(path / "x"), "x", "x is a directory, a pipe or a device"),
    "pipe among pictures": (lambda path: os.mkfifo(path / "x.png"), "", "x.png is a directory, a pipe or a device"),
    "a name too long": (lambda path: None, "x" * 300, "File name too long"),
    "integers": (lambda path: np.save(path / "x.npy", np.ones((2, 6, 5), int)), "x.npy", "got int64 from 1 to 1"),
    "another shape": (lambda path: np.save(path / "x.npy", np.ones((2, 9))), "x.npy", "should be (N, 1, 6, 5)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_have_the_model_s_form_is_refused_with_its_name(what: str, tmp_path: Path) -> None:
    make, name, message = REFUSED[what]
    make(tmp_path)
    with pytest.raises(UserError) as refusal:
        read_images(tmp_path / name, GREY, num=3)
    assert str(refusal.value).startswith("images: ")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_commands_show_a_user_s_own_images(
    trained_run: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for number in range(3):
        Image.fromarray(CHANCE.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "mine" / f"{number}.png")
    np.save("one.npy", np.zeros((1, 8, 8)))
    run, shown = str(trained_run.run_dir), {}
    for command in ("reconstruct", "interpolate", "traverse"):
        for images in ([], ["--images", "mine"]):
            assert main([command, run, "--out", "x.png", *images]) == 0
            shown[command, bool(images)] = (tmp_path / "x.png").read_bytes()
        assert shown[command, True] != shown[command, False]
    capsys.readouterr()
    assert main(["interpolate", run, "--out", "x.png", "--images", "one.npy"]) == 2
    assert "images: got 1, should be at least two, the ends of a path" in capsys.readouterr().err
