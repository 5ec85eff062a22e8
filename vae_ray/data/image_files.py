"""A user's own images from files, in the form of a model's: a directory of pictures, one picture, or an array."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vae_ray.data.decoding import ImageRules, Unusable, decode_image
from vae_ray.data.images import as_images
from vae_ray.data.sources.folder import SUFFIXES
from vae_ray.errors import UserError, one_line


def read_images(path: Path, image_shape: tuple[int, int, int], *, num: int, rules: ImageRules | None = None) -> Tensor:
    """The first `num` images of a directory (by name), a picture, or a .npy or .npz file: `(n, C, H, W)` in [0, 1].

    Pictures are decoded by `rules`, those of the model's run; arrays are taken as they are. Raises `UserError`, naming
    the file, for what then does not have the `image_shape`.
    """
    if path.suffix.lower() in (".npy", ".npz"):
        array = _channels_first(_read_array(path), image_shape)
        return as_images(array[:num] if array.ndim else array, image_shape)
    try:
        is_directory = path.is_dir()
        files = sorted(path.iterdir()) if is_directory else [path]
    except OSError as error:
        raise UserError(f"images: {path} cannot be read ({_reason(error)})") from None
    if is_directory:
        pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
        files = [file for file in pictures if not file.name.startswith(".")][:num]
    if not files:
        raise UserError(f"images: {path} has no pictures; should be a directory of pictures, a .npy or a .npz file")
    return as_images(np.stack([_read_picture(file, image_shape, rules or ImageRules()) for file in files]), image_shape)


def _read_array(file: Path) -> NDArray[np.generic]:
    """The array of a .npy file, or the only one, or that of the name `images`, of a .npz file."""
    try:
        loaded = np.load(_no_pipe(file), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            name = loaded.files[0] if len(loaded.files) == 1 else "images"
            if name not in loaded.files:
                names = f"the arrays {', '.join(loaded.files)}" if loaded.files else "no arrays"
                raise UserError(f"images: {file} has {names}; should have one, or one of the name images")
            return np.asarray(loaded[name])
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"images: {file} cannot be read ({_reason(error)})") from None


def _channels_first(images: NDArray[np.generic], image_shape: tuple[int, int, int]) -> NDArray[np.generic]:
    """`(N, H, W)` of grey images and `(N, H, W, C)` as `(N, C, H, W)`; other shapes are left as they are."""
    channels, height, width = image_shape
    if images.shape[1:] == (height, width) and channels == 1:
        return images[:, None]
    if images.shape[1:] == (height, width, channels) and images.shape[1:] != image_shape:
        return np.moveaxis(images, 3, 1)
    return images


def _read_picture(file: Path, image_shape: tuple[int, int, int], rules: ImageRules) -> NDArray[np.uint8]:
    """uint8 `(C, H, W)`."""
    channels, height, width = image_shape
    if channels not in (1, 3):
        raise UserError(f"images: {file} is a picture, the model's images have {channels} channels; give a .npy file")
    try:
        pixels = decode_image(file, rules)
    except Unusable as error:
        raise UserError(f"images: {file} {error}") from None
    if pixels.shape[1:] != (height, width):
        size = f"{pixels.shape[2]}x{pixels.shape[1]}"
        raise UserError(f"images: {file} has {size} pixels, the model's have {width}x{height}; resize it")
    if len(pixels) > channels:
        raise UserError(f"images: {file} is in colour, the model's images are grey; convert it to grey")
    return pixels.repeat(channels // len(pixels), axis=0)


def _no_pipe(file: Path) -> Path:
    """The file; raises `ValueError` for a pipe or a device, which could keep a reader waiting."""
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise ValueError("is a pipe or a device, should be a regular file")
    return file


def _reason(error: Exception) -> str:
    """Why a file cannot be read; without its name again."""
    return getattr(error, "strerror", None) or one_line(error)[:120]
